// The CUDA launcher, for callers that know no CUDA.
#pragma once

#include <cstddef>

#include "tables.h"

namespace warpstep {

constexpr std::uint32_t kCudaThreads = 256;

// Elements of a chunk, which one block takes, of a launch on so many: as large as leaves a launch
// about a thousand blocks, some for each multiprocessor of any GPU, but not so small that working
// out the constants would show. A function of the sizes alone, not of the GPU: the norm's bits
// depend on how gradients are cut, and are to be the same everywhere. A multiple of every vector.
constexpr std::uint32_t kCudaChunkLeast = 2048;  // eight elements a thread
constexpr std::uint32_t kCudaChunkMost = 16384;
constexpr std::int64_t kCudaBlocksWanted = 1024;

constexpr std::uint32_t cuda_chunk_size(std::int64_t elements) {
  std::uint32_t size = kCudaChunkMost;
  while (size > kCudaChunkLeast && elements / size < kCudaBlocksWanted) size /= 2;
  return size;
}

// Device memory that a plan holds, filled when it is made.
struct CudaTables {
  const void* rows;    // TensorRow[tensors]
  const void* chunks;  // Chunk[chunk_count]
  void* arrivals;      // uint32[tensors], zeros; every launch leaves them zero
  const void* hypers;  // Hyper[groups], where cuda_needs_hyper_table says so
};

struct CudaResult {
  int error;               // a cudaError_t
  std::uint32_t launches;  // kernels launched
};

// Enqueues the step on `stream` of `device`. Neither waits nor allocates.
CudaResult adamw_cuda(const Launch& launch, const CudaTables& tables, int device, void* stream);

// Enqueues the norm of all gradients. `norm` is double[2 + chunk_count] on the device, zeros on
// entry: the sum of squares, or the largest magnitude, comes first; the rest is scratch.
CudaResult grad_norm_cuda(Norm kind, const Launch& launch, const CudaTables& tables, double* norm,
                          int device, void* stream);

// Whether the groups' hyper-parameters are too many for the arguments of one launch, so that they
// are read from device memory.
bool cuda_needs_hyper_table(std::uint32_t tensors, std::uint32_t groups);

int cuda_device_count();
bool cuda_is_capturing(void* stream);
int cuda_copy_to_device(void* to, const void* from, std::size_t bytes, int device, void* stream);
const char* cuda_error_text(int error);

}  // namespace warpstep
