// Sharing work out, and the threads that do it: torch's, or a pool of our own.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

namespace warpstep {
namespace {

using Clock = std::chrono::steady_clock;

Nanoseconds between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count();
}

// What each thread begins with (`next` may run past `end`), and what a piece took that thread.
struct alignas(64) Share {
  std::atomic<std::uint32_t> next{0};
  std::uint32_t end = 0;
  Nanoseconds pace = std::numeric_limits<Nanoseconds>::max();
};

class SharedWork {
 public:
  SharedWork(int shares, std::uint32_t count, const std::function<void(std::uint32_t)>& work)
      : shares_(shares), count_(count), work_(work) {
    const auto begin_of = [&](int share) {
      return static_cast<std::uint32_t>(std::uint64_t{count} * share / shares);
    };
    for (int i = 0; i < shares; ++i) {
      shares_[i].next = begin_of(i);
      shares_[i].end = begin_of(i + 1);
    }
    std::fegetenv(&environment_);
  }

  // One thread's part, a share of its own first. It computes as the caller does: see threads.h.
  void join(std::size_t first) noexcept {
    if (std::this_thread::get_id() == caller_) {
      take(first);
      return;
    }
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&environment_);
    take(first);
    std::fesetenv(&own);
  }

  // How long all of it would have taken one thread, at the best pace that any of them had.
  Nanoseconds alone() const {
    Nanoseconds pace = shares_[0].pace;
    for (const Share& share : shares_) pace = std::min(pace, share.pace);
    return pace * count_;
  }

 private:
  // A share, then what is left of those behind it, around.
  void take(std::size_t first) {
    Nanoseconds all = 0, longest = 0, pieces = 0;
    Clock::time_point begin = Clock::now();
    for (std::size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(first + i) % shares_.size()];
      for (std::uint32_t k = share.next++; k < share.end; k = share.next++) {
        work_(k);
        const Clock::time_point end = Clock::now();
        const Nanoseconds time = between(begin, end);
        begin = end;
        if (k + 1 == count_) continue;  // the last one may be small
        all += time;
        longest = std::max(longest, time);
        ++pieces;
      }
    }
    // Without the longest, in which the thread may have been interrupted.
    if (pieces > 0) {
      shares_[first].pace = pieces > 1 ? (all - longest) / (pieces - 1) : longest;
    }
  }

  std::vector<Share> shares_;
  const std::uint32_t count_;
  const std::function<void(std::uint32_t)>& work_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::fenv_t environment_;  // the caller's
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
    } catch (const std::exception&) {  // the system has no more: those that there are will do
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

// NOTE [sharing that pays]
// Shared work has ended when its last thread has, and a thread on whose core another process runs
// is waited for until the scheduler turns to it: 4 to 24 ms beside one busy process, for looking at
// 1,000 parameters that one thread looks at in 0.2. So each call is timed, against what one thread
// would have taken at the pace of the pieces. Where sharing has cost more than it has saved, such
// work is done alone until a twentieth of the time that it then takes is as much; then sharing is
// tried again. Beside a busy core work thus takes a twentieth longer than alone in the mean; large
// work, of which half is longer than the wait, is always shared. Work of another kind or size has
// another balance, so that the one is not stopped, nor the other's waits paid, by it.
constexpr Nanoseconds kAllowance = 5'000'000;  // a chance disturbance is no reason to stop
constexpr Nanoseconds kAloneForOne = 20;

bool Sharing::pays(std::uint32_t count) { return cost_of(count) <= kAllowance; }

// Calls that overlap may lose one's time: it is a balance, not an account.
void Sharing::was_shared(std::uint32_t count, Nanoseconds took, Nanoseconds alone) {
  std::atomic<Nanoseconds>& cost = cost_of(count);
  cost = std::max<Nanoseconds>(0, cost + took - alone);
}

void Sharing::was_done_alone(std::uint32_t count, Nanoseconds took) {
  std::atomic<Nanoseconds>& cost = cost_of(count);
  cost = std::max<Nanoseconds>(0, cost - took / kAloneForOne);
}

void run_on_threads_by(int threads, std::uint32_t count, Sharing& sharing,
                       const std::function<void(std::uint32_t)>& work) noexcept {
  const auto do_alone = [&] {
    for (std::uint32_t i = 0; i < count; ++i) work(i);
  };
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1) return do_alone();

  const Clock::time_point begin = Clock::now();
  if (!sharing.pays(count)) {
    do_alone();
    return sharing.was_done_alone(count, between(begin, Clock::now()));
  }
  std::optional<SharedWork> shared;
  ThreadPool* ours = nullptr;
  const ParallelFor torchs = parallel_for;
  try {
    shared.emplace(threads, count, work);
    if (torchs == nullptr) ours = &our_pool();
  } catch (const std::bad_alloc&) {  // nothing has been begun
    return do_alone();
  }
  const bool done = torchs != nullptr ? torchs(0, threads, 1, join, &*shared) == 0
                                      : ours->run(threads - 1, *shared);
  if (!done) shared->join(0);  // alone, what is left
  sharing.was_shared(count, between(begin, Clock::now()), shared->alone());
}

}  // namespace warpstep
