// The rule of SGD with or without momentum: the update of one element, in registers.
//
//   b  <- momentum * b + (1 - dampening) * g  momentum_buffer; g itself at the first step
//   u  <- lr * b                              or, with nesterov, lr * (g + momentum * b)
//
// Without momentum there is no b, and u is lr * g.
#pragma once

#include "decay.h"

namespace warpstep {
namespace {

template <bool kMomentum>
struct Sgd {
  static constexpr RuleId id = RuleId::sgd;
  static constexpr std::uint32_t kMoments = kMomentum ? 1 : 0;            // b
  enum : std::uint32_t { kMomentumOf = kOfRule, kDampening, kNesterov };  // of Hyper::numbers

  // What the rule needs of a tensor at this step; from float64, each rounded once.
  template <class T>
  struct Constants {
    T lr;
    T kept, weight;  // of b and g in b
    T momentum;
    T nesterov;  // 1 or 0

    WARPSTEP_FN bool is_usual() const { return nesterov == 0; }
  };

  // `t` counts the steps, this one among them.
  template <class T>
  WARPSTEP_FN static Constants<T> constants_of(const Hyper& hyper, float t) {
    const double momentum = read(hyper, kMomentumOf);
    Constants<T> c;
    c.lr = static_cast<T>(read(hyper, kLr));
    c.kept = static_cast<T>(t == 1 ? 0 : momentum);
    c.weight = static_cast<T>(t == 1 ? 1 : 1 - read(hyper, kDampening));
    c.momentum = static_cast<T>(momentum);
    c.nesterov = static_cast<T>(read(hyper, kNesterov) != 0 ? 1 : 0);
    return c;
  }

  // Returns u.
  template <Part kPart, class T>
  WARPSTEP_FN static T update(const Constants<T>& c, T g, T* moments) {
    if constexpr (kMomentum) {
      T& b = moments[0];
      b = fma_of(c.weight, g, c.kept * b);
      const T ahead = fma_of(c.momentum, b, g);
      g = !is_usual(kPart) && c.nesterov != 0 ? ahead : b;
    }
    return c.lr * g;
  }
};

}  // namespace
}  // namespace warpstep
