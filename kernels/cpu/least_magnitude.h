// The smallest magnitude among a tensor's elements on the CPU, a chunk at a time: for Decay::min.
#pragma once

#include "../rules/decay.h"
#include "launch.h"
#include "numbers.h"

namespace warpstep {
namespace {

template <class F>
double least_of(const F* elements, std::int64_t count) {
  using T = typename F::Compute;
  T converted[kTile] = {};
  T least = static_cast<T>(kInfinity);
  for (std::int64_t at = 0; at < count; at += kTile) {
    const std::int64_t size = min_of(kTile, count - at);
    const T* const numbers = numbers_of(elements + at, size, converted);
    least = extreme_magnitude(numbers, size, least, [](T a, T b) { return minimum(a, b); });
  }
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
    return least_of(param + range.begin, range.end - range.begin);
  });
}

}  // namespace
}  // namespace warpstep
