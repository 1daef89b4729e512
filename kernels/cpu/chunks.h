// The walk of a CPU step over chunks: the constants of each one's tensor, and its statistics.
#pragma once

#include "../tail.h"
#include "launch.h"

namespace warpstep {
namespace {

// A chunk of a tensor that has a gradient.
struct ChunkOf {
  const TensorRow& row;
  void* grad;
  ChunkRange range;
  float step;  // what the tensor's counter says
};

// Whether there is nothing but a step.
inline bool only_steps(const Launch& launch) {
  const Tail& tail = launch.tail;
  return is_taken(tail) && launch.recipe.formats[kEma] == Format::none &&
         tail.statistics == nullptr && tail.grads_after == GradsAfter::kept;
}

// Calls step(constants, chunk, sums) for chunks [first, last).
template <class Rule, class T, class Step>
void for_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last, Step&& step_chunk) {
  const Tail& tail = launch.tail;
  Constants<Rule, T> constants{};
  std::uint32_t group = ~0u;  // of which `constants` are
  float step = 0;
  double least = 0;

  for (std::uint32_t i = first; i < last; ++i) {
    const Chunk chunk = launch.chunks[i];
    double* const statistics =
        tail.statistics != nullptr ? tail.statistics + i * kStatistics : nullptr;
    void* const grad = launch.grads[chunk.tensor];
    if (grad == nullptr) {
      if (statistics != nullptr) leave_none(statistics);
      continue;
    }
    const TensorRow& row = launch.rows[chunk.tensor];
    const float row_step = row.step != nullptr ? *row.step : kUncounted;
    const double row_least = launch.least != nullptr ? launch.least[chunk.tensor] : 0;
    if (row.group != group || row_step != step || row_least != least) {
      group = row.group;
      step = row_step;
      least = row_least;
      constants = constants_of<Rule, T>(launch.hypers[group], step, least, tail);
    }
    Sums sums;
    step_chunk(constants, ChunkOf{row, grad, chunk_range(row, chunk.index, kCpuChunk), step}, sums);
    if (statistics != nullptr) sums.leave(statistics, constants.tail.unscale);
  }
}

}  // namespace
}  // namespace warpstep
