// The step on the CPU for operands of 16 bits each: two neighbours at a time, as the halves of a
// 32-bit number, which need no shuffling between vectors of 16 and of 32 bits.
#pragma once

#include "../blocks.h"
#include "../tail.h"
#include "ahead.h"
#include "launch.h"
#include "vectors.h"

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
  template <std::int64_t kElements>
  WARPSTEP_FN void ask(std::int64_t i) const {
    ask_for<kElements>(at + i);
  }
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
  template <std::int64_t kElements>
  WARPSTEP_FN void ask(std::int64_t i) const {
    ask_for<kElements>(at + i);
  }
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
  template <std::int64_t kElements>
  WARPSTEP_FN void ask(std::int64_t i) const {
    ask_for<kElements>(at + i), ask_for<kElements>(residual + i);
  }
};

struct Singles {  // float32, which are no pairs
  static constexpr Format format = Format::float32;
  float* at;

  WARPSTEP_FN float load(std::int64_t i) const { return at[i]; }
  WARPSTEP_FN void store(float x, std::int64_t i) const { at[i] = x; }
  template <std::int64_t kElements>
  WARPSTEP_FN void ask(std::int64_t i) const {
    ask_for<kElements>(at + i);
  }
};

struct CopiedSingles {  // with a copy in bfloat16
  static constexpr Format format = Format::float32;
  float* at;
  bfloat16* copy;

  WARPSTEP_FN float load(std::int64_t i) const { return at[i]; }
  WARPSTEP_FN void store(float x, std::int64_t i) const {
    at[i] = x;
    warpstep::store(x, copy[i]);
  }
  template <std::int64_t kElements>
  WARPSTEP_FN void ask(std::int64_t i) const {
    ask_for<kElements>(at + i), ask_for<kElements>(copy + i);
  }
};

template <class Rule, Part kPart, class Param, class... Moment>
WARPSTEP_FN void step_one(std::int64_t i, const Constants<Rule, float>& c, const Param& param,
                          const Halves& grad, const Moment&... moments) {
  float numbers[] = {moments.load(i)..., 0.0f};
  param.store(stepped<Rule, kPart>(c, param.load(i), grad.load(i), numbers), i);
  [[maybe_unused]] std::uint32_t next = 0;
  (moments.store(numbers[next++], i), ...);
}

// One at a time, for float32 moments: vectors of 16 and of 32 bits are shuffled into each other.
template <class Rule, Part kPart, class Param, class... Moment>
void step_singly(const Constants<Rule, float> c, std::int64_t count, std::int64_t left,
                 const Param param, const Halves grad, const Moment... moments) {
  const auto step = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (std::int64_t i = from; i < to; ++i) step_one<Rule, kPart>(i, c, param, grad, moments...);
  };
  in_runs(light_loops_ask, 0, count, left, step, param, grad, moments...);
}

// The two elements from i on.
template <class Rule, Part kPart, class Param, class... Moment>
WARPSTEP_FN void step_two(std::int64_t i, const Constants<Rule, float>& c, const Param& param,
                          const Halves& grad, const Moment&... moments) {
  constexpr std::uint32_t kMoments = sizeof...(Moment);
  float p[2], g[2], m[kMoments + 1][2];
  param.load(i, p);
  grad.load(i, g);
  [[maybe_unused]] std::uint32_t next = 0;
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

// Elements [first, count).
template <class Rule, Part kPart, class Param, class... Moment>
void step_from(std::int64_t first, const Constants<Rule, float> c, std::int64_t count,
               std::int64_t left, const Param param, const Halves grad, const Moment... moments) {
  const auto step = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
  // Operands do not overlap.
#pragma GCC ivdep
    for (std::int64_t i = from; i < to - 1; i += 2) {
      step_two<Rule, kPart>(i, c, param, grad, moments...);
    }
  };
  in_runs(light_loops_ask, first, count, left, step, param, grad, moments...);
  if ((count - first) % 2 != 0) step_one<Rule, kPart>(count - 1, c, param, grad, moments...);
}

#if defined(__AVX512BW__) && defined(WARPSTEP_KNOWS_AVX512_BF16)
// NOTE [rounding by an instruction]
// AVX512_BF16 rounds two vectors of float32 to one of bfloat16, in the place of 15 instructions:
// in the caches all-bfloat16 AdamW takes 0.37 ns an element with it and 0.47 without. But it makes
// zeros of subnormal numbers and keeps a NaN's payload, so vectors that have some are rounded as
// formats.h does it. Where the processor is told to read subnormal numbers as zero, no test finds
// them, and all vectors are.
#define WARPSTEP_AVX512_BF16 __attribute__((target("avx512bf16")))

// Whether this processor has it and WARPSTEP_ISA lets it be used.
bool rounds_by_instruction = false;

constexpr std::int64_t kInVector = 16;
constexpr std::int64_t kTwoVectors = 2 * kInVector;
typedef float EvenOdd[2][kInVector];  // the even elements, and the odd ones

template <class Operand>
WARPSTEP_FN void load_even_odd(const Operand& from, std::int64_t at, EvenOdd& x) {
  for (std::int64_t k = 0; k < kInVector; ++k) {
    float pair[2];
    from.load(at + 2 * k, pair);
    x[0][k] = pair[0], x[1][k] = pair[1];
  }
}

template <class Operand>
WARPSTEP_FN void store_even_odd(const EvenOdd& x, const Operand& to, std::int64_t at) {
  for (std::int64_t k = 0; k < kInVector; ++k) {
    const float pair[] = {x[0][k], x[1][k]};
    to.store(pair, at + 2 * k);
  }
}
WARPSTEP_AVX512_BF16 WARPSTEP_FN void store_even_odd(const EvenOdd& x, const Halves& to,
                                                     std::int64_t at) {
  constexpr int kNanOrSubnormal = 0x01 | 0x80 | 0x20;
  const __m512 even = _mm512_loadu_ps(x[0]), odd = _mm512_loadu_ps(x[1]);
  if (__builtin_expect(_mm512_fpclass_ps_mask(even, kNanOrSubnormal) |
                           _mm512_fpclass_ps_mask(odd, kNanOrSubnormal),
                       false)) {
    return store_even_odd<Halves>(x, to, at);
  }
  const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(to.at + at, interleaved(rounded));
}

// As many elements as there are in whole pairs of vectors; returns how many.
template <class Rule, Part kPart, class Param, class... Moment>
WARPSTEP_AVX512_BF16 std::int64_t step_even_odd(const Constants<Rule, float> c, std::int64_t count,
                                                std::int64_t left, const Param param,
                                                const Halves grad, const Moment... moments) {
  constexpr std::uint32_t kMoments = sizeof...(Moment);
  [[maybe_unused]] std::uint32_t next;
  std::int64_t i = 0;
  for (; i + kTwoVectors <= count; i += kTwoVectors) {
    if (light_loops_ask) ask_ahead<kTwoVectors>(i, left, param, grad, moments...);
    EvenOdd p, g, m[kMoments + 1];
    load_even_odd(param, i, p);
    load_even_odd(grad, i, g);
    next = 0;
    (load_even_odd(moments, i, m[next++]), ...);
    const auto step_half = [&](int half) __attribute__((always_inline)) {
      for (std::int64_t k = 0; k < kInVector; ++k) {
        float numbers[kMoments + 1];
        for (std::uint32_t j = 0; j < kMoments; ++j) numbers[j] = m[j][half][k];
        p[half][k] = stepped<Rule, kPart>(c, p[half][k], g[half][k], numbers);
        for (std::uint32_t j = 0; j < kMoments; ++j) m[j][half][k] = numbers[j];
      }
    };
    step_half(0), step_half(1);
    store_even_odd(p, param, i);
    next = 0;
    (store_even_odd(m[next++], moments, i), ...);
  }
  return i;
}
#endif

// `left`: as ask_ahead() has it.
template <class Rule, Part kPart, class Param, class... Moment>
void step_pairs(const Constants<Rule, float>& c, std::int64_t count, std::int64_t left,
                const Param param, const Halves grad, const Moment... moments) {
  std::int64_t done = 0;
#ifdef WARPSTEP_AVX512_BF16
  constexpr unsigned kReadsSubnormalsAsZero = 0x40;
  if (rounds_by_instruction && !(_mm_getcsr() & kReadsSubnormalsAsZero)) {
    done = step_even_odd<Rule, kPart>(c, count, left, param, grad, moments...);
  }
#endif
  if (done < count) step_from<Rule, kPart>(done, c, count, left, param, grad, moments...);
}

}  // namespace
}  // namespace warpstep
