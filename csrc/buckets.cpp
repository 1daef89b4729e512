// Cutting buckets into chunks and batches, and launching them: see buckets.h.
#include "buckets.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/launch.h"
#include "current_device.h"

namespace warpstep {
namespace {

// Elements before the first 16-byte boundary that most of the row's addresses share; gradients,
// whose addresses change from step to step, have no vote. Blocks, and elements that draw random
// bits together, are not parted by it.
std::uint32_t head_of(const TensorRow& row, const RecipeKey& recipe) {
  bool draws = false;
  for (const Format format : recipe.formats) {
    if (is_in_blocks(format)) return 0;
    draws |= is_stochastic(format);
  }
  if (draws) return static_cast<std::uint32_t>(-row.first & (kDrawn - 1));
  std::uint32_t best = 0, best_votes = 0;
  constexpr std::uint32_t kMostInVector = kVectorBytes / 2;  // an element has two bytes or more
  for (std::uint32_t head = 0; head < kMostInVector; ++head) {
    std::uint32_t votes = 0;  // also of what is not there: address 0, and of no bytes
    for (std::uint32_t i = 0; i < kStable; ++i) {
      const auto address = reinterpret_cast<std::uintptr_t>(row.operands[i]);
      votes += (address + head * bytes_of(recipe.formats[i])) % kVectorBytes == 0;
    }
    if (votes > best_votes) {
      best = head;
      best_votes = votes;
    }
    if (votes == kStable) break;
  }
  return best;
}

void count_cuda(const CudaResult& result) {
  launch_counts().cuda += result.launches;
  if (result.error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_text(result.error));
}

}  // namespace

LaunchCounts& launch_counts() {
  static LaunchCounts counts;
  return counts;
}

void Bucket::add(TensorRow row, void* grad) {
  row.head = head_of(row, recipe);
  rows.push_back(row);
  grads.push_back(grad);
  elements += row.numel;
}

void Bucket::cut(bool for_cuda) {
  std::int64_t work = 0;
  for (const TensorRow& row : rows) work += std::max(row.numel, kCpuChunkLeast);
  const std::int64_t size = for_cuda ? cuda_chunk_size(elements) : kCpuChunk;
  const std::int64_t batch = std::clamp(work / kCpuBatches, kCpuBatchMin, kCpuBatchMax);
  std::int64_t in_batch = batch;
  for (std::uint32_t tensor = 0; tensor < rows.size(); ++tensor) {
    TensorRow& row = rows[tensor];
    row.chunks = count_chunks(row.numel, row.head, size);
    for (std::uint32_t index = 0; index < row.chunks; ++index) {
      if (in_batch >= batch) {
        batches.push_back(static_cast<std::uint32_t>(chunks.size()));
        in_batch = 0;
      }
      in_batch += std::clamp(row.numel, kCpuChunkLeast, size);
      chunks.push_back({tensor, index});
    }
  }
  batches.push_back(static_cast<std::uint32_t>(chunks.size()));
  chunk_size = static_cast<std::uint32_t>(size);
}

Launch Bucket::launch_of(const Tail& tail, const Hyper* hypers, std::size_t groups) const {
  return {recipe,
          tail,
          rows.data(),
          grads.data(),
          static_cast<std::uint32_t>(rows.size()),
          hypers,
          static_cast<std::uint32_t>(groups),
          chunks.data(),
          static_cast<std::uint32_t>(chunks.size()),
          chunk_size,
          seed,
          least};
}

void step_on_cpu(const Bucket& bucket, const Launch& launch, int threads) {
  const auto batches = static_cast<std::uint32_t>(bucket.batches.size() - 1);
  step_cpu(launch, bucket.batches.data(), batches, threads);
  ++launch_counts().cpu;
}

void step_on_cuda(const Bucket& bucket, const Launch& launch, const CudaTables& tables,
                  void* stream) {
  const OnDevice on(bucket.device.index);
  count_cuda(step_cuda(launch, tables, stream));
}

void least_magnitudes_on_cuda(const Bucket& bucket, const Launch& launch, const CudaTables& tables,
                              void* stream) {
  const OnDevice on(bucket.device.index);
  count_cuda(least_magnitudes_cuda(launch, tables, stream));
}

void grad_norm_on_cuda(const Bucket& bucket, Norm kind, const CudaTables& tables, double* out,
                       void* stream) {
  const Launch launch = bucket.launch_of({}, nullptr, 0);  // the rule takes no part in it
  const OnDevice on(bucket.device.index);
  count_cuda(grad_norm_cuda(kind, launch, tables, out, stream));
}

}  // namespace warpstep
