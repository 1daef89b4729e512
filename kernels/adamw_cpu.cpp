// The CPU kernel: the rule over runs of elements, made SIMD by the compiler.
//
// Compiled once per instruction set; WARPSTEP_ISA names the copy. launch_cpu.cpp chooses one.
#include "adamw_cpu.h"

#include <algorithm>
#include <type_traits>

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

template <class Recipe, Part kPart>
WARPSTEP_FN typename Recipe::Compute step_element(
    const Constants<typename Recipe::Compute>& constants, typename Recipe::Param& param,
    const typename Recipe::Grad& grad, typename Recipe::Moment& exp_avg,
    typename Recipe::Moment& exp_avg_sq, typename Recipe::Moment* max_exp_avg_sq) {
  using T = typename Recipe::Compute;
  Moments<T> moments{load(exp_avg), load(exp_avg_sq), T(0)};
  if constexpr (Recipe::amsgrad) moments.max_exp_avg_sq = load(*max_exp_avg_sq);
  const T before = load(param);
  const T result = adamw_rule<Recipe::amsgrad, kPart>(constants, before, T(load(grad)), moments);
  store(result, param);
  store(moments.exp_avg, exp_avg);
  store(moments.exp_avg_sq, exp_avg_sq);
  if constexpr (Recipe::amsgrad) store(moments.max_exp_avg_sq, *max_exp_avg_sq);
  return before;
}

template <class Recipe, Part kPart>
void step_elements(const Constants<typename Recipe::Compute> constants,
                   typename Recipe::Param* __restrict param,
                   const typename Recipe::Grad* __restrict grad,
                   typename Recipe::Moment* __restrict exp_avg,
                   typename Recipe::Moment* __restrict exp_avg_sq,
                   typename Recipe::Moment* __restrict max_exp_avg_sq, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    step_element<Recipe, kPart>(constants, param[i], grad[i], exp_avg[i], exp_avg_sq[i],
                                max_exp_avg_sq + i);
  }
}

// Of streams that are all bfloat16, two elements at a time.
template <class Recipe, Part kPart>
void step_pairs(const Constants<float> constants, bfloat16* __restrict param,
                const bfloat16* __restrict grad, bfloat16* __restrict exp_avg,
                bfloat16* __restrict exp_avg_sq, bfloat16* __restrict max_exp_avg_sq,
                std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    float p[2], g[2], m[2], v[2], peak[2] = {};
    load_pair(param + i, p);
    load_pair(grad + i, g);
    load_pair(exp_avg + i, m);
    load_pair(exp_avg_sq + i, v);
    if constexpr (Recipe::amsgrad) load_pair(max_exp_avg_sq + i, peak);
    for (int k = 0; k < 2; ++k) {
      Moments<float> moments{m[k], v[k], peak[k]};
      p[k] = adamw_rule<Recipe::amsgrad, kPart>(constants, p[k], g[k], moments);
      m[k] = moments.exp_avg;
      v[k] = moments.exp_avg_sq;
      peak[k] = moments.max_exp_avg_sq;
    }
    store_pair(p, param + i);
    store_pair(m, exp_avg + i);
    store_pair(v, exp_avg_sq + i);
    if constexpr (Recipe::amsgrad) store_pair(peak, max_exp_avg_sq + i);
  }
  if (i < count) {
    step_element<Recipe, kPart>(constants, param[i], grad[i], exp_avg[i], exp_avg_sq[i],
                                max_exp_avg_sq + i);
  }
}

template <class Recipe>
void step_elements(const Constants<typename Recipe::Compute>& constants, const Streams<Recipe>& at,
                   std::int64_t count) {
  constexpr bool kPairs = std::is_same_v<typename Recipe::Param, bfloat16> &&
                          std::is_same_v<typename Recipe::Grad, bfloat16> &&
                          std::is_same_v<typename Recipe::Moment, bfloat16>;
  if constexpr (kPairs) {
    const auto step =
        constants.is_usual() ? step_pairs<Recipe, Part::usual> : step_pairs<Recipe, Part::whole>;
    step(constants, at.param, at.grad, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq, count);
  } else {
    const auto step = constants.is_usual() ? step_elements<Recipe, Part::usual>
                                           : step_elements<Recipe, Part::whole>;
    step(constants, at.param, at.grad, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq, count);
  }
}

template <class T, class Param, class Ema>
void average_elements(const Constants<T> constants, const Param* __restrict param,
                      Ema* __restrict ema, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    store(lerp(T(load(ema[i])), load(param[i]), constants.ema_weight, constants.ema_kept,
               constants.ema_weight < T(0.5)),
          ema[i]);
  }
}

// Numbers to compute with: a stream's own memory where that is their format, else converted.
template <class F>
WARPSTEP_FN const auto* numbers_of(const F* stream, std::int64_t count,
                                   typename F::Compute (&converted)[kTile]) {
  using T = typename F::Compute;
  if constexpr (sizeof(F) == sizeof(T)) {
    return reinterpret_cast<const T*>(stream);
  } else {
    for (std::int64_t i = 0; i < count; ++i) converted[i] = load(stream[i]);
    return static_cast<const T*>(converted);
  }
}

// The sum of squares in float64. Kept as many sums side by side, spelled as vectors, so that it is
// SIMD code with the same bits on every machine.
template <class T>
double sum_of_squares(const T* numbers, std::int64_t count) {
  constexpr std::int64_t kWidth = 8;
  constexpr std::int64_t kVectors = 4;
  typedef double Sums __attribute__((vector_size(kWidth * sizeof(double))));
  typedef T Numbers __attribute__((vector_size(kWidth * sizeof(T))));
  Sums sums[kVectors] = {};
  std::int64_t i = 0;
  for (; i + kVectors * kWidth <= count; i += kVectors * kWidth) {
    for (std::int64_t k = 0; k < kVectors; ++k) {
      Numbers narrow;
      std::memcpy(&narrow, numbers + i + k * kWidth, sizeof(narrow));
      const Sums wide = __builtin_convertvector(narrow, Sums);
      sums[k] += wide * wide;
    }
  }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(numbers[i]) * numbers[i];
  const Sums all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (std::int64_t k = 0; k < kWidth; ++k) total += all[k];
  return total;
}

// The sums of Tail::statistics over one chunk.
struct Statistics {
  double grad = 0, param = 0, change = 0;
  std::int64_t not_finite = 0;
};

// Sums of a tile in T are good to some 20 roundings; where squares leave T's range they are made
// again in float64.
template <class T>
bool is_in_range(T sum) {
  return sizeof(T) == 8 ? sum > 0 : sum > T(1e-25) && sum < T(1e38);
}

template <class Grad, class T>
void count_gradients(Statistics& sums, const Grad* grad, T in_step, std::int64_t count) {
  if (is_in_range(in_step) && is_finite(in_step)) {
    sums.grad += in_step;
    return;
  }
  typename Grad::Compute converted[kTile] = {};
  const auto* const numbers = numbers_of(grad, count, converted);
  sums.grad += sum_of_squares(numbers, count);
  for (std::int64_t i = 0; i < count; ++i) sums.not_finite += !is_finite(numbers[i]);
}

template <class Param, class T>
void count_parameters(Statistics& sums, const Param* param, T in_step, std::int64_t count) {
  if (is_in_range(in_step)) {
    sums.param += in_step;
    return;
  }
  typename Param::Compute converted[kTile] = {};
  sums.param += sum_of_squares(numbers_of(param, count, converted), count);
}

// Steps a tile and counts on the way, so that the counting hides behind the divisions. How many
// sums the compiler keeps side by side is the instruction set's: so are the statistics' last bits.
template <class Recipe, Part kPart>
void step_and_count(const Constants<typename Recipe::Compute> constants, const Streams<Recipe>& at,
                    std::int64_t count, Statistics& sums) {
  using T = typename Recipe::Compute;
  auto* __restrict param = at.param;
  const auto* __restrict grad = at.grad;
  auto* __restrict exp_avg = at.exp_avg;
  auto* __restrict exp_avg_sq = at.exp_avg_sq;
  auto* __restrict max_exp_avg_sq = at.max_exp_avg_sq;
  T grads = 0, params = 0, changes = 0;
#pragma omp simd reduction(+ : grads, params, changes)
  for (std::int64_t i = 0; i < count; ++i) {
    const T before = step_element<Recipe, kPart>(constants, param[i], grad[i], exp_avg[i],
                                                 exp_avg_sq[i], max_exp_avg_sq + i);
    const T g = T(load(grad[i]));
    const T after = load(param[i]);
    grads += g * g;
    params += after * after;
    changes += (after - before) * (after - before);
  }
  sums.change += changes;
  count_gradients(sums, at.grad, grads, count);
  count_parameters(sums, at.param, params, count);
}

template <class Recipe>
void step_tile(const Constants<typename Recipe::Compute>& constants, const Tail& tail, bool taken,
               const Streams<Recipe>& at, std::int64_t count, Statistics& sums) {
  using T = typename Recipe::Compute;
  using Param = typename Recipe::Param;
  using Grad = typename Recipe::Grad;
  if (tail.statistics != nullptr && taken) {
    const auto step = constants.is_usual() ? step_and_count<Recipe, Part::usual>
                                           : step_and_count<Recipe, Part::whole>;
    step(constants, at, count, sums);
  } else if (tail.statistics != nullptr) {
    count_gradients(sums, at.grad, T(0), count);
    count_parameters(sums, at.param, T(0), count);
  } else if (taken) {
    step_elements(constants, at, count);
  }
  if (taken) {
    if (tail.has_ema && tail.ema == Param::format) {
      average_elements(constants, at.param, static_cast<Param*>(at.ema), count);
    } else if (tail.has_ema) {
      average_elements(constants, at.param, static_cast<float32*>(at.ema), count);
    }
  }
  if (tail.grads_after == GradsAfter::zeroed) {
    std::memset(static_cast<void*>(at.grad), 0, count * sizeof(Grad));
  } else if (leaves_unscaled(tail, taken)) {
    using G = typename Grad::Compute;
    const G left = static_cast<G>(constants.grad_left);
    for (std::int64_t i = 0; i < count; ++i) store(load(at.grad[i]) * left, at.grad[i]);
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

template <class T>
T largest_magnitude(const T* numbers, std::int64_t count) {
  constexpr std::int64_t kLanes = 64;
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) {
      lanes[k] = maximum(lanes[k], std::fabs(numbers[i + k]));
    }
  }
  for (; i < count; ++i) lanes[0] = maximum(lanes[0], std::fabs(numbers[i]));
  T largest = 0;
  for (T lane : lanes) largest = maximum(largest, lane);
  return largest;
}

template <class F>
double norm_of(Norm kind, const F* stream, std::int64_t count) {
  using T = typename F::Compute;
  T converted[kTile] = {};
  double norm = 0;
  for (std::int64_t at = 0; at < count; at += kTile) {
    const std::int64_t size = min_of(kTile, count - at);
    const T* const numbers = numbers_of(stream + at, size, converted);
    if (kind == Norm::l2) {
      norm += sum_of_squares(numbers, size);
    } else {
      norm = maximum<double>(norm, largest_magnitude(numbers, size));
    }
  }
  return norm;
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
