// The step of one element: a rule, and around it the tail, which is what training loops do around
// the step. Told once for CPU and CUDA.
#pragma once

#include "rules/decay.h"

namespace warpstep {
namespace {

// What the tail needs of a tensor at this step; from float64, each rounded once.
template <class T>
struct TailConstants {
  T grad_factor;  // clip_coef / grad_scale; minus to maximize
  T grad_left;    // the same to minimize: of a gradient that is left unscaled
  T unscale;      // 1 / grad_scale
  T ema_weight;   // 1 - ema_decay; 1 at the first step, which begins the average
  T ema_kept;     // 1 - ema_weight
};

// All that is worked out once a tensor and step.
template <class Rule, class T>
struct Constants {
  typename Rule::template Constants<T> rule;
  DecayConstants<T> decay;
  TailConstants<T> tail;

  WARPSTEP_FN bool is_usual() const { return rule.is_usual() && decay.is_usual(); }
};

// What a tensor without a step counter is taken to have behind it.
constexpr float kUncounted = 1;

// Whether parameters are stepped at all.
WARPSTEP_FN bool is_taken(const Tail& tail) {
  return tail.found_inf == nullptr || *tail.found_inf == 0;
}

WARPSTEP_FN bool leaves_unscaled(const Tail& tail, bool taken) {
  return tail.grads_after == GradsAfter::unscaled ||
         (tail.grads_after == GradsAfter::unscaled_if_taken && taken);
}

// Which step it is of a tensor, this one counted. `step` is what its counter says: any float32.
WARPSTEP_FN float t_of(const Tail& tail, float step) {
  return tail.steps_advanced ? step : step + 1;
}

// `step` as above, and `least` as decay_of() takes it.
template <class Rule, class T>
WARPSTEP_FN Constants<Rule, T> constants_of(const Hyper& hyper, float step, double least,
                                            const Tail& tail) {
  const float t = t_of(tail, step);
  const double unscale = tail.grad_scale != nullptr ? 1.0 / *tail.grad_scale : 1;
  const double clip_coef = tail.clip_coef != nullptr ? *tail.clip_coef : 1;
  const double ema_decay = t == 1 ? 0 : hyper.ema_decay;

  Constants<Rule, T> c;
  c.decay = decay_of<T>(hyper, least);
  c.tail.grad_left = static_cast<T>(clip_coef * unscale);
  c.tail.grad_factor = hyper.maximize ? -c.tail.grad_left : c.tail.grad_left;
  c.tail.unscale = static_cast<T>(unscale);
  c.tail.ema_weight = static_cast<T>(1 - ema_decay);
  c.tail.ema_kept = static_cast<T>(ema_decay);
  // Last: its powers need the most registers, and what else is read of the group is done with then.
  c.rule = Rule::template constants_of<T>(hyper, t);
  return c;
}

// One element's step: the parameter after it. `grad` is as it was found.
template <class Rule, Part kPart, class T>
WARPSTEP_FN T stepped(const Constants<Rule, T>& c, T param, T grad, T* moments) {
  T g = grad * c.tail.grad_factor;
  if (!is_usual(kPart)) g = with_coupled(c.decay, param, g);
  return decayed<kPart>(c.decay, param, Rule::template update<kPart>(c.rule, g, moments));
}

// The average after the step; `param` is the parameter as it is stored.
template <class T>
WARPSTEP_FN T averaged(const TailConstants<T>& c, T average, T param) {
  return lerp(average, param, c.ema_weight, c.ema_kept, c.ema_weight < T(0.5));
}

// Sums over elements that Tail::statistics are made of.
struct Sums {
  double grad = 0, param = 0, change = 0, not_finite = 0;

  // Where a chunk's statistics are left; the gradients were summed up as they were.
  WARPSTEP_FN void leave(double* statistics, double unscale) const {
    statistics[0] = grad * unscale * unscale;
    statistics[1] = param;
    statistics[2] = change;
    statistics[3] = not_finite;
  }
};

// The statistics of a chunk that has no gradient.
WARPSTEP_FN void leave_none(double* statistics) { Sums{0, 0, 0, -1}.leave(statistics, 1); }

}  // namespace
}  // namespace warpstep
