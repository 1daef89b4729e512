// Work shared out among a few threads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>

namespace warpstep {

using Nanoseconds = std::int64_t;

// Whether sharing work of one kind saves more than it costs: NOTE [sharing that pays]. A static one
// for each kind; each size, to the power of two, has a balance of its own. Safe on any thread.
class Sharing {
 public:
  bool pays(std::uint32_t count);
  // It took so long on several threads; one would have taken as long as `alone`.
  void was_shared(std::uint32_t count, Nanoseconds took, Nanoseconds alone);
  void was_done_alone(std::uint32_t count, Nanoseconds took);

 private:
  std::atomic<Nanoseconds>& cost_of(std::uint32_t count) {
    return costs_[31 - __builtin_clz(count | 1)];
  }

  std::array<std::atomic<Nanoseconds>, 32> costs_{};  // beyond what was saved; never negative
};

// Calls work(0) to work(count - 1) once each, on the calling thread and on up to `threads` - 1
// others, and returns when all is done. `work` must not throw, nor does this: where there is no
// memory for sharing it, the calling thread does all. Each thread has a run of neighbours
// to begin with, the same at each call, so that it finds in its core's caches what it left there; a
// thread that has finished its own run takes over parts of others'. A thread that comes late, or
// that the machine does not run for a while, thus holds up no more than what it has in hand, and
// its own end: where `sharing` knows that this costs more than it saves, the calling thread does
// all.
//
// The others compute as the calling thread does: its floating-point environment (whether subnormal
// numbers are flushed to zero, how results are rounded) is theirs for the time of the work. Each
// thread has its own otherwise, torch.set_flush_denormal sets that of the thread that calls it, and
// which thread does what must not show in a result.
//
// `work` may be any function object: a std::function that refers to it allocates no memory.
void run_on_threads_by(int threads, std::uint32_t count, Sharing& sharing,
                       const std::function<void(std::uint32_t)>& work) noexcept;
template <class Work>
void run_on_threads(int threads, std::uint32_t count, Sharing& sharing, const Work& work) noexcept {
  run_on_threads_by(threads, count, sharing, std::cref(work));
}

// Calls function(begin, end, context) for parts of a range, each on a thread; 0 if all is well.
// What torch's C ABI has as torch_parallel_for.
using ParallelFor = int (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                            void (*function)(std::int64_t, std::int64_t, void*), void* context);

// From now on the threads are this one's; null for our own. Forked children have our own in any
// case.
void use_parallel_for(ParallelFor function);
bool uses_parallel_for();

}  // namespace warpstep
