// The CUDA launcher, for callers that know no CUDA.
#pragma once

#include <string>

#include "tables.h"

namespace warpstep {

constexpr std::uint32_t kCudaThreads = 256;
// Elements that one block takes. A multiple of every vector; small enough that a 100M-element model
// gives each multiprocessor several blocks, large enough that working out the constants does not
// show.
constexpr std::uint32_t kCudaChunk = 16384;

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

// Enqueues the step on `stream` of `device`. Neither waits nor allocates. What it is given by value
// (hyper-parameters that are numbers, gradients' addresses) a captured graph holds by value, too.
CudaResult adamw_cuda(const Launch& launch, const CudaTables& tables, int device, void* stream);

// Enqueues the norm of all gradients. `norm` is double[2 + chunk_count] on the device, zeros on
// entry: the sum of squares, or the largest magnitude, comes first; the rest is scratch.
CudaResult grad_norm_cuda(Norm kind, const Launch& launch, const CudaTables& tables, double* norm,
                          int device, void* stream);

int cuda_device_count();
// Why `device` cannot run the kernels; empty if it can. Makes its primary context.
std::string cuda_device_reason(int device);
bool cuda_is_capturing(void* stream);
const char* cuda_error_text(int error);

}  // namespace warpstep
