// What a block does for its chunk in every kernel of the step: the step counter, the constants of
// the chunk's tensor, its statistics.
#pragma once

#include "../tail.h"
#include "launch.cuh"

namespace warpstep {

// The step through tiles (tiles.cu).
CudaResult step_tiles_cuda(const Launch& launch, const CudaTables& tables, bool with_tail,
                           void* stream);

namespace {

// Reads the step counter; the last of the tensor's blocks to have read it advances it. All of them
// have read it by then: their reads come before their arrivals, and the last arrival before the
// write.
__device__ __forceinline__ float take_step(const TensorRow& row, std::uint32_t* arrivals) {
  const float step = *row.step;
  if (row.chunks == 1) {
    *row.step = step + 1;
  } else if (atomic_add_acq_rel(arrivals, 1) == row.chunks - 1) {
    *arrivals = 0;
    *row.step = step + 1;
  }
  return step;
}

// The addresses of one tensor's operands, null where there is none.
struct Operands {
  void* at[kOperands];

  __device__ __forceinline__ Operands(const TensorRow& row, void* grad) {
#pragma unroll
    for (std::uint32_t k = 0; k < kStable; ++k) at[k] = in_global_memory<void>(row.operands[k]);
    at[kGrad] = in_global_memory<void>(grad);
  }
  template <class F>
  __device__ __forceinline__ F* of(std::uint32_t operand) const {
    return static_cast<F*>(at[operand]);
  }
};

// Which operands are at a 16-byte boundary; also those that are not there.
struct Aligned {
  bool operands[kOperands];

  __device__ __forceinline__ bool all() const {
    bool all = true;
#pragma unroll
    for (bool one : operands) all = all && one;
    return all;
  }
};
WARPSTEP_FN constexpr Aligned all_aligned() {
  Aligned aligned{};
  for (bool& one : aligned.operands) one = true;
  return aligned;
}

// The chunk of a block.
struct BlockChunk {
  std::int64_t begin;  // its first element
  std::uint32_t size;  // its elements, of which the first `head` come before the vectors
  std::uint32_t head;
  bool taken;                  // whether the step is
  const volatile float& step;  // what the tensor's counter says, this step among them
};

// Unless there is nothing to do, calls with every thread of the block walk(prepared, constants,
// chunk, sums), where prepared = prepare(row, grad, begin). That reads what it needs of the row, in
// one wait for memory with the rest; what it leaves in shared memory, all threads see.
template <class Rule, class T, bool kTail, class Prepare, class Walk>
__device__ __forceinline__ void step_chunk(const Arguments& args, Prepare&& prepare, Walk&& walk) {
  const Tail& tail = args.tail;
  const std::uint32_t chunk_index = args.first_chunk + blockIdx.x;
  const Chunk chunk = args.chunks[chunk_index];
  const auto statistics = [&] {
    return tail.statistics + std::uint64_t{args.first_chunk + blockIdx.x} * kStatistics;
  };
  const bool counts = kTail && tail.statistics != nullptr;
  void* const grad = grad_of(args, chunk.tensor);
  if (grad == nullptr) {
    if (counts && threadIdx.x == 0) leave_none(statistics());
    return;
  }
  const bool taken = is_taken(tail);
  if (!kTail && !taken) return;
  const TensorRow& row = args.rows[chunk.tensor];
  const ChunkRange range = chunk_range(row, chunk.index, args.chunk_size);
  const std::uint32_t size = static_cast<std::uint32_t>(range.end - range.begin);
  const std::uint32_t head = chunk.index == 0 ? min_of(row.head, size) : 0;
  const auto prepared = prepare(row, grad, range.begin);

  __shared__ Constants<Rule, T> shared_constants;
  __shared__ float shared_step;
  if (threadIdx.x == 0) {
    const Hyper hyper = hyper_of(args, row.group);  // whole: no load waits for another
    const bool takes = taken && !tail.steps_advanced;
    const float step = row.step == nullptr ? kUncounted
                       : takes             ? take_step(row, args.arrivals + chunk.tensor)
                                           : *row.step;
    const bool has_least = kTail && args.least != nullptr;
    const double least = has_least ? args.least[chunk.tensor] : 0;
    shared_constants = constants_of<Rule, T>(hyper, step, least, tail);
    shared_step = t_of(tail, step);
  }
  __syncthreads();
  const Constants<Rule, T> constants = shared_constants;

  Sums sums{};
  walk(prepared, constants, BlockChunk{range.begin, size, head, taken, shared_step}, sums);

  if (counts) {
    const double unscale = shared_constants.tail.unscale;  // in no register until now
    if (!taken) sums.change = 0;                           // and not infinity less itself
    const Sums totals{sum_block(sums.grad), sum_block(sums.param), sum_block(sums.change),
                      sum_block(sums.not_finite)};
    if (threadIdx.x == 0) totals.leave(statistics(), unscale);
  }
}

// Launches a kernel of the step.
CudaResult launch_step(Kernel kernel, const Launch& launch, const CudaTables& tables,
                       void* stream) {
  Arguments args{};
  args.rows = static_cast<const TensorRow*>(tables.rows);
  args.chunks = static_cast<const Chunk*>(tables.chunks);
  args.arrivals = static_cast<std::uint32_t*>(tables.arrivals);
  args.tail = launch.tail;
  args.keys = Keys(launch.seed);
  std::memcpy(args.formats, launch.recipe.formats, sizeof(args.formats));
  const bool needs_grads = launch.tail.statistics == nullptr;  // else there is none to be noted
  return launch_all(kernel, args, launch, needs_grads, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace warpstep
