// A block of 64 elements in AVX-512 registers: its operands from memory and back, its codes, its
// random bits. Bit for bit what formats.h and blocks.h have of one element, where all are numbers.
//
// NOTE [the order in a block]
// A block's 64 elements are four vectors: the even and the odd ones of its first half, then those
// of its second half. So two vectors are the halves of 32-bit lanes, as 16-bit operands lie in
// memory (pairs.h), and the four are the bytes of 32-bit lanes, once the halves of 64 codes are
// interleaved(). Decoding is done in lanes of 16 bits, and most of encoding in lanes of 8: each
// instruction does two or four times as much as with the lanes of float32.
#pragma once

#include "draws.h"
#include "pairs.h"

#ifdef __AVX512BW__
namespace warpstep {
namespace {

constexpr int kVectors = 4;  // of a block

// A block's numbers, or their bits.
struct Block {
  __m512i vectors[kVectors];
};

// A constant in each lane, from memory, where it costs no instruction. Others GCC makes anew for
// each block, by way of general registers, in the unit that has the shuffles to do.
template <std::uint32_t kBits>
WARPSTEP_FN __m512i every() {
  __attribute__((used)) static std::uint32_t bits = kBits;  // "used": as if it might be changed
  return _mm512_set1_epi32(static_cast<int>(bits));
}

// ---- Operands of 16 and 32 bits

// A word of 16 bits an element, as they lie in memory.
struct Words {
  __m512i first, second;  // half of the block

  static Words load(const void* from) {
    return {_mm512_loadu_si512(from), _mm512_loadu_si512(static_cast<const __m512i*>(from) + 1)};
  }
  void store(void* to) const {
    _mm512_storeu_si512(to, first);
    _mm512_storeu_si512(static_cast<__m512i*>(to) + 1, second);
  }
};

// In lanes of 32 bits, above zeros.
WARPSTEP_FN Block widened(const Words& x) {
  const auto lower = [](__m512i words) { return _mm512_and_si512(words, every<0xffff>()); };
  const auto upper = [](__m512i words) { return _mm512_srli_epi32(words, 16); };
  return {{lower(x.first), upper(x.first), lower(x.second), upper(x.second)}};
}
// The halves of 32-bit lanes, as bfloat16.
WARPSTEP_FN __m512i lower_as_numbers(__m512i x) { return _mm512_slli_epi32(x, 16); }
WARPSTEP_FN __m512i upper_as_numbers(__m512i x) {
  return _mm512_and_si512(x, every<0xffff0000u>());
}
// Lanes of `lower`'s upper halves, below those of `upper`.
WARPSTEP_FN __m512i upper_halves(__m512i lower, __m512i upper) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(lower, 16), upper);
}
WARPSTEP_FN Words upper_halves(const Block& x) {
  return {upper_halves(x.vectors[0], x.vectors[1]), upper_halves(x.vectors[2], x.vectors[3])};
}
WARPSTEP_FN __m512i lower_halves(__m512i lower, __m512i upper) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, lower, _mm512_slli_epi32(upper, 16));
}

WARPSTEP_FN Block load_block(const Halves& from) {
  const auto [first, second] = Words::load(from.at);
  return {{lower_as_numbers(first), upper_as_numbers(first), lower_as_numbers(second),
           upper_as_numbers(second)}};
}
WARPSTEP_FN Block load_block(const Singles& from) {
  alignas(64) static constexpr std::int32_t kEven[] = {0,  2,  4,  6,  8,  10, 12, 14,
                                                       16, 18, 20, 22, 24, 26, 28, 30};
  alignas(64) static constexpr std::int32_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                      17, 19, 21, 23, 25, 27, 29, 31};
  const auto picked = [&](const std::int32_t (&order)[16], std::int64_t at) {
    return _mm512_permutex2var_epi32(_mm512_loadu_si512(from.at + at), _mm512_load_si512(order),
                                     _mm512_loadu_si512(from.at + at + 16));
  };
  return {{picked(kEven, 0), picked(kOdd, 0), picked(kEven, 32), picked(kOdd, 32)}};
}
WARPSTEP_FN Block load_block(const RandomHalves& from) { return load_block(Halves{from.at}); }
WARPSTEP_FN Block load_block(const MasterHalves& from) {
  const Block high = load_block(Halves{from.at});
  const auto [first, second] = Words::load(from.residual);
  // With their signs: a sum of products is the shortest way to the lower half's.
  const auto lower = [](__m512i x) { return _mm512_madd_epi16(x, every<1>()); };
  const auto upper = [](__m512i x) { return _mm512_srai_epi32(x, 16); };
  return {{_mm512_add_epi32(high.vectors[0], lower(first)),
           _mm512_add_epi32(high.vectors[1], upper(first)),
           _mm512_add_epi32(high.vectors[2], lower(second)),
           _mm512_add_epi32(high.vectors[3], upper(second))}};
}

// Of numbers, no NaN among them. `random` has 16 bits an element, where they are needed.
WARPSTEP_FN void store_block(const Block& x, const Singles& to, const Words&) {
  alignas(64) static constexpr std::int32_t kFirst[] = {0, 16, 1, 17, 2, 18, 3, 19,
                                                        4, 20, 5, 21, 6, 22, 7, 23};
  alignas(64) static constexpr std::int32_t kSecond[] = {8,  24, 9,  25, 10, 26, 11, 27,
                                                         12, 28, 13, 29, 14, 30, 15, 31};
  for (int half = 0; half < 2; ++half) {
    const __m512i even = x.vectors[2 * half], odd = x.vectors[2 * half + 1];
    float* const at = to.at + 32 * half;
    _mm512_storeu_si512(at, _mm512_permutex2var_epi32(even, _mm512_load_si512(kFirst), odd));
    _mm512_storeu_si512(at + 16, _mm512_permutex2var_epi32(even, _mm512_load_si512(kSecond), odd));
  }
}
WARPSTEP_FN void store_block(const Block& x, const Halves& to, const Words&) {
  Block rounded;
  for (int i = 0; i < kVectors; ++i) {
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(x.vectors[i], 16), every<1>());
    rounded.vectors[i] = _mm512_add_epi32(_mm512_add_epi32(x.vectors[i], every<0x7fff>()), is_odd);
  }
  upper_halves(rounded).store(to.at);
}
WARPSTEP_FN void store_block(const Block& x, const MasterHalves& to, const Words&) {
  Block rounded;
  for (int i = 0; i < kVectors; ++i) {
    rounded.vectors[i] = _mm512_add_epi32(x.vectors[i], every<kHalfOfLast>());
  }
  upper_halves(rounded).store(to.at);
  Words{lower_halves(x.vectors[0], x.vectors[1]), lower_halves(x.vectors[2], x.vectors[3])}.store(
      to.residual);
}
WARPSTEP_FN void store_block(const Block& x, const RandomHalves& to, const Words& random) {
  Block rounded = widened(random);
  for (int i = 0; i < kVectors; ++i) {
    rounded.vectors[i] = _mm512_add_epi32(x.vectors[i], rounded.vectors[i]);
  }
  upper_halves(rounded).store(to.at);
}

// ---- Codes

// Of interleaved() codes that are numbers.
template <class C>
WARPSTEP_FN Block decoded(__m512i codes, std::int32_t base) {
  __m512i even, odd;  // as bfloat16
  if constexpr (C::kSigned) {
    const __m512i mask = every<0x87f087f0u>();
    even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 4), mask);
    odd = _mm512_and_si512(_mm512_srai_epi16(codes, 4), mask);
  } else {
    even = _mm512_and_si512(_mm512_slli_epi16(codes, 4), every<0x0ff00ff0>());
    odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), every<0x0ff00ff0>());
  }
  const __m512i upper = _mm512_set1_epi16(static_cast<std::int16_t>(base >> 16));
  const auto with_base = [&](__m512i x) {
    const __mmask32 is_not_zero = _mm512_test_epi16_mask(x, C::kSigned ? every<0x07f007f0>() : x);
    return _mm512_mask_add_epi16(x, is_not_zero, x, upper);
  };
  even = with_base(even), odd = with_base(odd);
  return {{lower_as_numbers(even), lower_as_numbers(odd), upper_as_numbers(even),
           upper_as_numbers(odd)}};
}

WARPSTEP_FN Block magnitudes_of(const Block& x) {
  Block magnitudes;
  for (int i = 0; i < kVectors; ++i) {
    magnitudes.vectors[i] = _mm512_and_si512(x.vectors[i], every<0x7fffffff>());
  }
  return magnitudes;
}

// As bytes, too large and too small ones as the largest and least there are; below zero is zero, or
// if `kSigned` the sign stays. In each 128 bits there are four of each vector.
template <bool kSigned>
WARPSTEP_FN __m512i packed(const Block& x) {
  const __m512i first = _mm512_packs_epi32(x.vectors[0], x.vectors[1]);
  const __m512i second = _mm512_packs_epi32(x.vectors[2], x.vectors[3]);
  return kSigned ? _mm512_packs_epi16(first, second) : _mm512_packus_epi16(first, second);
}
// Those as they lie in memory.
WARPSTEP_FN __m512i in_order(__m512i packed) {
  alignas(16) static constexpr std::uint8_t kPairs[] = {0, 4,  1, 5,  2,  6,  3,  7,
                                                        8, 12, 9, 13, 10, 14, 11, 15};
  alignas(64) static constexpr std::uint64_t kWords[] = {0, 2, 4, 6, 1, 3, 5, 7};
  const __m128i pairs = _mm_load_si128(reinterpret_cast<const __m128i*>(kPairs));
  return _mm512_permutexvar_epi64(_mm512_load_si512(kWords),
                                  _mm512_shuffle_epi8(packed, _mm512_broadcast_i32x4(pairs)));
}

// `base` with what blocks.h's encoded() takes from it.
WARPSTEP_FN __m512i encoded_e4m3(const Block& x, __m512i base) {
  Block codes = magnitudes_of(x);
  for (__m512i& code : codes.vectors) code = _mm512_srai_epi32(_mm512_sub_epi32(code, base), 20);
  constexpr int kBySelector = 0xca;  // the second's bits where the first has ones, else the third's
  return in_order(_mm512_ternarylogic_epi32(every<0x7f7f7f7f>(), packed<false>(codes),
                                            packed<true>(x), kBySelector));
}
WARPSTEP_FN __m512i encoded_ue5m3(const Block& x, __m512i base, const Words& random) {
  Block codes = widened(random);
  for (int i = 0; i < kVectors; ++i) {
    const __m512i above_base = _mm512_sub_epi32(x.vectors[i], base);
    const __m512i added = _mm512_slli_epi32(codes.vectors[i], 4);
    codes.vectors[i] = _mm512_srai_epi32(_mm512_add_epi32(above_base, added), 20);
  }
  // No positive number becomes zero.
  const __m512i least = _mm512_min_epu8(packed<false>(x), every<0x01010101>());
  return in_order(_mm512_max_epu8(packed<false>(codes), least));
}

// ---- Random bits

// An operand's, for the blocks of a chunk.
class BlockDraws {
 public:
  // `keys`: those of `from`. `upper`: the upper 32 bits of draws' indices, which the chunk shares.
  BlockDraws(const LaneKeys& keys, const Draw& from, std::uint64_t upper)
      : keys_(keys),
        upper_(Lanes{} + upper),
        step_(Lanes{} + from.step),
        operand_(Lanes{} + from.operand) {}

  // `index`: the lower bits of the block's first draw.
  WARPSTEP_FN Words of_block(std::uint32_t index) const {
    static_assert(kBlock == kDrawn * kLanes, "a lane a draw");
    const Lanes order = {0, 4, 1, 5, 2, 6, 3, 7};  // the block's halves take turns
    Lanes words[] = {order + index, upper_, step_, operand_};
    philox(words, keys_, product_of);
    const auto side_by_side = [](Lanes a, Lanes b) {
      return reinterpret_cast<__m512i>(_mm512_mask_moveldup_ps(reinterpret_cast<__m512>(a), 0xaaaa,
                                                               reinterpret_cast<__m512>(b)));
    };
    const __m512i a = side_by_side(words[0], words[1]), b = side_by_side(words[2], words[3]);
    return {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)};
  }

 private:
  const LaneKeys& keys_;
  const Lanes upper_, step_, operand_;
};

}  // namespace
}  // namespace warpstep
#endif
