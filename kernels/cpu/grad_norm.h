// The gradients' norm on the CPU, a chunk at a time.
#pragma once

#include "launch.h"
#include "numbers.h"

namespace warpstep {
namespace {

template <class T>
T largest_magnitude(const T* numbers, std::int64_t count) {
  constexpr std::int64_t kLanes = 64;
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) {
      lanes[k] = maximum(lanes[k], std::fabs(numbers[i + k]));
    }
  }
  for (; i < count; ++i) lanes[0] = maximum(lanes[0], std::fabs(numbers[i]));
  T largest = 0;
  for (T lane : lanes) largest = maximum(largest, lane);
  return largest;
}

template <class F>
double norm_of(Norm kind, const F* elements, std::int64_t count) {
  using T = typename F::Compute;
  T converted[kTile] = {};
  double norm = 0;
  for (std::int64_t at = 0; at < count; at += kTile) {
    const std::int64_t size = min_of(kTile, count - at);
    const T* const numbers = numbers_of(elements + at, size, converted);
    if (kind == Norm::l2) {
      norm += sum_of_squares(numbers, size);
    } else {
      norm = maximum<double>(norm, largest_magnitude(numbers, size));
    }
  }
  return norm;
}

// A chunk's share of the gradients' norm: the sum of squares, or the largest magnitude.
double chunk_norm(Norm kind, const Launch& launch, std::uint32_t index) {
  const Chunk chunk = launch.chunks[index];
  const void* const grad = launch.grads[chunk.tensor];
  if (grad == nullptr) return 0;
  const ChunkRange range = chunk_range(launch.rows[chunk.tensor], chunk.index, kCpuChunk);
  const auto of = [&](auto format) {
    using F = decltype(format);
    return norm_of(kind, static_cast<const F*>(grad) + range.begin, range.end - range.begin);
  };
  switch (launch.recipe.formats[kGrad]) {
    case Format::float64:
      return of(float64{});
    case Format::float32:
      return of(float32{});
    case Format::bfloat16:
      return of(bfloat16{});
    default:
      return of(float16{});
  }
}

}  // namespace
}  // namespace warpstep
