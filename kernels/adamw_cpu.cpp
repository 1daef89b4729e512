// The CPU kernel: the rule over runs of elements, made SIMD by the compiler.
//
// Compiled once per instruction set; WARPSTEP_ISA names the copy. launch_cpu.cpp chooses one.
#include "adamw_cpu.h"

#include <algorithm>

#include "rule.h"

namespace warpstep {
namespace {

// Elements whose streams stay in the L1 cache while the parts of the tail take their turns.
constexpr std::int64_t kTile = 1024;

// The streams of one tensor from some element on.
template <class Recipe>
struct Streams {
  typename Recipe::Param* param;
  typename Recipe::Grad* grad;
  typename Recipe::Moment* exp_avg;
  typename Recipe::Moment* exp_avg_sq;
  typename Recipe::Moment* max_exp_avg_sq;
  void* ema;
};

template <class Recipe, bool kSelective>
void step_elements(const Constants<typename Recipe::Compute> constants,
                   typename Recipe::Param* __restrict param,
                   const typename Recipe::Grad* __restrict grad,
                   typename Recipe::Moment* __restrict exp_avg,
                   typename Recipe::Moment* __restrict exp_avg_sq,
                   typename Recipe::Moment* __restrict max_exp_avg_sq, std::int64_t count) {
  using T = typename Recipe::Compute;
  for (std::int64_t i = 0; i < count; ++i) {
    Moments<T> moments{load(exp_avg[i]), load(exp_avg_sq[i]), T(0)};
    if constexpr (Recipe::amsgrad) moments.max_exp_avg_sq = load(max_exp_avg_sq[i]);
    const T result = adamw_rule<Recipe::amsgrad, kSelective>(constants, load(param[i]),
                                                             T(load(grad[i])), moments);
    store(result, param[i]);
    store(moments.exp_avg, exp_avg[i]);
    store(moments.exp_avg_sq, exp_avg_sq[i]);
    if constexpr (Recipe::amsgrad) store(moments.max_exp_avg_sq, max_exp_avg_sq[i]);
  }
}

template <class Recipe>
void step_elements(const Constants<typename Recipe::Compute>& constants, const Streams<Recipe>& at,
                   std::int64_t count) {
  const auto step =
      is_selective(constants.form) ? step_elements<Recipe, true> : step_elements<Recipe, false>;
  step(constants, at.param, at.grad, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq, count);
}

template <class T, class Param, class Ema>
void average_elements(const Constants<T> constants, const Param* __restrict param,
                      Ema* __restrict ema, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    store(lerp(T(load(ema[i])), load(param[i]), constants.ema_weight, constants.ema_kept), ema[i]);
  }
}

// The sum of squares of value(0), ..., value(count - 1). Kept as many sums side by side, so that it
// is SIMD code with the same bits on every machine.
constexpr std::int64_t kLanes = 64;
template <class T>
struct Lanes {
  T sums[kLanes] = {};

  template <class Value>
  WARPSTEP_FN void add_squares(std::int64_t count, Value&& value) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (std::int64_t k = 0; k < kLanes; ++k) {
        const T x = value(i + k);
        sums[k] = fma_of(x, x, sums[k]);
      }
    }
    for (std::int64_t k = 0; i + k < count; ++k) {
      const T x = value(i + k);
      sums[k] = fma_of(x, x, sums[k]);
    }
  }
  double total() const {
    double halves[kLanes];
    for (std::int64_t k = 0; k < kLanes; ++k) halves[k] = sums[k];
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::int64_t k = 0; k < half; ++k) halves[k] += halves[k + half];
    }
    return halves[0];
  }
};

template <class Value>
WARPSTEP_FN double exact_sum_of_squares(std::int64_t count, Value&& value) {
  Lanes<double> lanes;
  lanes.add_squares(count, [&](std::int64_t i) { return static_cast<double>(value(i)); });
  return lanes.total();
}

// Of a tile: in T, at most 17 roundings of it off; in float64 where squares leave T's range.
template <class Value>
WARPSTEP_FN double sum_of_squares(std::int64_t count, Value&& value) {
  using T = decltype(value(std::int64_t{0}));
  Lanes<T> lanes;
  lanes.add_squares(count, value);
  const double total = lanes.total();
  if (sizeof(T) == 8 || (total > 1e-25 && total < 1e38)) return total;
  return exact_sum_of_squares(count, value);
}

// The sums of Tail::statistics over one chunk.
struct Statistics {
  double grad = 0, param = 0, change = 0;
  std::int64_t not_finite = 0;
};

template <class Grad>
void count_gradients(Statistics& sums, const Grad* __restrict grad, std::int64_t count) {
  const double squares = sum_of_squares(count, [&](std::int64_t i) { return load(grad[i]); });
  sums.grad += squares;
  if (is_finite(squares)) return;
  for (std::int64_t i = 0; i < count; ++i) sums.not_finite += !is_finite(load(grad[i]));
}

template <class Param, class T>
void count_parameters(Statistics& sums, const Param* __restrict param, const T* __restrict before,
                      std::int64_t count) {
  sums.param += sum_of_squares(count, [&](std::int64_t i) { return load(param[i]); });
  sums.change += sum_of_squares(count, [&](std::int64_t i) { return load(param[i]) - before[i]; });
}

template <class Recipe>
void step_tile(const Constants<typename Recipe::Compute>& constants, const Tail& tail, bool taken,
               const Streams<Recipe>& at, std::int64_t count, Statistics& sums) {
  using T = typename Recipe::Compute;
  using Param = typename Recipe::Param;
  using Grad = typename Recipe::Grad;
  T before[kTile];
  if (tail.statistics != nullptr) {
    count_gradients(sums, at.grad, count);
    for (std::int64_t i = 0; i < count; ++i) before[i] = load(at.param[i]);
  }
  if (taken) {
    step_elements(constants, at, count);
    if (tail.has_ema && tail.ema == Param::format) {
      average_elements(constants, at.param, static_cast<Param*>(at.ema), count);
    } else if (tail.has_ema) {
      average_elements(constants, at.param, static_cast<float32*>(at.ema), count);
    }
  }
  if (tail.statistics != nullptr) count_parameters(sums, at.param, before, count);
  if (tail.grads_after == GradsAfter::zeroed) {
    std::memset(static_cast<void*>(at.grad), 0, count * sizeof(Grad));
  } else if (tail.grads_after == GradsAfter::unscaled && taken) {
    using G = typename Grad::Compute;
    const G unscale = static_cast<G>(constants.unscale);
    for (std::int64_t i = 0; i < count; ++i) store(load(at.grad[i]) * unscale, at.grad[i]);
  }
}

template <class Recipe>
void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
  using T = typename Recipe::Compute;
  using Moment = typename Recipe::Moment;
  const Tail& tail = launch.tail;
  const bool taken = is_taken(tail);
  const bool whole =
      taken && !tail.has_ema && tail.statistics == nullptr && tail.grads_after == GradsAfter::kept;
  Constants<T> constants{};
  std::uint32_t group = ~0u;  // of which `constants` are
  float step = 0;

  for (std::uint32_t i = first; i < last; ++i) {
    const Chunk chunk = launch.chunks[i];
    double* const statistics =
        tail.statistics != nullptr ? tail.statistics + i * kStatistics : nullptr;
    void* const grad = launch.grads[chunk.tensor];
    if (grad == nullptr) {
      if (statistics != nullptr) {
        std::fill_n(statistics, kStatistics, 0.0);
        statistics[3] = -1;
      }
      continue;
    }
    const TensorRow& row = launch.rows[chunk.tensor];
    if (row.group != group || *row.step != step) {
      group = row.group;
      step = *row.step;
      constants = constants_of<T>(launch.hypers[group], step, tail);
    }
    const ChunkRange range = chunk_range(row, chunk.index, kCpuChunk);
    const auto streams_at = [&](std::int64_t element) {
      const auto at = [&](auto* stream) { return stream + element; };
      const std::size_t ema_bytes = tail.has_ema ? element * bytes_of(tail.ema) : 0;
      return Streams<Recipe>{
          at(static_cast<typename Recipe::Param*>(row.param)),
          at(static_cast<typename Recipe::Grad*>(grad)),
          at(static_cast<Moment*>(row.exp_avg)),
          at(static_cast<Moment*>(row.exp_avg_sq)),
          Recipe::amsgrad ? at(static_cast<Moment*>(row.max_exp_avg_sq)) : nullptr,
          static_cast<char*>(row.ema) + ema_bytes};
    };
    if (whole) {
      step_elements(constants, streams_at(range.begin), range.end - range.begin);
      continue;
    }
    Statistics sums;
    for (std::int64_t at = range.begin; at < range.end; at += kTile) {
      step_tile(constants, tail, taken, streams_at(at), min_of(kTile, range.end - at), sums);
    }
    if (statistics != nullptr) {
      const double unscale = constants.unscale;
      statistics[0] = sums.grad * unscale * unscale;
      statistics[1] = sums.param;
      statistics[2] = sums.change;
      statistics[3] = static_cast<double>(sums.not_finite);
    }
  }
}

template <class Format>
double norm_of(Norm kind, const Format* __restrict values, std::int64_t count) {
  if (kind == Norm::l2) {
    return exact_sum_of_squares(count, [&](std::int64_t i) { return load(values[i]); });
  }
  using T = decltype(load(*values));
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) {
      lanes[k] = maximum(lanes[k], std::fabs(load(values[i + k])));
    }
  }
  for (; i < count; ++i) lanes[0] = maximum(lanes[0], std::fabs(load(values[i])));
  T largest = 0;
  for (T lane : lanes) largest = maximum(largest, lane);
  return largest;
}

// A chunk's share of the gradients' norm: the sum of squares, or the largest magnitude.
double chunk_norm(Norm kind, const Launch& launch, std::uint32_t index) {
  const Chunk chunk = launch.chunks[index];
  const void* const grad = launch.grads[chunk.tensor];
  if (grad == nullptr) return 0;
  const ChunkRange range = chunk_range(launch.rows[chunk.tensor], chunk.index, kCpuChunk);
  const auto of = [&](auto format) {
    using F = decltype(format);
    return norm_of(kind, static_cast<const F*>(grad) + range.begin, range.end - range.begin);
  };
  switch (launch.recipe.grad) {
    case Format::float64:
      return of(float64{});
    case Format::float32:
      return of(float32{});
    case Format::bfloat16:
      return of(bfloat16{});
    default:
      return of(float16{});
  }
}

// The yardstick for "memory-bound": the step's traffic (four streams read, three written) with next
// to no arithmetic.
void touch_streams(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                   float* __restrict exp_avg_sq, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    param[i] -= g;
    exp_avg[i] += g;
    exp_avg_sq[i] += g;
  }
}

}  // namespace

CpuKernels WARPSTEP_CPU_KERNELS(WARPSTEP_ISA)() {
  return {[](const RecipeKey& key) {
            StepChunks kernel = nullptr;
            visit_recipe(key, [&](auto recipe) { kernel = step_chunks<decltype(recipe)>; });
            return kernel;
          },
          chunk_norm, touch_streams};
}

}  // namespace warpstep
