// Memory that a step asks for before it needs it.
//
// NOTE [memory asked for ahead]
// What a processor fetches by itself does not keep memory busy: a Xeon (Emerald Rapids, two
// threads) took 1.5 times as long for an all-bfloat16 step out of memory as with its operands asked
// for kAhead elements earlier, 1.2 to 1.3 times with 8-bit moments, 1.1 times in float32, and twice
// as long for the norm of float32 gradients. What is in the caches is stepped as fast as before. It
// has to be asked for a few lines at a time: runs of 256 elements lost half of that, and 512 all of
// it. How far ahead hardly matters: 512 to 2,048 elements were alike.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../layout.h"

namespace warpstep {
namespace {

constexpr std::int64_t kAhead = 1024;  // elements
constexpr std::int64_t kRun = 64;      // for so many it is asked at a time

template <std::int64_t kElements, class T>
WARPSTEP_FN void ask_for(T* from) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < kElements; i += kLine) __builtin_prefetch(from + i);
}

// Before elements [at, at + kElements) are stepped: asks for as many of each operand, which are
// pointers or as those of pairs.h, kAhead further. `left`: how many elements the tensor has from
// element 0 on; near its end the same elements are asked for, in vain, because a branch there makes
// a step in groups 2 to 4% slower.
template <std::int64_t kElements, class... Operand>
WARPSTEP_FN void ask_ahead(std::int64_t at, std::int64_t left, const Operand&... operands) {
  const std::int64_t from = at + kAhead < left ? at + kAhead : at;
  const auto ask = [&](const auto& operand) __attribute__((always_inline)) {
    if constexpr (std::is_pointer_v<std::decay_t<decltype(operand)>>) {
      ask_for<kElements>(operand + from);
    } else {
      operand.template ask<kElements>(from);
    }
  };
  (ask(operands), ...);
}

// Calls step(from, to) for runs of elements [first, count), with their operands asked for.
template <class Step, class... Operand>
WARPSTEP_FN void in_runs(std::int64_t first, std::int64_t count, std::int64_t left, Step&& step,
                         const Operand&... operands) {
  std::int64_t at = first;
  for (; at + kRun <= count; at += kRun) {
    ask_ahead<kRun>(at, left, operands...);
    step(at, at + kRun);
  }
  step(at, count);
}

}  // namespace
}  // namespace warpstep
