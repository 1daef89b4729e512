// Weight decay, in forms that there are with every rule. With p the parameter and u its update:
//
//   g  <- g + weight_decay * p     coupled only; then the rule works out u
//   p  <- p - (decay * d + u)
//
//   Decay          decay                          d
//   coupled        0                              (Adam, or SGD, with L2)
//   decoupled      lr * weight_decay              p        (AdamW as torch has it)
//   independent    lr / base_lr * weight_decay    p        (the schedule's multiple alone)
//   l1             lr * weight_decay              sign(p)
//   cautious       lr * weight_decay              p, or 0 where u and p differ in sign
//   l1l2           lr * weight_decay / 2          p + sign(p)
//   min            lr * least                     sign(p)
//
// where least is the smallest magnitude in p's tensor before the step, NaN if any element is. With
// any form a weight_decay of 0 means no decay, and that is all that `min` asks of weight_decay.
//
// NOTE [why the decay joins the update]
// In one subtraction, because 1 - lr * weight_decay in float32 is 1 for lr * weight_decay below
// 3e-8: a separate multiplication would lose the decay.
#pragma once

#include "../arithmetic.h"

namespace warpstep {
namespace {

// How much of a step a kernel can do; what it leaves out would be computed to no effect.
enum class Part {
  // As `finite`. The caller asks the rule's InRange about what came out, and steps again by another
  // part where the answer is no.
  in_range,
  // As `usual`, for inputs that are all finite and a finite `decay`: no check keeps infinities
  // apart. An input that is not finite yields a right result, a NaN in the parameter, or a moment
  // that the caller finds unstorable. In the last two cases the caller steps again by another part.
  finite,
  usual,    // where is_usual() of DecayConstants and of the rule's constants
  uniform,  // where the decay is none that is_selective()
  whole
};
WARPSTEP_FN constexpr bool is_usual(Part part) {
  return part == Part::in_range || part == Part::finite || part == Part::usual;
}

// x; in its place 0 if it is not finite, unless the part does not provide for that.
template <Part kPart, class T>
WARPSTEP_FN T finite_in(T x) {
  if constexpr (kPart == Part::in_range || kPart == Part::finite) {
    return x;
  } else {
    return finite_or_zero(x);
  }
}

template <class T>
struct DecayConstants {
  T coupled;   // weight_decay if coupled, else 0
  T decay;     // of the table above
  T kept;      // 1 where d has p, else 0
  T sign;      // 1 where d has sign(p), else -0: what it adds then changes no zero
  T cautious;  // 1 where that is the form, else 0

  WARPSTEP_FN bool is_usual() const {
    return coupled == 0 && kept == 1 && sign == 0 && cautious == 0;
  }
};

// A number of a group: its own, or what stands at its address.
WARPSTEP_FN double read(const Hyper& hyper, std::uint32_t number) {
  const Scalar& scalar = hyper.numbers[number];
  if (hyper.kinds[number] == Scalar::float32_address) {
    return *static_cast<const float*>(scalar.address);
  }
  if (hyper.kinds[number] == Scalar::float64_address) {
    return *static_cast<const double*>(scalar.address);
  }
  return scalar.value;
}

WARPSTEP_FN bool is_selective(Decay decay) {
  return decay == Decay::l1 || decay == Decay::cautious || decay == Decay::l1l2 ||
         decay == Decay::min;
}

// Whether the tensors' smallest magnitudes have to be found before the step.
WARPSTEP_FN bool needs_least(const Hyper& hyper) {
  return hyper.decay == Decay::min && read(hyper, kWeightDecay) != 0;
}

// `least`: of the tensor, where the group needs_least().
template <class T>
WARPSTEP_FN DecayConstants<T> decay_of(const Hyper& hyper, double least) {
  const double weight_decay = read(hyper, kWeightDecay);
  const bool is_coupled = hyper.decay == Decay::coupled;
  const bool decays = !is_coupled && weight_decay != 0;  // no inf * 0
  DecayConstants<T> c;
  c.coupled = static_cast<T>(is_coupled ? weight_decay : 0);
  const double factor = hyper.decay == Decay::l1l2  ? weight_decay / 2
                        : hyper.decay == Decay::min ? least
                                                    : weight_decay;
  c.decay = static_cast<T>(decays ? read(hyper, kLr) * factor : 0);
  const bool is_sign = hyper.decay == Decay::l1 || hyper.decay == Decay::min;
  c.kept = is_sign ? 0 : 1;
  c.sign = is_sign || hyper.decay == Decay::l1l2 ? T(1) : T(-0.0);
  c.cautious = hyper.decay == Decay::cautious ? 1 : 0;
  return c;
}

// The gradient with a coupled decay.
template <class T>
WARPSTEP_FN T with_coupled(const DecayConstants<T>& c, T param, T grad) {
  const T coupled = fma_of(c.coupled, param, grad);
  return c.coupled != 0 ? coupled : grad;
}

// The parameter after the step. No branches, and no choice by a constant, which compilers make one:
// loops become SIMD code. Products with 1 and 0 are exact.
template <Part kPart, class T>
WARPSTEP_FN T decayed(const DecayConstants<T>& c, T param, T update) {
  T d = finite_in<kPart>(param);
  if constexpr (kPart == Part::whole) {
    const T sign = (param > 0 ? T(1) : T(0)) - (param < 0 ? T(1) : T(0));
    const T kept = c.cautious * sign * update < 0 ? T(0) : d;
    d = fma_of(c.sign, sign, c.kept * kept);
  }
  return param - fma_of(c.decay, d, update);
}

}  // namespace
}  // namespace warpstep
