// Eight consecutive elements of an operand of any format, as a thread has them in registers: how
// they are loaded, decoded, encoded and stored.
//
// Formats are compared where they are used. Where they are known at run time only, these are
// branches that all threads of a launch take the same way; where they are constants, none.
#pragma once

#include "../recipes.h"
#include "launch.cuh"

namespace warpstep {
namespace {

// As many as share one draw of random bits, and as fill a vector of 16-bit elements.
constexpr std::uint32_t kEight = kDrawn;
static_assert(kEight == 8 && kEight * 2 == kVectorBytes, "what the name says");
// A block of 8-bit numbers lies with so many threads, which are neighbours in a warp.
constexpr std::uint32_t kBlockThreads = kBlock / kEight;
constexpr std::uint32_t kWarp = 32;
static_assert(kCudaThreads % kWarp == 0 && kWarp % kBlockThreads == 0, "all in one warp");

// Which of eight elements there are: all, at a vector's boundary; or the first `count`, anywhere.
template <bool kAll>
struct Which {
  std::uint32_t count;
  __device__ __forceinline__ bool has(std::uint32_t k) const { return kAll || k < count; }
};

// An operand's format. What that operand may not have, it is not: there is no code for it.
struct FormatOf {
  std::uint32_t operand;
  Format format;

  __device__ __forceinline__ bool is(Format one) const {
    return may_have(operand, one) && format == one;
  }
  __device__ __forceinline__ bool is_in_blocks() const {
    return is(Format::e4m3) || is(Format::ue5m3);
  }
  __device__ __forceinline__ bool is_stochastic() const {
    return is(Format::bfloat16_stochastic) || is(Format::ue5m3);
  }
};

// The bits of eight elements, the first lowest. What a format needs besides follows: the residuals
// of bfloat16 masters, the scale of 8-bit numbers.
constexpr std::uint32_t kResidualWord = 4;
constexpr std::uint32_t kScaleWord = 2;
struct Bits {
  std::uint32_t words[kEight];

  template <bool kAll>
  __device__ __forceinline__ void load(FormatOf format, const void* from, Which<kAll> which,
                                       std::uint32_t word = 0) {
    if (format.is(Format::float32)) {
      load_of<std::uint32_t>(from, which, words);
    } else if (format.is_in_blocks()) {
      load_of<std::uint8_t>(from, which, words);
    } else {
      load_of<std::uint16_t>(from, which, words + word);
    }
  }
  template <bool kAll>
  __device__ __forceinline__ void store(FormatOf format, void* to, Which<kAll> which,
                                        std::uint32_t word = 0) const {
    if (format.is(Format::float32)) {
      store_of<std::uint32_t>(to, which, words);
    } else if (format.is_in_blocks()) {
      store_of<std::uint8_t>(to, which, words);
    } else {
      store_of<std::uint16_t>(to, which, words + word);
    }
  }

 private:
  template <class Element>
  using Vector = std::conditional_t<sizeof(Element) == 1, uint2, uint4>;

  template <class Element, bool kAll>
  __device__ __forceinline__ static bool is_vectors(const void* at, Which<kAll> which) {
    const auto address = reinterpret_cast<std::uintptr_t>(at);
    return kAll || (which.count == kEight && address % sizeof(Vector<Element>) == 0);
  }
  template <class Element, bool kAll>
  __device__ __forceinline__ static void load_of(const void* from, Which<kAll> which,
                                                 std::uint32_t* words) {
    constexpr std::uint32_t kBytes = sizeof(Element);
    using V = Vector<Element>;
    if (is_vectors<Element>(from, which)) {
#pragma unroll
      for (std::uint32_t i = 0; i < kEight * kBytes / sizeof(V); ++i) {
        const V vector = static_cast<const V*>(from)[i];
        std::memcpy(words + i * (sizeof(V) / 4), &vector, sizeof(V));
      }
    } else {
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) {
        const std::uint32_t at = k * kBytes / 4, shift = k * kBytes % 4 * 8;
        const std::uint32_t bits =
            which.has(k) ? std::uint32_t{static_cast<const Element*>(from)[k]} << shift : 0;
        words[at] = shift == 0 ? bits : words[at] | bits;
      }
    }
  }
  template <class Element, bool kAll>
  __device__ __forceinline__ static void store_of(void* to, Which<kAll> which,
                                                  const std::uint32_t* words) {
    constexpr std::uint32_t kBytes = sizeof(Element);
    using V = Vector<Element>;
    if (is_vectors<Element>(to, which)) {
#pragma unroll
      for (std::uint32_t i = 0; i < kEight * kBytes / sizeof(V); ++i) {
        V vector;
        std::memcpy(&vector, words + i * (sizeof(V) / 4), sizeof(V));
        static_cast<V*>(to)[i] = vector;
      }
    } else {
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) {
        const std::uint32_t bits = words[k * kBytes / 4] >> k * kBytes % 4 * 8;
        if (which.has(k)) static_cast<Element*>(to)[k] = static_cast<Element>(bits);
      }
    }
  }
};

// Their numbers.
using Eight = float[kEight];
using Random = std::uint32_t[kDrawn / 2];

__device__ __forceinline__ std::uint16_t half_of(const std::uint32_t* words, std::uint32_t k) {
  return static_cast<std::uint16_t>(words[k / 2] >> k % 2 * 16);
}
// Of two, four.
__device__ __forceinline__ std::uint32_t lower_halves(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ std::uint32_t upper_halves(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}
__device__ __forceinline__ std::uint32_t lowest_bytes(const std::uint32_t* x) {
  return lower_halves(__byte_perm(x[0], x[1], 0x40), __byte_perm(x[2], x[3], 0x40));
}
__device__ __forceinline__ std::uint32_t highest_bytes(const std::uint32_t* x) {
  return lower_halves(__byte_perm(x[0], x[1], 0x73), __byte_perm(x[2], x[3], 0x73));
}

__device__ __forceinline__ std::uint8_t byte_of(const std::uint32_t* words, std::uint32_t k) {
  return static_cast<std::uint8_t>(words[k / 4] >> k % 4 * 8);
}

// code * factor + base in one instruction, which the compiler would make three of if it knew that
// the code is masked and the factor a power of two.
__device__ __forceinline__ std::uint32_t placed(std::uint32_t code, std::uint32_t factor,
                                                std::uint32_t base) {
#ifdef __CUDA_ARCH__
  std::uint32_t bits;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(bits) : "r"(code), "r"(factor), "r"(base));
  return bits;
#else
  return code * factor + base;
#endif
}

// Decodes eight codes as numbers. Returns zero if they are, and none stands for what is no number.
template <class C>
__device__ __forceinline__ std::uint32_t decode_usual_codes(const Bits& bits, Eight& x) {
  const auto base = static_cast<std::uint32_t>(base_of<C>(bits.words[kScaleWord]));
#pragma unroll
  for (std::uint32_t k = 0; k < kEight; ++k) {
    const std::uint32_t word = bits.words[k / 4], byte = k % 4;
    const std::uint32_t code = word & static_cast<std::uint32_t>(C::kNan) << 8 * byte;
    const std::uint32_t number =
        byte == 3 ? (code >> 4) + base : placed(code, 1u << (20 - 8 * byte), base);
    const std::uint32_t sign = C::kSigned ? word << (24 - 8 * byte) & 0x80000000u : 0;
    x[k] = bits_as<float>((code == 0 ? 0 : number) | sign);
  }
  // Bytes of `inverse` are zero for what is no number. A byte that lends to another counts, too,
  // but only beside one of those.
  std::uint32_t found = 0;
#pragma unroll
  for (std::uint32_t i = 0; i < 2; ++i) {
    const std::uint32_t inverse = ~bits.words[i] & 0x01010101u * C::kInfinite;
    found |= (inverse - 0x01010101u) & ~inverse;
  }
  return found & 0x80808080u;
}

// What is there for NaNs and infinities is done again where there are any, and else costs nothing.
template <class C>
__device__ __forceinline__ void decode_codes(const Bits& bits, Eight& x) {
  if (decode_usual_codes<C>(bits, x) == 0) return;
  const std::int32_t base = base_of<C>(bits.words[kScaleWord]);
#pragma unroll
  for (std::uint32_t k = 0; k < kEight; ++k) x[k] = decoded<C, false>(byte_of(bits.words, k), base);
}

// Those of a warp that go together where blocks of 64 are whole, or else have this thread's block.
template <bool kAll>
__device__ __forceinline__ std::uint32_t threads_of_block() {
  if (kAll) return ~0u;
  return ((1u << kBlockThreads) - 1) << threadIdx.x % kWarp / kBlockThreads * kBlockThreads;
}

// The largest of the numbers that the threads of a block of 64 have. All of them call it together.
template <bool kAll>
__device__ __forceinline__ std::int32_t largest_of_block(std::int32_t number) {
  const std::uint32_t mask = threads_of_block<kAll>();
#pragma unroll
  for (std::uint32_t distance = kBlockThreads / 2; distance > 0; distance /= 2) {
    const std::int32_t other = __shfl_xor_sync(mask, number, distance);
    number = other > number ? other : number;
  }
  return number;
}

// Codes of finite numbers, none of them negative where there is no sign. They lie in bits 20 to 26
// or 27 of what is rounded. Usual ones without a sign are 0 or have bits of at least kLeastUsual.
constexpr std::int32_t kLeastUsual = 1 << 20;
template <class C, bool kUsual>
__device__ __forceinline__ void set_codes_of_numbers(const Eight& x, std::int32_t base,
                                                     const Random& random, Bits& bits) {
  std::uint32_t pairs[kEight / 2];
#pragma unroll
  for (std::uint32_t k = 0; k < kEight; k += 2) {
    std::int32_t rounded[2];
#pragma unroll
    for (std::uint32_t i = 0; i < 2; ++i) {
      const std::int32_t number = bits_as<std::int32_t>(x[k + i]);
      rounded[i] = rounded_to_code<C>(C::kSigned ? number & 0x7fffffff : number, base,
                                      C::kSigned ? 0 : drawn(random, k + i));
      // No positive number becomes zero where there is no sign.
      const std::int32_t least = kUsual       ? min_of(number, kLeastUsual)
                                 : number > 0 ? kLeastUsual
                                              : 0;
      rounded[i] = max_of(rounded[i], C::kSigned ? 0 : least);
    }
    pairs[k / 2] = upper_halves(rounded[0], rounded[1]) >> 4;
  }
#pragma unroll
  for (std::uint32_t word = 0; word < kEight / 4; ++word) {
    bits.words[word] = __byte_perm(pairs[2 * word], pairs[2 * word + 1], 0x6420);
    if (C::kSigned) {
      std::uint32_t signs[4];
#pragma unroll
      for (std::uint32_t i = 0; i < 4; ++i) signs[i] = bits_as<std::uint32_t>(x[4 * word + i]);
      bits.words[word] |= highest_bytes(signs) & 0x80808080u;
    }
  }
}

template <class C>
__device__ __forceinline__ void set_codes(const Eight& x, std::int32_t base, const Random& random,
                                          Bits& bits) {
#pragma unroll
  for (std::uint32_t word = 0; word < kEight / 4; ++word) {
    std::uint32_t codes[4];
#pragma unroll
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t k = word * 4 + i;
      codes[i] = encoded<C, false>(x[k], base, C::kSigned ? 0 : drawn(random, k));
    }
    bits.words[word] = lowest_bytes(codes);
  }
}

template <class C, bool kUsual, bool kAll>
__device__ __forceinline__ void encode_codes(const Eight& x, Which<kAll> which,
                                             const Random& random, Bits& bits) {
  // As unsigned numbers, the bits of what is no number are above those of all that are; so are
  // those of negative numbers, which only a code with a sign has.
  std::uint32_t highest = 0;
#pragma unroll
  for (std::uint32_t k = 0; k < kEight; ++k) {
    const std::uint32_t found = bits_as<std::uint32_t>(x[k]) & (C::kSigned ? 0x7fffffffu : ~0u);
    if (which.has(k)) highest = max_of(highest, found);
  }
  const bool are_numbers = kUsual || highest < 0x7f800000u;
  std::int32_t largest = static_cast<std::int32_t>(highest) + kMagnitudeOfZero;
  if (!are_numbers) {
    largest = kMagnitudeOfZero;
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; ++k) {
      if (which.has(k)) largest = max_of(largest, magnitude_of<C>(x[k]));
    }
  }
  const std::uint32_t scale = scale_of<C>(largest_of_block<kAll>(largest));
  const std::int32_t base = base_of<C>(scale);
  bits.words[kScaleWord] = scale;
  set_codes_of_numbers<C, kUsual>(x, base, random, bits);
  if (!are_numbers) set_codes<C>(x, base, random, bits);
}

// With `kUsual` codes are taken for numbers, and the result is zero if they are.
template <bool kUsual = false>
__device__ __forceinline__ std::uint32_t decode(FormatOf format, bool has_residual,
                                                const Bits& bits, Eight& x) {
  if constexpr (kUsual) {
    if (format.is(Format::e4m3)) return decode_usual_codes<E4m3>(bits, x);
    if (format.is(Format::ue5m3)) return decode_usual_codes<Ue5m3>(bits, x);
  }
  if (format.is(Format::float32)) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; ++k) x[k] = bits_as<float>(bits.words[k]);
  } else if (format.is(Format::float16)) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; ++k) x[k] = load(float16{half_of(bits.words, k)});
  } else if (format.is(Format::e4m3)) {
    decode_codes<E4m3>(bits, x);
  } else if (format.is(Format::ue5m3)) {
    decode_codes<Ue5m3>(bits, x);
  } else if (has_residual) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; ++k) {
      x[k] = joined(bfloat16{half_of(bits.words, k)},
                    static_cast<std::int16_t>(half_of(bits.words + kResidualWord, k)));
    }
  } else {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; ++k) x[k] = load(bfloat16{half_of(bits.words, k)});
  }
  return 0;
}

// draw(random) fills in what a format that is rounded at random asks for. With `kUsual` it is up to
// the caller that all are finite, and usual in a code.
template <bool kUsual = false, bool kAll, class DrawRandom>
__device__ __forceinline__ void encode(FormatOf format, bool has_residual, const Eight& x,
                                       Which<kAll> which, DrawRandom&& draw_random, Bits& bits) {
  Random random;
  if (format.is_stochastic()) draw_random(random);
  if (format.is(Format::float32)) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; ++k) bits.words[k] = bits_as<std::uint32_t>(x[k]);
  } else if (format.is(Format::float16)) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; k += 2) {
      float16 pair[2];
      store(x[k], pair[0]);
      store(x[k + 1], pair[1]);
      bits.words[k / 2] = lower_halves(pair[0].bits, pair[1].bits);
    }
  } else if (format.is(Format::e4m3)) {
    encode_codes<E4m3, kUsual>(x, which, random, bits);
  } else if (format.is(Format::ue5m3)) {
    encode_codes<Ue5m3, kUsual>(x, which, random, bits);
  } else if (format.is(Format::bfloat16_stochastic)) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; k += 2) {
      bits.words[k / 2] =
          upper_halves(rounded_stochastically<kUsual>(x[k], drawn(random, k)),
                       rounded_stochastically<kUsual>(x[k + 1], drawn(random, k + 1)));
    }
  } else if (has_residual) {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; k += 2) {
      const std::uint32_t a = bits_of_master<kUsual>(x[k]), b = bits_of_master<kUsual>(x[k + 1]);
      bits.words[k / 2] = upper_halves(a + kHalfOfLast, b + kHalfOfLast);
      bits.words[kResidualWord + k / 2] = lower_halves(a, b);
    }
  } else {
#pragma unroll
    for (std::uint32_t k = 0; k < kEight; k += 2) {
      bfloat16 pair[2];
      store(x[k], pair[0]);
      store(x[k + 1], pair[1]);
      bits.words[k / 2] = lower_halves(pair[0].bits, pair[1].bits);
    }
  }
}

}  // namespace
}  // namespace warpstep
