// Buckets: tensors of one recipe on one device, cut into chunks and launched together. What plans
// and lists share.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cuda/launch.h"
#include "layout.h"
#include "tensor_view.h"

namespace warpstep {

struct Bucket {
  RecipeKey recipe{};
  dlpack::Device device{};  // its first tensor's
  std::vector<TensorRow> rows;
  std::vector<void*> grads;   // one a row; null where there is none at this step
  std::int64_t elements = 0;  // of all rows
  std::vector<Chunk> chunks;  // in row order
  std::uint32_t chunk_size = 0;
  std::uint64_t seed = 0;              // of random bits
  double* least = nullptr;             // Launch::least
  std::vector<std::uint32_t> batches;  // of chunks, for the CPU's threads (kernels/cpu/launch.h)

  // Adds a row of which all but `chunks` and `head` is there, and its gradient.
  void add(TensorRow row, void* grad);
  // Fills in each row's number of chunks, and the chunks and batches.
  void cut(bool for_cuda);
  Launch launch_of(const Tail& tail, const Hyper* hypers, std::size_t groups) const;
};

// How many kernels were launched since the module was loaded, by threads without the GIL, too.
struct LaunchCounts {
  std::atomic<std::uint64_t> cpu{0}, cuda{0};
};
LaunchCounts& launch_counts();

void step_on_cpu(const Bucket& bucket, const Launch& launch, int threads);
// On a stream of the bucket's device. Throws std::runtime_error for an error of CUDA's.
void step_on_cuda(const Bucket& bucket, const Launch& launch, const CudaTables& tables,
                  void* stream);
// Fills in launch.least, as least_magnitudes_cpu() does.
void least_magnitudes_on_cuda(const Bucket& bucket, const Launch& launch, const CudaTables& tables,
                              void* stream);
// The norm of the gradients, to `out`: double[2 + chunks] on the bucket's device.
void grad_norm_on_cuda(const Bucket& bucket, Norm kind, const CudaTables& tables, double* out,
                       void* stream);

}  // namespace warpstep
