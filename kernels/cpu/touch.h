// The yardstick for "memory-bound": AdamW's traffic with next to no arithmetic.
#pragma once

#include <cstdint>

#include "ahead.h"

namespace warpstep {
namespace {

// Reads four arrays and writes three.
void touch_arrays(float* a, const float* read_only, float* b, float* c, std::int64_t count) {
  const auto touch = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (std::int64_t i = from; i < to; ++i) {
      const float x = read_only[i];
      a[i] -= x;
      b[i] += x;
      c[i] += x;
    }
  };
  in_runs(light_loops_ask, 0, count, count, touch, a, read_only, b, c);
}

}  // namespace
}  // namespace warpstep
