// Sharing work out, and the threads that do it: torch's, or a pool of our own.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace warpstep {
namespace {

// What each thread begins with; `next` may run past `end`.
struct alignas(64) Share {
  std::atomic<std::uint32_t> next;
  std::uint32_t end;
};

class SharedWork {
 public:
  SharedWork(int shares, std::uint32_t count, const std::function<void(std::uint32_t)>& work)
      : shares_(shares), work_(work) {
    const auto begin_of = [&](int share) {
      return static_cast<std::uint32_t>(std::uint64_t{count} * share / shares);
    };
    for (int i = 0; i < shares; ++i) {
      shares_[i].next = begin_of(i);
      shares_[i].end = begin_of(i + 1);
    }
  }

  // One thread's part: a share, then what is left of those behind it, around.
  void join(std::size_t first) noexcept {
    for (std::size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(first + i) % shares_.size()];
      for (std::uint32_t k = share.next++; k < share.end; k = share.next++) work_(k);
    }
  }

 private:
  std::vector<Share> shares_;
  const std::function<void(std::uint32_t)>& work_;
};

// Our own threads. NOTE [torch's threads] says when they are needed.
class ThreadPool {
 public:
  // Returns false, having done nothing, where another thread is using the pool.
  bool run(int helpers, SharedWork& work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;

    try {
      for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // the system has no more: those that there are will do
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      wanted_ = std::min(helpers, started_);
    }
    wake_.notify_all();
    work.join(0);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not come yet is not needed any more
    left_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      const int share = wanted_--;
      ++working_;
      SharedWork& work = *work_;
      lock.unlock();
      work.join(static_cast<std::size_t>(share));
      lock.lock();
      if (--working_ == 0) left_.notify_one();
    }
  }

  std::mutex turn_;  // held by the thread whose work is being done
  int started_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, left_;
  SharedWork* work_ = nullptr;
  int wanted_ = 0;   // helpers still to join
  int working_ = 0;  // helpers that have joined and not left
};

// NOTE [torch's threads]
// torch's are awake when a step comes, right after a backward pass: they spin for some milliseconds
// before they sleep. Threads of ours would have to be woken, and then to wait for the cores that
// torch's hold. But no thread outlives a fork, and GNU's OpenMP, which runs torch's, waits for them
// in the child for ever: there our own do the work, begun anew. Pools are never destroyed, as their
// threads may outlive static destructors.
std::atomic<ParallelFor> parallel_for{nullptr};
std::atomic<ThreadPool*> pool{nullptr};
std::atomic<bool> is_forked{false};

void after_fork() {
  is_forked = true;
  parallel_for = nullptr;
  pool = nullptr;
}
const int watches_forks = pthread_atfork(nullptr, nullptr, after_fork);

ThreadPool& our_pool() {
  ThreadPool* current = pool;
  if (current == nullptr) {
    auto made = std::make_unique<ThreadPool>();
    if (pool.compare_exchange_strong(current, made.get())) current = made.release();
  }
  return *current;
}

void join(std::int64_t first, std::int64_t, void* work) {
  static_cast<SharedWork*>(work)->join(static_cast<std::size_t>(first));
}

}  // namespace

void use_parallel_for(ParallelFor function) {
  if (!is_forked) parallel_for = function;
}

bool uses_parallel_for() { return parallel_for != nullptr; }

void run_on_threads(int threads, std::uint32_t count,
                    const std::function<void(std::uint32_t)>& work) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1) {
    for (std::uint32_t i = 0; i < count; ++i) work(i);
    return;
  }
  SharedWork shared(threads, count, work);
  const ParallelFor torchs = parallel_for;
  const bool done = torchs != nullptr ? torchs(0, threads, 1, join, &shared) == 0
                                      : our_pool().run(threads - 1, shared);
  if (!done) shared.join(0);  // alone, what is left
}

}  // namespace warpstep
