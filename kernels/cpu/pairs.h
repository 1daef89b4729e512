// The step on the CPU for operands of 16 bits each: two neighbours at a time, as the halves of a
// 32-bit number, which need no shuffling between vectors of 16 and of 32 bits.
#pragma once

#include "../blocks.h"
#include "../tail.h"

namespace warpstep {
namespace {

// An operand from some element on: how two of its elements become numbers and back, and one.
struct Halves {  // rounded to nearest
  static constexpr Format format = Format::bfloat16;
  bfloat16* at;

  WARPSTEP_FN void load(std::int64_t i, float (&x)[2]) const { load_pair(at + i, x); }
  WARPSTEP_FN void store(const float (&x)[2], std::int64_t i) const { store_pair(x, at + i); }
  WARPSTEP_FN float load(std::int64_t i) const { return warpstep::load(at[i]); }
  WARPSTEP_FN void store(float x, std::int64_t i) const { warpstep::store(x, at[i]); }
};

struct RandomHalves {
  static constexpr Format format = Format::bfloat16_stochastic;
  bfloat16* at;
  const std::uint16_t* random;  // 16 bits an element

  WARPSTEP_FN void load(std::int64_t i, float (&x)[2]) const { load_pair(at + i, x); }
  WARPSTEP_FN void store(const float (&x)[2], std::int64_t i) const {
    store_pair_stochastic(x, at + i, random + i);
  }
  WARPSTEP_FN float load(std::int64_t i) const { return warpstep::load(at[i]); }
  WARPSTEP_FN void store(float x, std::int64_t i) const { store_stochastic(x, at[i], random[i]); }
};

struct MasterHalves {  // with a residual, a float32
  static constexpr Format format = Format::bfloat16;
  bfloat16* at;
  std::int16_t* residual;

  WARPSTEP_FN void load(std::int64_t i, float (&x)[2]) const { load_pair(at + i, residual + i, x); }
  WARPSTEP_FN void store(const float (&x)[2], std::int64_t i) const {
    store_pair(x, at + i, residual + i);
  }
  WARPSTEP_FN float load(std::int64_t i) const { return joined(at[i], residual[i]); }
  WARPSTEP_FN void store(float x, std::int64_t i) const { split(x, at[i], residual[i]); }
};

template <class Rule, Part kPart, class Param, class... Moment>
void step_pairs(const Constants<Rule, float> c, std::int64_t count, const Param param,
                const Halves grad, const Moment... moments) {
  constexpr std::uint32_t kMoments = sizeof...(Moment);
  [[maybe_unused]] std::uint32_t next;
  std::int64_t i = 0;
  // Operands do not overlap.
#pragma GCC ivdep
  for (; i < count - 1; i += 2) {
    float p[2], g[2], m[kMoments + 1][2];
    param.load(i, p);
    grad.load(i, g);
    next = 0;
    (moments.load(i, m[next++]), ...);
    // Not left a loop, which would be made SIMD code by itself, two elements wide.
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      float numbers[kMoments + 1];
      for (std::uint32_t j = 0; j < kMoments; ++j) numbers[j] = m[j][k];
      p[k] = stepped<Rule, kPart>(c, p[k], g[k], numbers);
      for (std::uint32_t j = 0; j < kMoments; ++j) m[j][k] = numbers[j];
    }
    param.store(p, i);
    next = 0;
    (moments.store(m[next++], i), ...);
  }
  if (i < count) {
    float numbers[] = {moments.load(i)..., 0.0f};
    param.store(stepped<Rule, kPart>(c, param.load(i), grad.load(i), numbers), i);
    next = 0;
    (moments.store(numbers[next++], i), ...);
  }
}

}  // namespace
}  // namespace warpstep
