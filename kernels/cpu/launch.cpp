// Launches the CPU kernel: chooses the instruction set, shares out the batches, counts the steps.
#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../tail.h"
#include "threads.h"

namespace warpstep {
namespace {

struct InstructionSet {
  const char* name;
  CpuKernels (*kernels)(const Processor& processor);
  bool has_bf16;
  bool supported;
};

// The widest instruction set of this machine, or the one that WARPSTEP_ISA names.
const InstructionSet& instruction_set() {
  static const InstructionSet chosen = [] {
#ifdef WARPSTEP_X86
    const bool has_avx512 = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#endif
    const InstructionSet sets[] = {
#ifdef WARPSTEP_X86
#ifdef WARPSTEP_KNOWS_AVX512_BF16
        {"avx512_bf16", cpu_kernels_avx512, true,
         has_avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
        {"avx512", cpu_kernels_avx512, false, has_avx512},
        {"avx2", cpu_kernels_avx2, false,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"baseline", cpu_kernels_baseline, false, true},
    };
    const char* wanted = std::getenv("WARPSTEP_ISA");
    const InstructionSet* widest = nullptr;
    for (const InstructionSet& set : sets) {
      if (!set.supported) continue;
      if (wanted != nullptr && std::strcmp(wanted, set.name) == 0) return set;
      if (widest == nullptr) widest = &set;
    }
    return *widest;
  }();
  return chosen;
}

const CpuKernels& kernels() {
  static const CpuKernels chosen = [] {
    Processor processor = {instruction_set().has_bf16, false};
#ifdef WARPSTEP_X86
    processor.gains_by_asking = __builtin_cpu_is("intel");
#endif
    return instruction_set().kernels(processor);
  }();
  return chosen;
}

// Calls of(i) for each chunk, and leaves what it returns in results[i].
template <class Of>
void each_chunk(const Launch& launch, double* results, int threads, Sharing& sharing, Of&& of) {
  // As many elements as a batch of the step has at most.
  constexpr std::uint32_t kPiece = kCpuBatchMax / kCpuChunk;
  const std::uint32_t pieces = (launch.chunk_count + kPiece - 1) / kPiece;
  run_on_threads(threads, pieces, sharing, [&](std::uint32_t piece) {
    const std::uint32_t last = std::min((piece + 1) * kPiece, launch.chunk_count);
    for (std::uint32_t i = piece * kPiece; i < last; ++i) results[i] = of(i);
  });
}

}  // namespace

const char* cpu_instruction_set() { return instruction_set().name; }

bool has_cpu_recipe(const RecipeKey& key) { return kernels().find(key) != nullptr; }

void step_cpu(const Launch& launch, const std::uint32_t* batches, std::uint32_t batch_count,
              int threads) {
  const Tail& tail = launch.tail;
  const bool taken = is_taken(tail);
  const bool leaves_nothing =
      tail.statistics == nullptr &&
      (tail.grads_after == GradsAfter::kept || tail.grads_after == GradsAfter::unscaled_if_taken);
  if (!taken && leaves_nothing) return;
  const StepChunks step_chunks = kernels().find(launch.recipe);

  // Which thread steps an element does not change its bits.
  if (batch_count < kCpuBatchesWorthThreads) threads = 1;
  static Sharing sharing;
  run_on_threads(threads, batch_count, sharing,
                 [&](std::uint32_t i) { step_chunks(launch, batches[i], batches[i + 1]); });

  // Every chunk has read its tensor's step counter by now.
  if (!taken || tail.steps_advanced) return;
  for (std::uint32_t tensor = 0; tensor < launch.tensors; ++tensor) {
    float* const step = launch.rows[tensor].step;
    if (launch.grads[tensor] != nullptr && step != nullptr) *step += 1;
  }
}

double grad_norm_cpu(Norm kind, const Launch& launch, double* partials, int threads) {
  static Sharing sharing;
  each_chunk(launch, partials, threads, sharing,
             [&](std::uint32_t i) { return kernels().chunk_norm(kind, launch, i); });
  double norm = 0;
  for (std::uint32_t i = 0; i < launch.chunk_count; ++i) {
    const double part = partials[i];
    norm = kind == Norm::l2 ? norm + part : maximum(norm, part);
  }
  return norm;
}

void least_magnitudes_cpu(const Launch& launch, int threads) {
  double* const shares = launch.least + launch.tensors;
  static Sharing sharing;
  each_chunk(launch, shares, threads, sharing,
             [&](std::uint32_t i) { return kernels().chunk_least(launch, i); });
  for (std::uint32_t i = 0; i < launch.chunk_count; ++i) {
    const Chunk chunk = launch.chunks[i];
    double& least = launch.least[chunk.tensor];
    least = chunk.index == 0 ? shares[i] : minimum(least, shares[i]);
  }
}

void touch_cpu(const std::vector<TouchedArrays>& tensors, int threads) {
  std::vector<TouchedArrays> runs;
  for (TouchedArrays left : tensors) {
    while (left.count > 0) {
      TouchedArrays run = left;
      run.count = std::min(kCpuBatchMax, left.count);
      runs.push_back(run);
      left = {left.a + run.count, left.read_only + run.count, left.b + run.count,
              left.c + run.count, left.count - run.count};
    }
  }
  static Sharing sharing;
  run_on_threads(threads, static_cast<std::uint32_t>(runs.size()), sharing, [&](std::uint32_t i) {
    const TouchedArrays& run = runs[i];
    kernels().touch(run.a, run.read_only, run.b, run.c, run.count);
  });
}

}  // namespace warpstep
