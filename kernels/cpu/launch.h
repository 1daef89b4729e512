// The CPU launcher, and what it needs of the kernels' copies for each instruction set.
#pragma once

#include <vector>

#include "../layout.h"

namespace warpstep {

// Elements of a chunk: 64 KiB an operand in float32, so that a chunk's operands fit the L2 cache.
constexpr std::int64_t kCpuChunk = 16384;
// A thread takes a batch of elements at a time (several small tensors, or a run of one): about a
// 64th of all, so that threads end together, but neither so few that taking it shows nor more than
// keep the hardware's prefetching going.
constexpr std::int64_t kCpuBatches = 64;
constexpr std::int64_t kCpuBatchMin = 16384;
constexpr std::int64_t kCpuBatchMax = 262144;
// What beginning a chunk costs, in elements: a tensor counts for as many at least.
constexpr std::int64_t kCpuChunkLeast = 128;
// Fewer batches are done by one thread before others have joined it.
constexpr std::uint32_t kCpuBatchesWorthThreads = 4;

// Runs the step on all tensors with up to `threads` threads. `batches` cuts launch.chunks into runs
// of about as many elements: batch i is chunks [batches[i], batches[i + 1]).
void step_cpu(const Launch& launch, const std::uint32_t* batches, std::uint32_t batch_count,
              int threads);

// The norm of all gradients: the sum of their squares, or their largest magnitude. The same bits
// whatever the threads. `partials` has room for a number a chunk.
double grad_norm_cpu(Norm kind, const Launch& launch, double* partials, int threads);

// Fills in launch.least. The same bits whatever the threads.
void least_magnitudes_cpu(const Launch& launch, int threads);

bool has_cpu_recipe(const RecipeKey& key);

// The instruction set that was chosen on this machine.
const char* cpu_instruction_set();

// Four float32 arrays of one length, as large as a tensor's operands under AdamW.
struct TouchedArrays {
  float* a;
  const float* read_only;
  float* b;
  float* c;
  std::int64_t count;
};

// Reads the four arrays of each tensor and writes three, once. For benchmarks.
void touch_cpu(const std::vector<TouchedArrays>& tensors, int threads);

using StepChunks = void (*)(const Launch& launch, std::uint32_t first, std::uint32_t last);

struct CpuKernels {
  StepChunks (*find)(const RecipeKey& key);  // null where there is no such recipe
  double (*chunk_norm)(Norm kind, const Launch& launch, std::uint32_t index);
  double (*chunk_least)(const Launch& launch, std::uint32_t index);
  void (*touch)(float*, const float*, float*, float*, std::int64_t);
};

// Whether the compiler knows AVX512_BF16.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 10 : __GNUC__ >= 10)
#define WARPSTEP_KNOWS_AVX512_BF16
#endif

// What kernels are told of the processor.
struct Processor {
  bool has_bf16;         // they may use AVX512_BF16
  bool gains_by_asking;  // for memory ahead, in all loops (ahead.h)
};

// Each is called once, before any of its kernels runs.
#define WARPSTEP_CPU_KERNELS_(isa) cpu_kernels_##isa
#define WARPSTEP_CPU_KERNELS(isa) WARPSTEP_CPU_KERNELS_(isa)
CpuKernels cpu_kernels_baseline(const Processor& processor);
CpuKernels cpu_kernels_avx2(const Processor& processor);
CpuKernels cpu_kernels_avx512(const Processor& processor);

}  // namespace warpstep
