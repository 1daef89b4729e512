// What the CPU's traversals share: tiles, elements as numbers, and their sum of squares.
#pragma once

#include "../formats.h"
#include "ahead.h"

namespace warpstep {
namespace {

// Elements whose operands stay in the L1 cache while the parts of the tail take their turns.
constexpr std::int64_t kTile = 1024;

// Numbers to compute with: an operand's own memory where that is their format, else converted.
// `left`: how many elements the operand has from there on (ahead.h).
template <class F>
WARPSTEP_FN const auto* numbers_of(const F* elements, std::int64_t count, std::int64_t left,
                                   typename F::Compute (&converted)[kTile]) {
  using T = typename F::Compute;
  if constexpr (sizeof(F) == sizeof(T)) {
    return reinterpret_cast<const T*>(elements);
  } else {
    const auto convert = [&](std::int64_t from, std::int64_t to) __attribute__((always_inline)) {
      for (std::int64_t i = from; i < to; ++i) converted[i] = load(elements[i]);
    };
    in_runs(true, 0, count, left, convert, elements);
    return static_cast<const T*>(converted);
  }
}

// Calls of(numbers, size, left) for the tiles of `count` elements, of `left` that are there.
template <class F, class Of>
WARPSTEP_FN void for_tiles(const F* elements, std::int64_t count, std::int64_t left, Of&& of) {
  using T = typename F::Compute;
  T converted[kTile] = {};
  for (std::int64_t at = 0; at < count; at += kTile) {
    const std::int64_t size = min_of(kTile, count - at);
    const T* const numbers = numbers_of(elements + at, size, left - at, converted);
    of(numbers, size, sizeof(F) == sizeof(T) ? left - at : size);
  }
}

// The largest or smallest magnitude, as `pick` has it of two; `from` where there is none.
template <class T, class Pick>
T extreme_magnitude(const T* numbers, std::int64_t count, std::int64_t left, T from, Pick&& pick) {
  constexpr std::int64_t kLanes = 64;
  T lanes[kLanes];
  for (T& lane : lanes) lane = from;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    ask_ahead<kLanes>(i, left, numbers);
    for (std::int64_t k = 0; k < kLanes; ++k) {
      lanes[k] = pick(lanes[k], std::fabs(numbers[i + k]));
    }
  }
  for (; i < count; ++i) lanes[0] = pick(lanes[0], std::fabs(numbers[i]));
  for (T lane : lanes) from = pick(from, lane);
  return from;
}

// The sum of squares in float64. Kept as many sums side by side, spelled as vectors, so that it is
// SIMD code with the same bits on every machine.
template <class T>
double sum_of_squares(const T* numbers, std::int64_t count, std::int64_t left) {
  constexpr std::int64_t kWidth = 8;
  constexpr std::int64_t kVectors = 4;
  typedef double Wide __attribute__((vector_size(kWidth * sizeof(double))));
  typedef T Numbers __attribute__((vector_size(kWidth * sizeof(T))));
  Wide sums[kVectors] = {};
  std::int64_t i = 0;
  for (; i + kVectors * kWidth <= count; i += kVectors * kWidth) {
    ask_ahead<kVectors * kWidth>(i, left, numbers);
    for (std::int64_t k = 0; k < kVectors; ++k) {
      Numbers narrow;
      std::memcpy(&narrow, numbers + i + k * kWidth, sizeof(narrow));
      const Wide wide = __builtin_convertvector(narrow, Wide);
      sums[k] += wide * wide;
    }
  }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(numbers[i]) * numbers[i];
  const Wide all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (std::int64_t k = 0; k < kWidth; ++k) total += all[k];
  return total;
}

}  // namespace
}  // namespace warpstep
