// The CPU kernels, made SIMD by the compiler. Compiled once per instruction set; WARPSTEP_ISA names
// the copy. launch.cpp chooses one.
#include "grad_norm.h"
#include "launch.h"
#include "least_magnitude.h"
#include "sixteen.h"
#include "tiles.h"
#include "touch.h"

namespace warpstep {

CpuKernels WARPSTEP_CPU_KERNELS(WARPSTEP_ISA)([[maybe_unused]] bool has_bf16) {
#ifdef WARPSTEP_AVX512_BF16
  rounds_by_instruction = has_bf16;
#endif
  return {[](const RecipeKey& key) {
            StepChunks kernel = nullptr;
            visit_recipe(key, [&](auto recipe) { kernel = step_chunks<decltype(recipe)>; });
            visit_tiled(key, [&](auto rule) { kernel = step_tiles<decltype(rule)>; });
            const StepChunks in_pairs = find_in_pairs(AllInPairs{}, key);
            return in_pairs != nullptr ? in_pairs : kernel;
          },
          chunk_norm, chunk_least, touch_arrays};
}

}  // namespace warpstep
