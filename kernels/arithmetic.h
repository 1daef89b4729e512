// Arithmetic on numbers in registers: the same bits from every compiler and machine.
//
// NOTE [the same bits everywhere]
// CPU and CUDA give the same bits because nothing here is left to a compiler or a libm: fused
// multiply-adds are spelled, division and square root are IEEE's, contraction is off in the build,
// and powers are products and roots. Constants are worked out in float64 and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "layout.h"

// NOTE [one copy per instruction set]
// The CPU kernels are compiled once per instruction set. Everything here, in formats.h, tail.h and
// rules/ therefore has internal linkage: otherwise the linker would keep one copy of each inline
// function, perhaps the AVX-512 one, for all of them.
namespace warpstep {
namespace {

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
