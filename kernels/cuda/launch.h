// The CUDA launcher, for callers that know no CUDA. Where there is none, none.cpp stands in.
//
// What takes a stream or a device wants that device to be the current one.
#pragma once

#include <string>

#include "../layout.h"

namespace warpstep {

// Elements of a chunk, which one block takes, of a launch on so many: as large as leaves a launch
// about a thousand blocks, some for each multiprocessor of any GPU, but not so small that working
// out the constants would show. A function of the sizes alone, not of the GPU: the norm's bits
// depend on how gradients are cut, and are to be the same everywhere. A multiple of every vector.
constexpr std::uint32_t kCudaChunkLeast = 2048;
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
};

struct CudaResult {
  int error;               // a cudaError_t
  std::uint32_t launches;  // kernels launched
};

// Enqueues the step on `stream`. Neither waits nor allocates. What it is given by value
// (hyper-parameters that are numbers, gradients' addresses) a captured graph holds by value, too.
CudaResult step_cuda(const Launch& launch, const CudaTables& tables, void* stream);

// Enqueues the norm of all gradients. `norm` is double[2 + chunk_count] on the device, zeros on
// entry: the sum of squares, or the largest magnitude, comes first; the rest is scratch.
CudaResult grad_norm_cuda(Norm kind, const Launch& launch, const CudaTables& tables, double* norm,
                          void* stream);

// Enqueues what fills in launch.least.
CudaResult least_magnitudes_cuda(const Launch& launch, const CudaTables& tables, void* stream);

// What the kernels were compiled for ("90-real 120"), and the type of the devices they run on:
// "cuda"; "cpu" in the tests' build for the host. Null without kernels; then there is a reason why.
const char* cuda_architectures();
const char* cuda_device_type();
const char* why_no_cuda();

int cuda_device_count();
int cuda_current_device();
// Why `device` cannot run the kernels; empty if it can. Makes its primary context.
std::string cuda_device_reason(int device);
bool cuda_is_capturing(void* stream);
const char* cuda_error_text(int error);

}  // namespace warpstep
