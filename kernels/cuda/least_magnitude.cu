// The CUDA kernel that finds tensors' smallest magnitudes, for Decay::min, in one launch.
//
// A block leaves its chunk's share; the last block of a tensor picks the smallest of its shares.
#include "../rules/decay.h"
#include "launch.cuh"

namespace warpstep {
namespace {

template <class Param>
__global__ void __launch_bounds__(kCudaThreads, 4)
    least_magnitude_kernel(const __grid_constant__ KernelArguments args) {
  using T = typename Param::Compute;
  const std::uint32_t chunk_index = args.first_chunk + blockIdx.x;
  const Chunk chunk = args.chunks[chunk_index];
  const TensorRow row = args.rows[chunk.tensor];
  if (grad_of(args, chunk.tensor) == nullptr || !needs_least(hyper_of(args, row.group))) return;

  const ChunkRange range = chunk_range(row, chunk.index, args.chunk_size);
  const Param* const at = in_global_memory<const Param>(row.operands[kParam]) + range.begin;
  const T share = share_of(
      at, static_cast<std::uint32_t>(range.end - range.begin), static_cast<T>(kInfinity),
      [](T x) { return std::fabs(x); }, [](T a, T b) { return minimum(a, b); });
  const auto smaller = [](double a, double b) { return minimum(a, b); };
  const double least = combine_block(share, smaller);
  if (row.chunks == 1) {
    if (threadIdx.x == 0) args.least[chunk.tensor] = least;
    return;
  }

  double* const shares = args.least + args.tensors + chunk_index - chunk.index;  // the tensor's
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    shares[chunk.index] = least;
    std::uint32_t* const arrivals = args.arrivals + chunk.tensor;
    is_last = atomic_add_acq_rel(arrivals, 1) == row.chunks - 1;
    if (is_last) *arrivals = 0;
  }
  __syncthreads();
  if (!is_last) return;  // else every share is there to be read
  const double of_tensor = combined(shares, row.chunks, kInfinity, smaller);
  if (threadIdx.x == 0) args.least[chunk.tensor] = of_tensor;
}

}  // namespace

CudaResult least_magnitudes_cuda(const Launch& launch, const CudaTables& tables, void* stream) {
  Arguments args{};
  args.rows = static_cast<const TensorRow*>(tables.rows);
  args.chunks = static_cast<const Chunk*>(tables.chunks);
  args.arrivals = static_cast<std::uint32_t*>(tables.arrivals);
  const Kernel kernel = in_format(launch.recipe.formats[kParam], [](auto format) -> Kernel {
    return least_magnitude_kernel<decltype(format)>;
  });
  return launch_all(kernel, args, launch, true, static_cast<cudaStream_t>(stream));
}

}  // namespace warpstep
