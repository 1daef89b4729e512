// The CUDA kernel of the gradients' norm: every gradient of a recipe read once, in one launch.
//
// A block leaves its chunk's share; the last block adds the shares up in their order, so that the
// result has the same bits each time. Sums are in float64.
#include "launch.cuh"

namespace warpstep {
namespace {

template <class Combine>
__device__ __forceinline__ void finish(const Arguments& args, double share, Combine&& combine) {
  double* const shares = args.norm + 2;
  std::uint32_t* const done = reinterpret_cast<std::uint32_t*>(args.norm + 1);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    shares[args.first_chunk + blockIdx.x] = share;
    is_last = atomic_add_acq_rel(done, 1) == args.chunk_count - 1;
  }
  __syncthreads();
  if (!is_last) return;  // else every share is there to be read
  const double total = combined(shares, args.chunk_count, 0, combine);
  if (threadIdx.x == 0) args.norm[0] = total;
}

template <class Grad, class Term, class Combine>
__device__ __forceinline__ void norm_of_chunk(const Arguments& args, Term&& term,
                                              Combine&& combine) {
  const Chunk chunk = args.chunks[args.first_chunk + blockIdx.x];
  const TensorRow row = args.rows[chunk.tensor];
  void* const grad = grad_of(args, chunk.tensor);
  double share = 0;
  if (grad != nullptr) {
    const ChunkRange range = chunk_range(row, chunk.index, args.chunk_size);
    const Grad* const at = in_global_memory<const Grad>(grad) + range.begin;
    share = share_of(at, static_cast<std::uint32_t>(range.end - range.begin), share, term, combine);
  }
  finish(args, combine_block(share, combine), combine);
}

template <class Grad>
__global__ void __launch_bounds__(kCudaThreads, 4)
    grad_norm_kernel(const __grid_constant__ KernelArguments args) {
  if (args.norm_kind == Norm::l2) {
    norm_of_chunk<Grad>(
        args, [](double x) { return x * x; }, [](double a, double b) { return a + b; });
  } else {
    norm_of_chunk<Grad>(
        args, [](double x) { return x < 0 ? -x : x; },
        [](double a, double b) { return maximum(a, b); });
  }
}

}  // namespace

CudaResult grad_norm_cuda(Norm kind, const Launch& launch, const CudaTables& tables, double* norm,
                          void* stream) {
  Arguments args{};
  args.rows = static_cast<const TensorRow*>(tables.rows);
  args.chunks = static_cast<const Chunk*>(tables.chunks);
  args.norm = norm;
  args.norm_kind = kind;
  args.chunk_count = launch.chunk_count;
  const Kernel kernel = in_format(launch.recipe.formats[kGrad], [](auto format) -> Kernel {
    return grad_norm_kernel<decltype(format)>;
  });
  return launch_all(kernel, args, launch, false, static_cast<cudaStream_t>(stream));
}

}  // namespace warpstep
