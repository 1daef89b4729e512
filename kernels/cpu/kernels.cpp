// The CPU kernels, made SIMD by the compiler. Compiled once per instruction set; WARPSTEP_COPY
// names the copy. launch.cpp chooses one.
#include "eight_bit.h"
#include "grad_norm.h"
#include "launch.h"
#include "least_magnitude.h"
#include "sixteen_bit.h"
#include "tiles.h"
#include "touch.h"

namespace warpstep {

CpuKernels WARPSTEP_CPU_KERNELS(WARPSTEP_COPY)(const Processor& processor) {
  light_loops_ask = processor.gains_by_asking;
#ifdef WARPSTEP_AVX512_BF16
  rounds_by_instruction = processor.has_bf16;
#endif
  return {[](const RecipeKey& key) {
            StepChunks kernel = nullptr;
            visit_recipe(key, [&](auto recipe) { kernel = step_chunks<decltype(recipe)>; });
            visit_tiled(key, [&](auto rule) { kernel = step_tiles<decltype(rule)>; });
            kernel = find_among(AllInPairs{}, key, kernel);
#ifdef WARPSTEP_HAS_VECTORS
            kernel = find_among(AllInBlocks{}, key, kernel);
#endif
            return kernel;
          },
          chunk_norm, chunk_least, touch_arrays};
}

}  // namespace warpstep
