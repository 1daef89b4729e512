// The rule of AdamW and Adam, which decay.h tells apart: the update of one element, in registers.
//
//   m  <- m + (1 - beta1) * (g - m)                       exp_avg
//   v  <- (v - (1 - beta2) * v) + (1 - beta2) * g * g     exp_avg_sq
//   u  <- step_size * m / (sqrt(v) + eps_hat)             taken from p, beside the decay
//
// with step_size = lr * sqrt(1 - beta2^t) / (1 - beta1^t) and eps_hat = eps * sqrt(1 - beta2^t),
// which is torch's p - lr * mhat / (sqrt(vhat) + eps) with one division less. Under amsgrad
// the running maximum of v takes its place.
// Where eps_hat would be subnormal it is torch's form, all of it times a scale that keeps m / eps
// in range: step_size = scale * lr / (1 - beta1^t), eps_hat = scale * eps, and sqrt(v) is
// multiplied by root_scale = scale / sqrt(1 - beta2^t), which otherwise is 1.
//
// NOTE [every number that torch takes]
// torch checks hyper-parameters at construction only: schedules overshoot, groups are edited. So
// here there is a result for every one of them and for every step counter, with torch's NaNs and
// infinities: those of its fused kernel, since its other forms raise at a division by zero. But for
// one: an infinite p with lr * weight_decay of 1 or more, which torch multiplies by zero or less,
// is what an infinite p is otherwise; to follow there, too, took 10% of Part::whole. (And where
// lr * weight_decay is minus infinity, it becomes NaN.)
//
// NOTE [why v has this form]
// v - (1 - beta2) * v and not beta2 * v, because float32 rounds 0.999 by 1.3e-8, which is 1.3e-5 of
// 1 - beta2: the weights of v and g^2 would then not add up to one, and v would be off by that.
#pragma once

#include "decay.h"

namespace warpstep {
namespace {

template <bool kAmsgrad>
struct AdamW {
  static constexpr RuleId id = RuleId::adamw;
  static constexpr std::uint32_t kMoments = kAmsgrad ? 3 : 2;  // m, v and its running maximum
  enum : std::uint32_t { kBeta1 = kOfRule, kBeta2, kEps };     // of Hyper::numbers

  // What the rule needs of a tensor at this step; from float64, each rounded once.
  template <class T>
  struct Constants {
    T step_size;
    T eps_hat;
    T root_scale;
    T weight1, weight2;  // 1 - beta1, 1 - beta2
    T beta1, beta2;

    WARPSTEP_FN bool is_usual() const {
      return std::fabs(weight1) < T(0.5) && weight2 < T(0.5) && root_scale == 1;
    }
    // Whether Part::in_range can do where that is so.
    WARPSTEP_FN bool may_be_in_range() const {
      return eps_hat >= kLeastDivisor && eps_hat <= kMostDivisor / 2;
    }
  };

  // Whether Part::in_range did several elements right: asked once for all of them.
  //
  // Below kLeastRooted the root of v may be wrong, by less than it is. That is no matter for a v
  // below half of that where eps_hat is kRootsEnd or more: the root is less than half a unit of
  // eps_hat then, right or wrong. Without gradients an exp_avg_sq of 8 bits ends at 2^-126.
  struct InRange {
    static constexpr float kRootsEnd = 0x1p-27f, kLeastNormal = 0x1p-126f;
    static constexpr std::uint32_t kOctave = 1u << 23;
    std::uint32_t least_m = ~0u, least_v = ~0u;  // of the bits, less 1: 0 counts for nothing
    std::uint32_t above_v = ~0u;                 // of the bits, less those of half of kLeastRooted
    std::uint32_t most_v = 0;                    // of the bits: what is negative counts for most
    float finite = 0;                            // NaN if any parameter is not finite

    // The parameter and the moments after the step. Where m or v is no number, p is none.
    WARPSTEP_FN void add(float p, const float* moments) {
      const auto m = bits_as<std::uint32_t>(moments[0]) & 0x7fffffffu;
      const auto v = bits_as<std::uint32_t>(moments[1]);
      least_m = min_of(least_m, m - 1);
      least_v = min_of(least_v, v - 1);
      above_v = min_of(above_v, v - bits_as<std::uint32_t>(kLeastRooted / 2));
      most_v = max_of(most_v, v);
      finite = fma_of(p, 0.0f, finite);
    }
    WARPSTEP_FN bool are(float eps_hat) const {
      constexpr float kMost = kMostDivisor / 2;
      const float least = eps_hat >= kRootsEnd ? kLeastNormal : kLeastRooted;
      return least_m >= bits_as<std::uint32_t>(kLeastDivided) - 1 &&
             least_v >= bits_as<std::uint32_t>(least) - 1 && above_v >= kOctave &&
             most_v <= bits_as<std::uint32_t>(kMost * kMost) && finite == 0;
    }
  };

  // `t` counts the steps, this one among them: any float32.
  template <class T>
  WARPSTEP_FN static Constants<T> constants_of(const Hyper& hyper, float t) {
    const double lr = read(hyper, kLr);
    const double beta1 = read(hyper, kBeta1);
    const double beta2 = read(hyper, kBeta2);
    const double given_eps = read(hyper, kEps);
    double powers[2] = {beta1, beta2};
    raise(powers, t);
    const double bias_correction1 = 1 - powers[0];
    const double bias_correction2_sqrt = std::sqrt(1 - powers[1]);
    const double eps_hat = given_eps * bias_correction2_sqrt;
    const double eps = static_cast<T>(given_eps);  // as torch adds it to a T
    const bool scales_root = eps != 0 && std::fabs(eps_hat) < least_normal(T());
    constexpr double kScale = 0x1p48;

    Constants<T> c;
    c.step_size =
        static_cast<T>(lr / bias_correction1 * (scales_root ? kScale : bias_correction2_sqrt));
    c.eps_hat = static_cast<T>(scales_root ? eps * kScale : eps_hat);
    c.root_scale = static_cast<T>(scales_root ? kScale / bias_correction2_sqrt : 1);
    c.weight1 = static_cast<T>(1 - beta1);
    c.weight2 = static_cast<T>(1 - beta2);
    c.beta1 = static_cast<T>(beta1);
    c.beta2 = static_cast<T>(beta2);
    return c;
  }

  // Returns u.
  template <Part kPart, class T>
  WARPSTEP_FN static T update(const Constants<T>& c, T g, T* moments) {
    advance<kPart>(c, g, moments);
    return update_of<kPart>(c, moments);
  }

  // The first half of it: the moments after the step.
  template <Part kPart, class T>
  WARPSTEP_FN static void advance(const Constants<T>& c, T g, T* moments) {
    T& m = moments[0];
    T& v = moments[1];
    bool is_near = true;
    T kept = fma_of(-c.weight2, finite_in<kPart>(v), v);
    if constexpr (!is_usual(kPart)) {
      is_near = std::fabs(c.weight1) < T(0.5);
      kept = c.weight2 < T(0.5) ? kept : c.beta2 * v;
    }
    m = lerp(m, g, c.weight1, c.beta1, is_near);
    v = fma_of(c.weight2 * g, g, kept);
    if constexpr (kAmsgrad) moments[2] = maximum(moments[2], v);
  }

  // The second: u, of those.
  template <Part kPart, class T>
  WARPSTEP_FN static T update_of(const Constants<T>& c, const T* moments) {
    if constexpr (kPart == Part::in_range) {
      const T denominator = square_root_in_range(moments[kMoments - 1]) + c.eps_hat;
      return c.step_size * divide_in_range(moments[0], denominator);
    } else {
      const T root = square_root(moments[kMoments - 1]);
      const T denominator =
          is_usual(kPart) ? root + c.eps_hat : fma_of(root, c.root_scale, c.eps_hat);
      return c.step_size * divide(moments[0], denominator);
    }
  }
};

}  // namespace
}  // namespace warpstep
