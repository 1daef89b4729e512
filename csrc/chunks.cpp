// Cutting a tensor table into chunks and batches: see chunks.h.
#include "chunks.h"

#include <algorithm>

#include "adamw_cpu.h"
#include "adamw_cuda.h"

namespace warpstep {

std::uint32_t head_of(const TensorRow& row, const RecipeKey& recipe) {
  const struct {
    const void* address;
    std::uint32_t element;
  } streams[] = {{row.param, bytes_of(recipe.param)},
                 {row.exp_avg, bytes_of(recipe.moment)},
                 {row.exp_avg_sq, bytes_of(recipe.moment)}};
  std::uint32_t best = 0, best_votes = 0;
  for (std::uint32_t head = 0; head < 8; ++head) {
    std::uint32_t votes = 0;
    for (const auto& stream : streams) {
      votes += (reinterpret_cast<std::uintptr_t>(stream.address) + head * stream.element) % 16 == 0;
    }
    if (votes > best_votes) {
      best = head;
      best_votes = votes;
    }
    if (votes == std::size(streams)) break;
  }
  return best;
}

std::uint32_t cut_chunks(std::vector<TensorRow>& rows, bool for_cuda, std::vector<Chunk>& chunks,
                         std::vector<std::uint32_t>& batches) {
  std::int64_t total = 0, elements = 0;
  for (const TensorRow& row : rows) {
    total += std::max(row.numel, kCpuChunkLeast);
    elements += row.numel;
  }
  const std::int64_t chunk_size = for_cuda ? cuda_chunk_size(elements) : kCpuChunk;
  const std::int64_t batch = std::clamp(total / kCpuBatches, kCpuBatchMin, kCpuBatchMax);
  std::int64_t in_batch = batch;
  for (std::uint32_t tensor = 0; tensor < rows.size(); ++tensor) {
    TensorRow& row = rows[tensor];
    row.chunks = count_chunks(row.numel, row.head, chunk_size);
    for (std::uint32_t index = 0; index < row.chunks; ++index) {
      if (in_batch >= batch) {
        batches.push_back(static_cast<std::uint32_t>(chunks.size()));
        in_batch = 0;
      }
      in_batch += std::clamp(row.numel, kCpuChunkLeast, chunk_size);
      chunks.push_back({tensor, index});
    }
  }
  batches.push_back(static_cast<std::uint32_t>(chunks.size()));
  return static_cast<std::uint32_t>(chunk_size);
}

}  // namespace warpstep
