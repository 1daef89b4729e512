// The rule: AdamW (and Adam with coupled decay) of one element, in registers. Host and device.
//
//   g  <- grad * grad_factor                              clip_coef / grad_scale; minus to maximize
//   g  <- g + weight_decay * p                            Decay::coupled only
//   m  <- m + (1 - beta1) * (g - m)                       exp_avg
//   v  <- (v - (1 - beta2) * v) + (1 - beta2) * g * g     exp_avg_sq
//   u  <- step_size * m / (sqrt(v) + eps_hat)
//   p  <- p - (decay * d + u)
//
// with step_size = lr * sqrt(1 - beta2^t) / (1 - beta1^t) and eps_hat = eps * sqrt(1 - beta2^t),
// which is torch's p - lr * mhat / (sqrt(vhat) + eps) with one division less. Under amsgrad
// the running maximum of v takes its place.
// Where eps_hat would be subnormal it is torch's form, all of it times a scale that keeps m / eps
// in range: step_size = scale * lr / (1 - beta1^t), eps_hat = scale * eps, and sqrt(v) is
// multiplied by root_scale = scale / sqrt(1 - beta2^t), which otherwise is 1.
//
//   Decay          decay                          d
//   coupled        0                              (Adam with L2)
//   decoupled      lr * weight_decay              p        (AdamW as torch has it)
//   independent    lr / base_lr * weight_decay    p        (the schedule's multiple alone)
//   l1             lr * weight_decay              sign(p)
//   cautious       lr * weight_decay              p, or 0 where u and p differ in sign
//
// NOTE [the same bits everywhere]
// CPU and CUDA give the same bits because nothing here is left to a compiler or a libm: fused
// multiply-adds are spelled, division and square root are IEEE's, contraction is off in the build,
// and powers are products and roots. Constants are worked out in float64 and rounded once.
//
// NOTE [every number that torch takes]
// torch checks hyper-parameters at construction only: schedules overshoot, groups are edited. So
// here there is a result for every one of them and for every step counter, with torch's NaNs and
// infinities: those of its fused kernel, since its other forms raise at a division by zero. But for
// one: an infinite p with lr * weight_decay of 1 or more, which torch multiplies by zero or less,
// is what an infinite p is otherwise; to follow there, too, took 10% of Part::whole.
//
// NOTE [why these forms]
// v - (1 - beta2) * v and not beta2 * v, because float32 rounds 0.999 by 1.3e-8, which is 1.3e-5 of
// 1 - beta2: the weights of v and g^2 would then not add up to one, and v would be off by that.
// The decay joins the update in one subtraction, because 1 - lr * weight_decay in float32 is 1 for
// lr * weight_decay below 3e-8: a separate multiplication would lose the decay.
#pragma once

#include <cmath>

#include "formats.h"

namespace warpstep {
namespace {

// What the rule needs of a tensor at this step; from float64, each rounded once.
template <class T>
struct Constants {
  T grad_factor;
  T grad_left;      // the same to minimize: of a gradient that is left unscaled
  T coupled_decay;  // weight_decay if coupled, else 0
  T decay;          // of the table above
  T step_size;
  T eps_hat;
  T root_scale;
  T weight1, weight2;  // 1 - beta1, 1 - beta2
  T beta1, beta2;
  T unscale;       // 1 / grad_scale
  T ema_weight;    // 1 - ema_decay; 1 at the first step, which begins the average
  T ema_kept;      // 1 - ema_weight
  T l1, cautious;  // 1 where that is the form of decay, else 0

  WARPSTEP_FN bool is_usual() const {
    return coupled_decay == 0 && l1 + cautious == 0 && std::fabs(weight1) < T(0.5) &&
           weight2 < T(0.5) && root_scale == 1;
  }
};

// How much of the rule a kernel can do; what it leaves out would be computed to no effect.
enum class Part {
  usual,    // where Constants::is_usual()
  uniform,  // where the decay is neither l1 nor cautious
  whole
};

template <class T>
struct Moments {
  T exp_avg;
  T exp_avg_sq;
  T max_exp_avg_sq;
};

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

WARPSTEP_FN double read(const Scalar& scalar, std::uint8_t kind) {
  if (kind == Scalar::float32_address) return *static_cast<const float*>(scalar.address);
  if (kind == Scalar::float64_address) return *static_cast<const double*>(scalar.address);
  return scalar.value;
}

// Whether parameters are stepped at all.
WARPSTEP_FN bool is_taken(const Tail& tail) {
  return tail.found_inf == nullptr || *tail.found_inf == 0;
}

WARPSTEP_FN bool leaves_unscaled(const Tail& tail, bool taken) {
  return tail.grads_after == GradsAfter::unscaled ||
         (tail.grads_after == GradsAfter::unscaled_if_taken && taken);
}

WARPSTEP_FN bool is_selective(Decay decay) {
  return decay == Decay::l1 || decay == Decay::cautious;
}

WARPSTEP_FN constexpr double least_normal(float) { return 0x1p-126; }
WARPSTEP_FN constexpr double least_normal(double) { return 0x1p-1022; }

// `step` is what a tensor's counter says: any float32.
template <class T>
WARPSTEP_FN Constants<T> constants_of(const Hyper& hyper, float step, const Tail& tail) {
  const double lr = read(hyper.lr, hyper.lr_kind);
  const double beta1 = read(hyper.beta1, hyper.beta1_kind);
  const double beta2 = read(hyper.beta2, hyper.beta2_kind);
  const double unscale = tail.grad_scale != nullptr ? 1.0 / *tail.grad_scale : 1;
  const double clip_coef = tail.clip_coef != nullptr ? *tail.clip_coef : 1;
  const float t = tail.steps_advanced ? step : step + 1;
  double powers[2] = {beta1, beta2};
  raise(powers, t);
  const double bias_correction1 = 1 - powers[0];
  const double bias_correction2_sqrt = std::sqrt(1 - powers[1]);
  const double ema_decay = t == 1 ? 0 : hyper.ema_decay;
  const bool decays = hyper.decay != Decay::coupled && hyper.weight_decay != 0;  // no inf * 0
  const double decay = decays ? lr * hyper.weight_decay : 0;
  const double eps_hat = hyper.eps * bias_correction2_sqrt;
  const double eps = static_cast<T>(hyper.eps);  // as torch adds it to a T
  const bool scales_root = eps != 0 && std::fabs(eps_hat) < least_normal(T());
  constexpr double kScale = 0x1p48;

  Constants<T> c;
  c.grad_left = static_cast<T>(clip_coef * unscale);
  c.grad_factor = hyper.maximize ? -c.grad_left : c.grad_left;
  c.coupled_decay = static_cast<T>(hyper.decay == Decay::coupled ? hyper.weight_decay : 0);
  c.decay = static_cast<T>(decay);
  c.step_size =
      static_cast<T>(lr / bias_correction1 * (scales_root ? kScale : bias_correction2_sqrt));
  c.eps_hat = static_cast<T>(scales_root ? eps * kScale : eps_hat);
  c.root_scale = static_cast<T>(scales_root ? kScale / bias_correction2_sqrt : 1);
  c.weight1 = static_cast<T>(1 - beta1);
  c.weight2 = static_cast<T>(1 - beta2);
  c.beta1 = static_cast<T>(beta1);
  c.beta2 = static_cast<T>(beta2);
  c.unscale = static_cast<T>(unscale);
  c.ema_weight = static_cast<T>(1 - ema_decay);
  c.ema_kept = static_cast<T>(ema_decay);
  c.l1 = hyper.decay == Decay::l1 ? 1 : 0;
  c.cautious = hyper.decay == Decay::cautious ? 1 : 0;
  return c;
}

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

// What the decay takes from: d in the table above. No branches, so that loops become SIMD code.
template <class T>
WARPSTEP_FN T decay_of(const Constants<T>& c, T param, T update) {
  const T sign = (param > 0 ? T(1) : T(0)) - (param < 0 ? T(1) : T(0));
  const T kept = c.cautious * sign * update < 0 ? T(0) : finite_or_zero(param);
  return c.l1 != 0 ? sign : kept;
}

template <bool kAmsgrad, Part kPart, class T>
WARPSTEP_FN T adamw_rule(const Constants<T>& c, T param, T grad, Moments<T>& moments) {
  constexpr bool kUsual = kPart == Part::usual;
  T g = grad * c.grad_factor;
  if (!kUsual && c.coupled_decay != 0) g = fma_of(c.coupled_decay, param, g);

  T& m = moments.exp_avg;
  T& v = moments.exp_avg_sq;
  m = lerp(m, g, c.weight1, c.beta1, kUsual || std::fabs(c.weight1) < T(0.5));
  const T kept =
      kUsual || c.weight2 < T(0.5) ? fma_of(-c.weight2, finite_or_zero(v), v) : c.beta2 * v;
  v = fma_of(c.weight2 * g, g, kept);
  T peak = v;
  if (kAmsgrad) peak = moments.max_exp_avg_sq = maximum(moments.max_exp_avg_sq, v);

  const T root = square_root(peak);
  const T denominator = kUsual ? root + c.eps_hat : fma_of(root, c.root_scale, c.eps_hat);
  const T update = c.step_size * divide(m, denominator);
  const T d = kPart == Part::whole ? decay_of(c, param, update) : finite_or_zero(param);
  return param - fma_of(c.decay, d, update);
}

}  // namespace
}  // namespace warpstep
