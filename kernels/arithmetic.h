// Arithmetic on numbers in registers: the same bits from every compiler and machine.
//
// NOTE [the same bits everywhere]
// CPU and CUDA give the same bits because nothing here is left to a compiler or a libm: fused
// multiply-adds are spelled, division and square root are IEEE's, contraction is off in the build,
// and powers are products and roots. Constants are worked out in float64 and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "layout.h"

// NOTE [one copy per instruction set]
// The CPU kernels are compiled once per instruction set. Everything here, in formats.h, tail.h and
// rules/ therefore has internal linkage: otherwise the linker would keep one copy of each inline
// function, perhaps the AVX-512 one, for all of them.
namespace warpstep {
namespace {

template <class To, class From>
WARPSTEP_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

WARPSTEP_FN constexpr double least_normal(float) { return 0x1p-126; }
WARPSTEP_FN constexpr double least_normal(double) { return 0x1p-1022; }

WARPSTEP_FN float fma_of(float a, float b, float c) { return std::fma(a, b, c); }
WARPSTEP_FN double fma_of(double a, double b, double c) { return std::fma(a, b, c); }

#ifdef __CUDA_ARCH__
WARPSTEP_FN float divide(float a, float b) { return __fdiv_rn(a, b); }
WARPSTEP_FN double divide(double a, double b) { return __ddiv_rn(a, b); }
WARPSTEP_FN float square_root(float a) { return __fsqrt_rn(a); }
WARPSTEP_FN double square_root(double a) { return __dsqrt_rn(a); }
#else
template <class T>
WARPSTEP_FN T divide(T a, T b) {
  return a / b;
}
WARPSTEP_FN float square_root(float a) { return __builtin_sqrtf(a); }
WARPSTEP_FN double square_root(double a) { return __builtin_sqrt(a); }
#endif

// NOTE [in range]
// Division and root of a float32 by multiply-adds without a branch: those that nvcc emits for
// IEEE's, from the same approximations, without its test of each operand for what is out of their
// range. Whoever calls them makes sure of that range, for several elements at once.
#ifdef __CUDA_ARCH__
WARPSTEP_FN float about_reciprocal(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
WARPSTEP_FN float about_reciprocal_root(float a) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
#else
WARPSTEP_FN float about_reciprocal(float a) { return 1 / a; }
WARPSTEP_FN float about_reciprocal_root(float a) {
  return static_cast<float>(1 / __builtin_sqrt(static_cast<double>(a)));
}
#endif

// The root of 0, or of a number of at least kLeastRooted.
constexpr float kLeastRooted = 0x1p-102f;
WARPSTEP_FN float square_root_in_range(float a) {
  const float r = about_reciprocal_root(a > kLeastRooted ? a : kLeastRooted);  // 0 has none
  const float root = a * r;
  return fma_of(fma_of(-root, root, a), r * 0.5f, root);
}

// a / b, of b from kLeastDivisor to kMostDivisor, and of a that is 0 or at least kLeastDivided in
// magnitude. What is too large, or no number, comes out infinite or as NaN.
constexpr float kLeastDivisor = 0x1p-60f, kMostDivisor = 0x1p21f, kLeastDivided = 0x1p-80f;
WARPSTEP_FN float divide_in_range(float a, float b) {
  float r = about_reciprocal(b);
  r = fma_of(r, fma_of(-b, r, 1.0f), r);
  const float quotient = a * r;
  return fma_of(-fma_of(b, quotient, -a), r, quotient);  // 0 keeps its sign
}

// (1 - weight) * from + weight * to, written from the nearer end as torch.lerp is: from `from` if
// weight is below one half in magnitude.
template <class T>
WARPSTEP_FN T lerp(T from, T to, T weight, T complement, bool is_near) {
  const T difference = to - from;
  return is_near ? fma_of(weight, difference, from) : fma_of(-complement, difference, to);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
WARPSTEP_FN bool is_finite(T x) {
  return std::fabs(x) <= (sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308));
}

// x, or 0 where x is infinite or NaN: keeps inf - inf out of forms in which torch's has none.
template <class T>
WARPSTEP_FN T finite_or_zero(T x) {
  return is_finite(x) ? x : T(0);
}

// The larger, NaN if either is (as torch.maximum).
template <class T>
WARPSTEP_FN T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// The smaller, NaN if either is (as torch.minimum).
template <class T>
WARPSTEP_FN T minimum(T a, T b) {
  return a < b || a != a ? a : b;
}

// bases^exponent as pow() has it: whole exponents by squaring, parts of one by roots. Products and
// IEEE's roots only, hence the same bits on every machine. Two at a time, since each product waits
// for the one before, and a block's threads wait for all of them.
WARPSTEP_FN void raise(double (&bases)[2], double exponent) {
  constexpr double kForever = 0x1p63;  // as good as infinite: 0, 1 or infinite for every base
  const double magnitude = std::fabs(exponent);
  std::uint64_t whole =
      static_cast<std::uint64_t>(magnitude < kForever ? magnitude : kForever);  // NaN: forever
  double part = magnitude < kForever ? magnitude - static_cast<double>(whole) : 0;
  double results[2] = {1, 1};
  for (double factors[2] = {bases[0], bases[1]}; whole != 0; whole >>= 1) {
    for (int i = 0; i < 2; ++i) {
      if (whole & 1) results[i] *= factors[i];
      factors[i] *= factors[i];
    }
  }
  for (int digits = 0; part != 0 && digits < 52; ++digits) {
    part *= 2;
    for (int i = 0; i < 2; ++i) {
      bases[i] = std::sqrt(bases[i]);
      if (part >= 1) results[i] *= bases[i];
    }
    if (part >= 1) part -= 1;
  }
  for (int i = 0; i < 2; ++i) {
    bases[i] = exponent != exponent ? exponent : exponent < 0 ? 1 / results[i] : results[i];
  }
}

}  // namespace
}  // namespace warpstep
