// The CPU kernel: the rule over runs of elements, made SIMD by the compiler.
//
// Compiled once per instruction set; WARPSTEP_ISA names the copy. launch_cpu.cpp chooses one.
#include "adamw_cpu.h"

#include "rule.h"

namespace warpstep {
namespace {

template <class Recipe>
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
    const T result =
        adamw_rule<Recipe::amsgrad>(constants, load(param[i]), T(load(grad[i])), moments);
    store(result, param[i]);
    store(moments.exp_avg, exp_avg[i]);
    store(moments.exp_avg_sq, exp_avg_sq[i]);
    if constexpr (Recipe::amsgrad) store(moments.max_exp_avg_sq, max_exp_avg_sq[i]);
  }
}

template <class Recipe>
void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
  using T = typename Recipe::Compute;
  using Moment = typename Recipe::Moment;
  Constants<T> constants{};
  std::uint32_t group = ~0u;  // of which `constants` are
  float step = 0;

  for (std::uint32_t i = first; i < last; ++i) {
    const Chunk chunk = launch.chunks[i];
    const void* grad = launch.grads[chunk.tensor];
    if (grad == nullptr) continue;
    const TensorRow& row = launch.rows[chunk.tensor];
    if (row.group != group || *row.step != step) {
      group = row.group;
      step = *row.step;
      constants = constants_of<T>(launch.hypers[group], step, launch.loss_scale.grad_scale);
    }
    const ChunkRange range = chunk_range(row, chunk.index, kCpuChunk);
    const auto at = [&](auto* stream) { return stream + range.begin; };
    step_elements<Recipe>(constants, at(static_cast<typename Recipe::Param*>(row.param)),
                          at(static_cast<const typename Recipe::Grad*>(grad)),
                          at(static_cast<Moment*>(row.exp_avg)),
                          at(static_cast<Moment*>(row.exp_avg_sq)),
                          Recipe::amsgrad ? at(static_cast<Moment*>(row.max_exp_avg_sq)) : nullptr,
                          range.end - range.begin);
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
          touch_streams};
}

}  // namespace warpstep
