// The step on the CPU: a rule over runs of elements, a chunk at a time.
#pragma once

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../recipes.h"
#include "ahead.h"
#include "chunks.h"
#include "numbers.h"
#include "pairs.h"

namespace warpstep {
namespace {

// Sums of a tile in T are good to some 20 roundings; where squares leave T's range they are made
// again in float64.
template <class T>
bool is_in_range(T sum) {
  return sizeof(T) == 8 ? sum > 0 : sum > T(1e-25) && sum < T(1e38);
}

// Of a run's places, halved until one is left.
template <class T>
T sum_of(T (&places)[kRun]) {
#pragma GCC unroll 6
  for (std::int64_t half = kRun / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) places[i] += places[half + i];
  }
  return places[0];
}

template <class Grad, class T>
void count_gradients(Sums& sums, const Grad* grad, T in_step, std::int64_t count) {
  if (is_in_range(in_step) && is_finite(in_step)) {
    sums.grad += in_step;
    return;
  }
  typename Grad::Compute converted[kTile] = {};
  const auto* const numbers = numbers_of(grad, count, count, converted);
  sums.grad += sum_of_squares(numbers, count, count);
  std::int64_t not_finite = 0;
  for (std::int64_t i = 0; i < count; ++i) not_finite += !is_finite(numbers[i]);
  sums.not_finite += static_cast<double>(not_finite);
}

template <class Param, class T>
void count_parameters(Sums& sums, const Param* param, T in_step, std::int64_t count) {
  if (is_in_range(in_step)) {
    sums.param += in_step;
    return;
  }
  typename Param::Compute converted[kTile] = {};
  sums.param += sum_of_squares(numbers_of(param, count, count, converted), count, count);
}

// `before` is what the parameters were.
template <class Param, class T>
void count_changes(Sums& sums, const Param* param, const T* before, T in_step, std::int64_t count) {
  if (is_in_range(in_step)) {
    sums.change += in_step;
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const double change = static_cast<double>(load(param[i])) - static_cast<double>(before[i]);
    sums.change += change * change;
  }
}

// What is done to the elements of a recipe.
template <class Recipe>
struct Stepper;

template <class Rule, class Param, class Grad, class... Moment>
struct Stepper<Recipe<Rule, Param, Grad, Moment...>> {
  using T = typename Param::Compute;
  using C = Constants<Rule, T>;

  // The operands of one tensor from some element on.
  struct Operands {
    Param* param;
    Grad* grad;
    std::tuple<Moment*...> moments;
    void* ema;
  };

  static Operands operands_at(const TensorRow& row, void* grad, Format ema, std::int64_t element) {
    std::uint32_t next = kMoment;
    return {static_cast<Param*>(row.operands[kParam]) + element,
            static_cast<Grad*>(grad) + element,
            {static_cast<Moment*>(row.operands[next++]) + element...},
            static_cast<char*>(row.operands[kEma]) + element * bytes_of(ema)};
  }

  // Returns the parameter as it was.
  template <Part kPart>
  WARPSTEP_FN static T step_element(const C& c, Param& param, const Grad& grad,
                                    Moment&... moments) {
    T numbers[] = {load(moments)..., T(0)};
    const T before = load(param);
    store(stepped<Rule, kPart>(c, before, T(load(grad)), numbers), param);
    [[maybe_unused]] std::uint32_t next = 0;
    (store(numbers[next++], moments), ...);
    return before;
  }

  template <Part kPart>
  static void step_elements(const C c, std::int64_t count, std::int64_t left, Param* param,
                            const Grad* grad, Moment*... moments) {
    const auto step = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
    // Operands do not overlap.
#pragma GCC ivdep
      for (std::int64_t i = from; i < to; ++i) {
        step_element<kPart>(c, param[i], grad[i], moments[i]...);
      }
    };
    in_runs(light_loops_ask, 0, count, left, step, param, grad, moments...);
  }

  template <Part kPart>
  static void step_part(const C& c, const Operands& at, std::int64_t count, std::int64_t left) {
    const auto step = [&](Moment*... moments) {
      if constexpr ((std::is_same_v<Param, bfloat16> && std::is_same_v<Grad, bfloat16>) &&
                    (std::is_same_v<Moment, bfloat16> && ...)) {
        step_pairs<Rule, kPart>(c, count, left, Halves{at.param}, Halves{at.grad},
                                Halves{moments}...);
      } else {
        step_elements<kPart>(c, count, left, at.param, at.grad, moments...);
      }
    };
    std::apply(step, at.moments);
  }

  // `count` elements, of `left` that the tensor has from there on.
  static void step(const C& c, const Operands& at, std::int64_t count, std::int64_t left) {
    return c.is_usual() ? step_part<Part::usual>(c, at, count, left)
                        : step_part<Part::whole>(c, at, count, left);
  }

  // Steps a tile and counts on the way, so that the counting hides behind the divisions. Each place
  // in a run has its own sums, which makes SIMD code with the same bits for every instruction set.
  template <Part kPart>
  static void step_and_count(const C c, std::int64_t count, std::int64_t left, Sums& sums,
                             Param* param, Grad* grad, Moment*... moments) {
    T grads[kRun] = {}, params[kRun] = {}, changes[kRun] = {};
    T all_before[kTile];
    const auto step = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (std::int64_t i = from; i < to; ++i) {
        const T before = step_element<kPart>(c, param[i], grad[i], moments[i]...);
        const T g = T(load(grad[i]));
        const T after = load(param[i]);
        all_before[i] = before;
        grads[i - from] += g * g;
        params[i - from] += after * after;
        changes[i - from] += (after - before) * (after - before);
      }
    };
    in_runs(light_loops_ask, 0, count, left, step, param, grad, moments...);
    count_changes(sums, param, all_before, sum_of(changes), count);
    count_gradients(sums, grad, sum_of(grads), count);
    count_parameters(sums, param, sum_of(params), count);
  }

  static void step_tile(const C& c, const Tail& tail, Format ema, bool taken, const Operands& at,
                        std::int64_t count, std::int64_t left, Sums& sums) {
    if (tail.statistics != nullptr && taken) {
      const auto step = c.is_usual() ? step_and_count<Part::usual> : step_and_count<Part::whole>;
      std::apply(
          [&](Moment*... moments) { step(c, count, left, sums, at.param, at.grad, moments...); },
          at.moments);
    } else if (tail.statistics != nullptr) {
      count_gradients(sums, at.grad, T(0), count);
      count_parameters(sums, at.param, T(0), count);
    } else if (taken) {
      step(c, at, count, left);
    }
    if (taken && ema == Param::format) {
      average(c.tail, at.param, static_cast<Param*>(at.ema), count, left);
    } else if (taken && ema != Format::none) {
      average(c.tail, at.param, static_cast<float32*>(at.ema), count, left);
    }
    if (tail.grads_after == GradsAfter::zeroed) {
      std::memset(static_cast<void*>(at.grad), 0, count * sizeof(Grad));
    } else if (leaves_unscaled(tail, taken)) {
      using G = typename Grad::Compute;
      const G left = static_cast<G>(c.tail.grad_left);
      for (std::int64_t i = 0; i < count; ++i) store(load(at.grad[i]) * left, at.grad[i]);
    }
  }

  template <class Ema>
  static void average(const TailConstants<T> c, const Param* param, Ema* ema, std::int64_t count,
                      std::int64_t left) {
    const auto average = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (std::int64_t i = from; i < to; ++i) {
        store(averaged(c, T(load(ema[i])), load(param[i])), ema[i]);
      }
    };
    in_runs(light_loops_ask, 0, count, left, average, ema);
  }
};

// The kernel of a recipe.
template <class Recipe>
void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
  using Rule = typename Recipe::Rule;
  using T = typename Recipe::Compute;
  const Tail& tail = launch.tail;
  const Format ema = launch.recipe.formats[kEma];
  const bool taken = is_taken(tail);
  const bool is_plain = only_steps(launch);
  for_chunks<Rule, T>(launch, first, last, [&](const auto& c, const ChunkOf& of, Sums& sums) {
    const auto operands_at = [&](std::int64_t element) {
      return Stepper<Recipe>::operands_at(of.row, of.grad, ema, element);
    };
    const auto [begin, end] = of.range;
    const std::int64_t numel = of.row.numel;
    if (is_plain) {
      return Stepper<Recipe>::step(c, operands_at(begin), end - begin, numel - begin);
    }
    for (std::int64_t at = begin; at < end; at += kTile) {
      const std::int64_t count = min_of(kTile, end - at);
      Stepper<Recipe>::step_tile(c, tail, ema, taken, operands_at(at), count, numel - at, sums);
    }
  });
}

}  // namespace
}  // namespace warpstep
