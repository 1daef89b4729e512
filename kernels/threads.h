// Work shared out among a few threads.
#pragma once

#include <cstdint>
#include <functional>

namespace warpstep {

// Calls work(0) to work(count - 1) once each, on the calling thread and on up to `threads` - 1
// others, and returns when all is done; `work` must not throw. Each thread has a run of neighbours
// to begin with, the same at each call, so that it finds in its core's caches what it left there;
// who has done with its own takes from the others'. A thread that comes late, or that the machine
// does not run for a while, thus holds up no more than what it has in hand.
void run_on_threads(int threads, std::uint32_t count,
                    const std::function<void(std::uint32_t)>& work);

// Calls function(begin, end, context) for parts of a range, each on a thread; 0 if all is well.
// What torch's C ABI has as torch_parallel_for.
using ParallelFor = int (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                            void (*function)(std::int64_t, std::int64_t, void*), void* context);

// From now on the threads are this one's; null for our own. Forked children have our own in any
// case.
void use_parallel_for(ParallelFor function);
bool uses_parallel_for();

}  // namespace warpstep
