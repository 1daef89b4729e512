// The smallest magnitude among a tensor's elements on the CPU, a chunk at a time: for Decay::min.
#pragma once

#include "../rules/decay.h"
#include "launch.h"
#include "numbers.h"

namespace warpstep {
namespace {

template <class F>
double least_of(const F* elements, std::int64_t count, std::int64_t left) {
  using T = typename F::Compute;
  T least = static_cast<T>(kInfinity);
  for_tiles(elements, count, left, [&](const T* numbers, std::int64_t size, std::int64_t unread) {
    least = extreme_magnitude(numbers, size, unread, least, [](T a, T b) { return minimum(a, b); });
  });
  return least;
}

// A chunk's smallest magnitude; infinity without elements, and where it is of no use.
double chunk_least(const Launch& launch, std::uint32_t index) {
  const Chunk chunk = launch.chunks[index];
  const TensorRow& row = launch.rows[chunk.tensor];
  if (launch.grads[chunk.tensor] == nullptr || !needs_least(launch.hypers[row.group])) {
    return kInfinity;
  }
  const ChunkRange range = chunk_range(row, chunk.index, kCpuChunk);
  return in_format(launch.recipe.formats[kParam], [&](auto format) {
    using F = decltype(format);
    const F* const param = static_cast<const F*>(row.operands[kParam]);
    return least_of(param + range.begin, range.end - range.begin, row.numel - range.begin);
  });
}

}  // namespace
}  // namespace warpstep
