// Memory that a step asks for before it needs it.
//
// NOTE [memory asked for ahead]
// What a Xeon (Emerald Rapids, two threads) fetches by itself does not keep memory busy: it
// took 1.5 times as long for an all-bfloat16 step out of memory as with its operands asked for
// kAhead elements earlier, 1.2 to 1.3 times with 8-bit moments, 1.1 times in float32, and twice as
// long for the norm of float32 gradients. What is in the caches is stepped as fast as before. It
// has to be asked for a few lines at a time: runs of 256 elements lost half of that, and 512 all of
// it. How far ahead hardly matters: 512 to 2,048 elements were alike.
//
// An EPYC 9004 gains by it where much is computed for each byte (a master with bfloat16 moments
// up to 1.2, 8-bit moments 1.02, the norm of bfloat16 gradients 1.4 times), and loses by it in
// loops that its own prefetching keeps supplied: float32 took 1.1 times as long, with
// statistics 1.2, with an average 1.4. So those loops ask only where they are known to gain: on
// Intel's processors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../layout.h"

namespace warpstep {
namespace {

constexpr std::int64_t kAhead = 1024;  // elements
constexpr std::int64_t kRun = 64;      // for so many it is asked at a time

// Whether loops of little arithmetic ask, too; set before any kernel runs.
bool light_loops_ask = false;

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

// Calls step(from, to) for runs of elements [first, count), with their operands asked for where
// `asks`.
template <class Step, class... Operand>
WARPSTEP_FN void in_runs(bool asks, std::int64_t first, std::int64_t count, std::int64_t left,
                         Step&& step, const Operand&... operands) {
  std::int64_t at = first;
  for (; at + kRun <= count; at += kRun) {
    if (asks) ask_ahead<kRun>(at, left, operands...);
    step(at, at + kRun);
  }
  step(at, count);
}

}  // namespace
}  // namespace warpstep
