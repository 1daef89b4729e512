// Registers of AVX-512 or of AVX2, whichever is compiled for, with names for what the two do by
// different instructions. Most have intrinsics of the same name but for the prefix:
// WARPSTEP_V(add_epi32) is _mm512_add_epi32 or _mm256_add_epi32.
#pragma once

#include <type_traits>

#include "../arithmetic.h"
#include "intrinsics.h"

#ifdef __AVX2__
#define WARPSTEP_HAS_VECTORS

namespace warpstep {
namespace {

#ifdef __AVX512BW__
#define WARPSTEP_V(name) _mm512_##name
#define WARPSTEP_V_BITS(name) _mm512_##name##_si512
using Vector = __m512i;
using FloatVector = __m512;
using Flags = __mmask64;  // where something is so
#else
#define WARPSTEP_V(name) _mm256_##name
#define WARPSTEP_V_BITS(name) _mm256_##name##_si256
using Vector = __m256i;
using FloatVector = __m256;
using Flags = __m256i;
#endif
constexpr std::int64_t kSimdBytes = sizeof(Vector);

WARPSTEP_FN Vector load_vector(const void* from) {
  return WARPSTEP_V_BITS(loadu)(static_cast<const Vector*>(from));
}
WARPSTEP_FN void store_vector(void* to, Vector x) {
  WARPSTEP_V_BITS(storeu)(static_cast<Vector*>(to), x);
}
WARPSTEP_FN Vector masked(Vector x, Vector mask) { return WARPSTEP_V_BITS (and)(x, mask); }
WARPSTEP_FN Vector with_bits(Vector x, Vector bits) { return WARPSTEP_V_BITS(or)(x, bits); }

// A table in each 128 bits.
WARPSTEP_FN Vector in_each_128(const std::uint8_t (&table)[16]) {
  const __m128i once = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
#ifdef __AVX512BW__
  return _mm512_broadcast_i32x4(once);
#else
  return _mm256_broadcastsi128_si256(once);
#endif
}

// A constant in each lane of 32 bits, from memory, where it costs no instruction. Others GCC makes
// anew for each block, by way of general registers, in the unit that has the shuffles to do.
template <std::uint32_t kBits>
WARPSTEP_FN Vector every() {
#ifdef __AVX512BW__  // which broadcasts an operand as it reads it
  __attribute__((used)) static std::uint32_t bits = kBits;  // "used": as if it might be changed
  return _mm512_set1_epi32(static_cast<int>(bits));
#else
  alignas(32) __attribute__((used)) static std::uint32_t bits[] = {kBits, kBits, kBits, kBits,
                                                                   kBits, kBits, kBits, kBits};
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
#endif
}

// Numbers that rules compute with as with one.
struct Floats {
  FloatVector lanes;

  Floats() = default;
  WARPSTEP_FN explicit Floats(FloatVector of) : lanes(of) {}
  WARPSTEP_FN explicit Floats(Vector bits) : lanes(reinterpret_cast<FloatVector>(bits)) {}
  WARPSTEP_FN explicit Floats(float in_every_lane) : lanes(WARPSTEP_V(set1_ps)(in_every_lane)) {}
  WARPSTEP_FN Vector bits() const { return reinterpret_cast<Vector>(lanes); }

  WARPSTEP_FN friend Floats operator-(Floats a) { return Floats(-a.lanes); }
  WARPSTEP_FN friend Floats operator+(Floats a, Floats b) { return Floats(a.lanes + b.lanes); }
  WARPSTEP_FN friend Floats operator-(Floats a, Floats b) { return Floats(a.lanes - b.lanes); }
  WARPSTEP_FN friend Floats operator*(Floats a, Floats b) { return Floats(a.lanes * b.lanes); }
  WARPSTEP_FN friend Floats operator/(Floats a, Floats b) { return Floats(a.lanes / b.lanes); }
  WARPSTEP_FN friend Floats fma_of(Floats a, Floats b, Floats c) {
    return Floats(WARPSTEP_V(fmadd_ps)(a.lanes, b.lanes, c.lanes));
  }
  WARPSTEP_FN friend Floats square_root(Floats a) { return Floats(WARPSTEP_V(sqrt_ps)(a.lanes)); }
};

// ---- Conditions

WARPSTEP_FN bool any(Flags flags) {
#ifdef __AVX512BW__
  return flags != 0;
#else
  return !_mm256_testz_si256(flags, flags);
#endif
}

// Of lanes that are unsigned numbers of 8 or 32 bits.
WARPSTEP_FN Flags are_8_bits_at_least(Vector x, Vector least) {
#ifdef __AVX512BW__
  return _mm512_cmpge_epu8_mask(x, least);
#else
  return _mm256_cmpeq_epi8(_mm256_max_epu8(x, least), x);
#endif
}
WARPSTEP_FN Flags are_32_bits_at_least(Vector x, Vector least) {
#ifdef __AVX512BW__
  return _mm512_cmpge_epu32_mask(x, least);
#else
  return _mm256_cmpeq_epi32(_mm256_max_epu32(x, least), x);
#endif
}
// Where one of two is NaN.
WARPSTEP_FN Flags are_nan(Floats x, Floats y) {
#ifdef __AVX512BW__
  return _mm512_cmp_ps_mask(x.lanes, y.lanes, _CMP_UNORD_Q);
#else
  return _mm256_castps_si256(_mm256_cmp_ps(x.lanes, y.lanes, _CMP_UNORD_Q));
#endif
}

// In lanes of 16 bits: x + y where x has a bit of `mask`, else x. The mask must be without the
// uppermost bit, which AVX2's instruction takes for a sign.
WARPSTEP_FN Vector added_where_any(Vector x, Vector mask, Vector y) {
#ifdef __AVX512BW__
  return _mm512_mask_add_epi16(x, _mm512_test_epi16_mask(x, mask), x, y);
#else
  return _mm256_add_epi16(x, _mm256_sign_epi16(y, _mm256_and_si256(x, mask)));
#endif
}

// ---- Choices

// The first's bits where the mask has ones, else the second's.
WARPSTEP_FN Vector by_mask(Vector mask, Vector first, Vector second) {
#ifdef __AVX512BW__
  constexpr int kBySelector = 0xca;
  return _mm512_ternarylogic_epi32(mask, first, second, kBySelector);
#else
  return _mm256_or_si256(_mm256_and_si256(mask, first), _mm256_andnot_si256(mask, second));
#endif
}

// The upper halves of 32-bit lanes: those of `lower` below those of `upper`. And the lower ones.
WARPSTEP_FN Vector upper_halves(Vector lower, Vector upper) {
#ifdef __AVX512BW__  // in one instruction, which does the choice as well
  alignas(16) static constexpr std::uint8_t kDown[] = {2,  3,  2,  3,  6,  7,  6,  7,
                                                       10, 11, 10, 11, 14, 15, 14, 15};
  return _mm512_mask_shuffle_epi8(upper, 0x3333333333333333u, lower, in_each_128(kDown));
#else
  return _mm256_blend_epi16(_mm256_srli_epi32(lower, 16), upper, 0xaa);
#endif
}
WARPSTEP_FN Vector lower_halves(Vector lower, Vector upper) {
#ifdef __AVX512BW__
  alignas(16) static constexpr std::uint8_t kUp[] = {0, 1, 0, 1, 4,  5,  4,  5,
                                                     8, 9, 8, 9, 12, 13, 12, 13};
  return _mm512_mask_shuffle_epi8(lower, 0xccccccccccccccccu, upper, in_each_128(kUp));
#else
  return _mm256_blend_epi16(lower, _mm256_slli_epi32(upper, 16), 0xaa);
#endif
}
// Of 32 bits: the even lanes of `lower`, and beside each that of `upper`.
WARPSTEP_FN Vector side_by_side(Vector lower, Vector upper) {
#ifdef __AVX512BW__
  return reinterpret_cast<__m512i>(_mm512_mask_moveldup_ps(reinterpret_cast<__m512>(lower), 0xaaaa,
                                                           reinterpret_cast<__m512>(upper)));
#else
  return _mm256_blend_epi32(lower, _mm256_slli_epi64(upper, 32), 0xaa);
#endif
}

// ---- Orders

// Lanes of 16 bits: the vector's halves in turn.
WARPSTEP_FN Vector interleaved(Vector x) {
#ifdef __AVX512BW__
  alignas(64) static constexpr std::uint16_t kOrder[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), x);
#else
  alignas(16) static constexpr std::uint8_t kOrder[] = {0, 1, 8,  9,  2, 3, 10, 11,
                                                        4, 5, 12, 13, 6, 7, 14, 15};
  return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(x, 0xd8), in_each_128(kOrder));
#endif
}

// Lanes of 64 bits: the first of each 128 bits, then the second.
WARPSTEP_FN Vector firsts_then_seconds(Vector x) {
#ifdef __AVX512BW__
  alignas(64) static constexpr std::uint64_t kOrder[] = {0, 2, 4, 6, 1, 3, 5, 7};
  return _mm512_permutexvar_epi64(_mm512_load_si512(kOrder), x);
#else
  return _mm256_permute4x64_epi64(x, 0xd8);
#endif
}

// Two vectors of float32 from memory: the even elements, and the odd ones.
struct EvenAndOdd {
  Vector even, odd;

  WARPSTEP_FN static EvenAndOdd load(const float* from) {
    const Vector first = load_vector(from), second = load_vector(from + kSimdBytes / 4);
#ifdef __AVX512BW__
    alignas(64) static constexpr std::int32_t kEven[] = {0,  2,  4,  6,  8,  10, 12, 14,
                                                         16, 18, 20, 22, 24, 26, 28, 30};
    alignas(64) static constexpr std::int32_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                        17, 19, 21, 23, 25, 27, 29, 31};
    return {_mm512_permutex2var_epi32(first, _mm512_load_si512(kEven), second),
            _mm512_permutex2var_epi32(first, _mm512_load_si512(kOdd), second)};
#else
    const auto picked = [&](auto which) {
      const __m256 lanes = _mm256_shuffle_ps(_mm256_castsi256_ps(first),
                                             _mm256_castsi256_ps(second), decltype(which)::value);
      return _mm256_permute4x64_epi64(_mm256_castps_si256(lanes), 0xd8);
    };
    return {picked(std::integral_constant<int, 0x88>{}),
            picked(std::integral_constant<int, 0xdd>{})};
#endif
  }
  WARPSTEP_FN void store(float* to) const {
#ifdef __AVX512BW__
    alignas(64) static constexpr std::int32_t kFirst[] = {0, 16, 1, 17, 2, 18, 3, 19,
                                                          4, 20, 5, 21, 6, 22, 7, 23};
    alignas(64) static constexpr std::int32_t kSecond[] = {8,  24, 9,  25, 10, 26, 11, 27,
                                                           12, 28, 13, 29, 14, 30, 15, 31};
    store_vector(to, _mm512_permutex2var_epi32(even, _mm512_load_si512(kFirst), odd));
    store_vector(to + 16, _mm512_permutex2var_epi32(even, _mm512_load_si512(kSecond), odd));
#else
    const __m256i lower = _mm256_unpacklo_epi32(even, odd);
    const __m256i upper = _mm256_unpackhi_epi32(even, odd);
    store_vector(to, _mm256_permute2x128_si256(lower, upper, 0x20));
    store_vector(to + 8, _mm256_permute2x128_si256(lower, upper, 0x31));
#endif
  }
};

}  // namespace
}  // namespace warpstep
#endif
