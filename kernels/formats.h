// Codecs: how an operand's elements become numbers in registers and back, each once.
#pragma once

#include <cstring>

#include "arithmetic.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace warpstep {
namespace {

struct float64 {
  using Compute = double;
  static constexpr Format format = Format::float64;
  double value;
};
struct float32 {
  using Compute = float;
  static constexpr Format format = Format::float32;
  float value;
};
struct bfloat16 {
  using Compute = float;
  static constexpr Format format = Format::bfloat16;
  std::uint16_t bits;
};
struct float16 {
  using Compute = float;
  static constexpr Format format = Format::float16;
  std::uint16_t bits;
};

WARPSTEP_FN double load(float64 x) { return x.value; }
WARPSTEP_FN float load(float32 x) { return x.value; }
WARPSTEP_FN float load(bfloat16 x) {
  return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

WARPSTEP_FN float load(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(bits_as<__half>(x.bits));
#else
  // The exponent's bias is 15 in float16 and 127 in float32, hence `normal`. What is subnormal in
  // float16 has that as 2^-15 + x / 2, from which `subnormal` makes x; it is the smaller of the two
  // just there. No float32 on the way is subnormal itself: a processor may be told to take those
  // for zero (torch.set_flush_denormal). Infinities and NaNs get the exponent of their kind. No
  // branch, so that the loop becomes SIMD code.
  const std::int32_t bits = static_cast<std::int16_t>(x.bits);
  const std::int32_t rebiased = (bits * 0x2000 & 0x0fffe000) + 0x38000000;
  const float normal = bits_as<float>(rebiased);
#ifdef __FMA__  // of the same bits: neither form rounds
  const float subnormal = __builtin_fmaf(normal, 2.0f, -0x1p-14f);
#else
  const float subnormal = normal + normal - 0x1p-14f;
#endif
  std::int32_t number = bits_as<std::int32_t>(normal < subnormal ? normal : subnormal);
  number |= rebiased >= 0x47800000 ? 0x7f800000 : 0;
  return bits_as<float>(number | (bits & ~0x7fffffff));
#endif
}

WARPSTEP_FN void store(double x, float64& to) { to.value = x; }
WARPSTEP_FN void store(float x, float32& to) { to.value = x; }

// In the upper half. To nearest, ties to even, on the bits; a NaN becomes the quiet NaN that CUDA
// stores.
WARPSTEP_FN std::uint32_t rounded_to_bfloat16(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  return x != x ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1u);
}

WARPSTEP_FN void store(float x, bfloat16& to) {
#ifdef __CUDA_ARCH__
  to.bits = bits_as<std::uint16_t>(__float2bfloat16_rn(x));
#else
  to.bits = static_cast<std::uint16_t>(rounded_to_bfloat16(x) >> 16);
#endif
}

// Two neighbours at once, as one number of twice the bits: half the instructions of two.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first is the lower half");
WARPSTEP_FN void load_pair(const bfloat16* from, float (&x)[2]) {
  std::uint32_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  x[0] = bits_as<float>(bits << 16);
  x[1] = bits_as<float>(bits & 0xffff0000u);
}
WARPSTEP_FN void store_pair(const float (&x)[2], bfloat16* to) {
  const std::uint32_t bits =
      rounded_to_bfloat16(x[0]) >> 16 | (rounded_to_bfloat16(x[1]) & 0xffff0000u);
  std::memcpy(to, &bits, sizeof(bits));
}

WARPSTEP_FN void store(float x, float16& to) {
#ifdef __CUDA_ARCH__
  to.bits = bits_as<std::uint16_t>(__float2half_rn(x));
#else
  // Normal numbers: re-bias and round to nearest even on the bits. Subnormal ones: adding 0.5 puts
  // the float16 grid at the end of the float32 significand, so the addition itself rounds (and a
  // float32 that is subnormal rounds to zero, whether or not the processor reads it as zero).
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const std::int32_t magnitude = bits & 0x7fffffffu;
  const std::int32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const std::int32_t subnormal =
      bits_as<std::int32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
  const std::int32_t half = magnitude < 0x38800000 ? subnormal : normal;
  // What is too large rounds to infinity; a NaN becomes the quiet NaN that CUDA stores.
  const std::int32_t number = min_of(half, 0x7c00) | (bits >> 16 & 0x8000u);
  to.bits = static_cast<std::uint16_t>(x != x ? 0x7fff : number);
#endif
}

// Calls of(format) with the codec of a format.
template <class Of>
auto in_format(Format format, Of&& of) {
  switch (lies_as(format)) {
    case Format::float64:
      return of(float64{});
    case Format::float32:
      return of(float32{});
    case Format::bfloat16:
      return of(bfloat16{});
    default:
      return of(float16{});
  }
}

}  // namespace
}  // namespace warpstep
