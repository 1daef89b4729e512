// The yardstick for "memory-bound": AdamW's traffic with next to no arithmetic.
#pragma once

#include <cstdint>

namespace warpstep {
namespace {

// Reads four arrays and writes three.
void touch_arrays(float* __restrict a, const float* __restrict read_only, float* __restrict b,
                  float* __restrict c, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = read_only[i];
    a[i] -= x;
    b[i] += x;
    c[i] += x;
  }
}

}  // namespace
}  // namespace warpstep
