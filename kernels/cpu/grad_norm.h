// The gradients' norm on the CPU, a chunk at a time.
#pragma once

#include "launch.h"
#include "numbers.h"

namespace warpstep {
namespace {

template <class F>
double norm_of(Norm kind, const F* elements, std::int64_t count, std::int64_t left) {
  using T = typename F::Compute;
  double norm = 0;
  for_tiles(elements, count, left, [&](const T* numbers, std::int64_t size, std::int64_t unread) {
    if (kind == Norm::l2) {
      norm += sum_of_squares(numbers, size, unread);
    } else {
      norm = extreme_magnitude(numbers, size, unread, static_cast<T>(norm),
                               [](T a, T b) { return maximum(a, b); });
    }
  });
  return norm;
}

// A chunk's share of the gradients' norm: the sum of squares, or the largest magnitude.
double chunk_norm(Norm kind, const Launch& launch, std::uint32_t index) {
  const Chunk chunk = launch.chunks[index];
  const void* const grad = launch.grads[chunk.tensor];
  if (grad == nullptr) return 0;
  const TensorRow& row = launch.rows[chunk.tensor];
  const ChunkRange range = chunk_range(row, chunk.index, kCpuChunk);
  return in_format(launch.recipe.formats[kGrad], [&](auto format) {
    using F = decltype(format);
    return norm_of(kind, static_cast<const F*>(grad) + range.begin, range.end - range.begin,
                   row.numel - range.begin);
  });
}

}  // namespace
}  // namespace warpstep
