// Stands in for the compiler's header: the intrinsics of AVX-512 that kernels/cpu/ uses, a lane at
// a time in plain C++, from what Intel's manual says that they do. With it the blocks of AVX-512
// are compared with tiles (tests/emulation/blocks.cpp) on machines that have none.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef long long __m128i __attribute__((vector_size(16)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));
using __mmask16 = std::uint16_t;
using __mmask32 = std::uint32_t;
using __mmask64 = std::uint64_t;

// How often a vector's roots were taken: who steps by vectors and who does not.
inline long vectors_of_roots = 0;

namespace lanes {

using std::int16_t, std::int32_t, std::int8_t;
using std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t;

template <class T>
struct Of {
  static constexpr int kCount = 64 / sizeof(T);
  T lane[kCount];

  Of() = default;
  template <class V>
  Of(V vector) {
    static_assert(sizeof(vector) == sizeof(lane), "a vector");
    std::memcpy(lane, &vector, sizeof(lane));
  }
  template <class V>
  V as() const {
    V vector;
    std::memcpy(&vector, lane, sizeof(vector));
    return vector;
  }
};

// Each lane is of(its number).
template <class T, class F>
__m512i each(F of) {
  Of<T> result;
  for (int i = 0; i < Of<T>::kCount; ++i) result.lane[i] = static_cast<T>(of(i));
  return result.template as<__m512i>();
}
// Of two vectors' lanes.
template <class T, class F>
__m512i each_of(__m512i x, __m512i y, F of) {
  const Of<T> a(x), b(y);
  return each<T>([&](int i) { return of(a.lane[i], b.lane[i]); });
}
template <class T, class F>
std::uint64_t where(__m512i x, __m512i y, F is_so) {
  const Of<T> a(x), b(y);
  std::uint64_t mask = 0;
  for (int i = 0; i < Of<T>::kCount; ++i) mask |= std::uint64_t{is_so(a.lane[i], b.lane[i])} << i;
  return mask;
}

// In each 128 bits the lanes of one, then those of the other, in half the bits.
template <class To, class From>
__m512i packed(__m512i x, __m512i y, long least, long most) {
  constexpr int kIn128 = 16 / sizeof(From);
  const Of<From> a(x), b(y);
  return each<To>([&](int i) {
    const int in_128 = i % (2 * kIn128), first = i / (2 * kIn128) * kIn128;
    const long number = in_128 < kIn128 ? a.lane[first + in_128] : b.lane[first + in_128 - kIn128];
    return number < least ? least : number > most ? most : number;
  });
}

}  // namespace lanes

// ---- Memory, constants

inline __m512i _mm512_loadu_si512(const void* from) {
  __m512i x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline __m512i _mm512_load_si512(const void* from) { return _mm512_loadu_si512(from); }
inline void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof(x)); }
inline __m128i _mm_load_si128(const __m128i* from) { return *from; }
inline __m512i _mm512_broadcast_i32x4(__m128i x) {
  __m512i all;
  for (int i = 0; i < 4; ++i) std::memcpy(reinterpret_cast<char*>(&all) + 16 * i, &x, 16);
  return all;
}
inline __m512i _mm512_set1_epi16(short x) {
  return lanes::each<std::int16_t>([&](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) {
  return lanes::each<std::int32_t>([&](int) { return x; });
}
inline __m512i _mm512_set1_epi64(long long x) { return __m512i{} + x; }
inline __m512 _mm512_set1_ps(float x) { return __m512{} + x; }

// ---- Arithmetic

#define WARPSTEP_EACH(name, T, expression)                               \
  inline __m512i _mm512_##name(__m512i x, __m512i y) {                   \
    return lanes::each_of<T>(x, y, [](T a, T b) { return expression; }); \
  }
WARPSTEP_EACH(add_epi16, std::uint16_t, a + b)
WARPSTEP_EACH(add_epi32, std::uint32_t, a + b)
WARPSTEP_EACH(sub_epi16, std::uint16_t, a - b)
WARPSTEP_EACH(sub_epi32, std::uint32_t, a - b)
WARPSTEP_EACH(min_epu8, std::uint8_t, a < b ? a : b)
WARPSTEP_EACH(max_epu8, std::uint8_t, a > b ? a : b)
WARPSTEP_EACH(max_epu16, std::uint16_t, a > b ? a : b)
WARPSTEP_EACH(max_epu32, std::uint32_t, a > b ? a : b)
WARPSTEP_EACH(mul_epu32, std::uint64_t, (a & 0xffffffffu) * (b & 0xffffffffu))
WARPSTEP_EACH(and_si512, std::uint64_t, a& b)
WARPSTEP_EACH(or_si512, std::uint64_t, a | b)
WARPSTEP_EACH(xor_si512, std::uint64_t, a ^ b)
#undef WARPSTEP_EACH

#define WARPSTEP_SHIFT(name, T, operation)                                  \
  inline __m512i _mm512_##name(__m512i x, unsigned by) {                    \
    return lanes::each_of<T>(x, x, [&](T a, T) { return a operation by; }); \
  }
WARPSTEP_SHIFT(slli_epi16, std::uint16_t, <<)
WARPSTEP_SHIFT(srli_epi16, std::uint16_t, >>)
WARPSTEP_SHIFT(srai_epi16, std::int16_t, >>)
WARPSTEP_SHIFT(slli_epi32, std::uint32_t, <<)
WARPSTEP_SHIFT(srli_epi32, std::uint32_t, >>)
WARPSTEP_SHIFT(srai_epi32, std::int32_t, >>)
#undef WARPSTEP_SHIFT

inline __m512i _mm512_madd_epi16(__m512i x, __m512i y) {
  const lanes::Of<std::int16_t> a(x), b(y);
  return lanes::each<std::int32_t>(
      [&](int i) { return a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
  ++vectors_of_roots;
  for (int i = 0; i < 16; ++i) a[i] = std::sqrt(a[i]);
  return a;
}

// ---- Conditions and choices

constexpr int _CMP_UNORD_Q = 3;
inline __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (x[i] != x[i] || y[i] != y[i]) << i;
  return mask;
}
inline __mmask64 _mm512_cmpge_epu8_mask(__m512i x, __m512i y) {
  return lanes::where<std::uint8_t>(x, y, [](auto a, auto b) { return a >= b; });
}
inline __mmask16 _mm512_cmpge_epu32_mask(__m512i x, __m512i y) {
  return lanes::where<std::uint32_t>(x, y, [](auto a, auto b) { return a >= b; });
}
inline __mmask32 _mm512_test_epi16_mask(__m512i x, __m512i y) {
  return lanes::where<std::uint16_t>(x, y, [](auto a, auto b) { return (a & b) != 0; });
}
template <class T>
__m512i blended(std::uint64_t mask, __m512i x, __m512i y) {
  const lanes::Of<T> a(x), b(y);
  return lanes::each<T>([&](int i) { return mask >> i & 1 ? b.lane[i] : a.lane[i]; });
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i x, __m512i y) {
  return blended<std::uint32_t>(mask, x, y);
}
inline __m512i _mm512_mask_add_epi16(__m512i from, __mmask32 mask, __m512i x, __m512i y) {
  return blended<std::uint16_t>(mask, from, _mm512_add_epi16(x, y));
}
inline __m512 _mm512_mask_moveldup_ps(__m512 from, __mmask16 mask, __m512 x) {
  const lanes::Of<std::uint32_t> a(from), b(x);
  lanes::Of<std::uint32_t> result;
  for (int i = 0; i < 16; ++i) result.lane[i] = mask >> i & 1 ? b.lane[i & ~1] : a.lane[i];
  return result.as<__m512>();
}
inline __m512i _mm512_ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int table) {
  const lanes::Of<std::uint64_t> a(x), b(y), c(z);
  return lanes::each<std::uint64_t>([&](int i) {
    std::uint64_t result = 0;
    for (int bit = 0; bit < 64; ++bit) {
      const auto of = [&](const lanes::Of<std::uint64_t>& v) { return v.lane[i] >> bit & 1; };
      const std::uint64_t row = of(a) << 2 | of(b) << 1 | of(c);
      result |= static_cast<std::uint64_t>(table >> row & 1) << bit;
    }
    return result;
  });
}

// ---- Orders

inline __m512i _mm512_packs_epi32(__m512i x, __m512i y) {
  return lanes::packed<std::int16_t, std::int32_t>(x, y, -32768, 32767);
}
inline __m512i _mm512_packs_epi16(__m512i x, __m512i y) {
  return lanes::packed<std::int8_t, std::int16_t>(x, y, -128, 127);
}
inline __m512i _mm512_packus_epi16(__m512i x, __m512i y) {
  return lanes::packed<std::uint8_t, std::int16_t>(x, y, 0, 255);
}
inline __m512i _mm512_unpacklo_epi64(__m512i x, __m512i y) {
  const lanes::Of<std::uint64_t> a(x), b(y);
  return lanes::each<std::uint64_t>([&](int i) { return i % 2 ? b.lane[i - 1] : a.lane[i]; });
}
inline __m512i _mm512_unpackhi_epi64(__m512i x, __m512i y) {
  const lanes::Of<std::uint64_t> a(x), b(y);
  return lanes::each<std::uint64_t>([&](int i) { return i % 2 ? b.lane[i] : a.lane[i + 1]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i order, __m512i x) {
  const lanes::Of<std::uint16_t> from(order), a(x);
  return lanes::each<std::uint16_t>([&](int i) { return a.lane[from.lane[i] % 32]; });
}
inline __m512i _mm512_permutexvar_epi64(__m512i order, __m512i x) {
  const lanes::Of<std::uint64_t> from(order), a(x);
  return lanes::each<std::uint64_t>([&](int i) { return a.lane[from.lane[i] % 8]; });
}
inline __m512i _mm512_permutex2var_epi32(__m512i x, __m512i order, __m512i y) {
  const lanes::Of<std::uint32_t> from(order), a(x), b(y);
  return lanes::each<std::uint32_t>([&](int i) {
    return from.lane[i] & 16 ? b.lane[from.lane[i] % 16] : a.lane[from.lane[i] % 16];
  });
}
inline __m512i _mm512_shuffle_epi8(__m512i x, __m512i order) {
  const lanes::Of<std::uint8_t> a(x), from(order);
  return lanes::each<std::uint8_t>(
      [&](int i) { return from.lane[i] & 0x80 ? 0 : a.lane[i / 16 * 16 + from.lane[i] % 16]; });
}
inline __m512i _mm512_mask_shuffle_epi8(__m512i from, __mmask64 mask, __m512i x, __m512i order) {
  return blended<std::uint8_t>(mask, from, _mm512_shuffle_epi8(x, order));
}
constexpr int _MM_PERM_CDAB = 0xb1;
inline __m512i _mm512_shuffle_epi32(__m512i x, int order) {
  const lanes::Of<std::uint32_t> a(x);
  return lanes::each<std::uint32_t>(
      [&](int i) { return a.lane[i / 4 * 4 + (order >> 2 * (i % 4) & 3)]; });
}
inline __m512i _mm512_shuffle_i64x2(__m512i x, __m512i y, int order) {
  const lanes::Of<std::uint64_t> a(x), b(y);
  return lanes::each<std::uint64_t>([&](int i) {
    const int from = 2 * (order >> i / 2 * 2 & 3) + i % 2;
    return i < 4 ? a.lane[from] : b.lane[from];
  });
}
