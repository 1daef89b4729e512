// A few threads that run one function together.
#pragma once

#include <functional>

namespace warpstep {

// Runs `work` on the calling thread and on up to `threads` - 1 others, and returns when all have
// left it. The others may come late or not at all: `work` must take its share from common stock.
// Not our own OpenMP: a second OpenMP runtime beside torch's would fight it for the cores.
void run_on_threads(int threads, const std::function<void()>& work);

}  // namespace warpstep
