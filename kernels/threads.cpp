// The thread pool behind run_on_threads.
#include "threads.h"

#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>

namespace warpstep {
namespace {

class ThreadPool {
 public:
  // Returns false, having done nothing, where another thread is using the pool.
  bool run(int helpers, const std::function<void()>& work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;

    for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      wanted_ = helpers;
    }
    wake_.notify_all();
    work();
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
      --wanted_;
      ++working_;
      const std::function<void()>& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--working_ == 0) left_.notify_one();
    }
  }

  std::mutex turn_;  // held by the thread whose work is being done
  int started_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, left_;
  const std::function<void()>* work_ = nullptr;
  int wanted_ = 0;   // helpers still to join
  int working_ = 0;  // helpers that have joined and not left
};

// After a fork the parent's threads do not exist in the child, which gets a pool of its own. Pools
// are never destroyed: their threads may outlive static destructors.
ThreadPool& pool() {
  static std::mutex mutex;
  static ThreadPool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (current == nullptr || owner != getpid()) {
    current = new ThreadPool;
    owner = getpid();
  }
  return *current;
}

}  // namespace

void run_on_threads(int threads, const std::function<void()>& work) {
  if (threads <= 1 || !pool().run(threads - 1, work)) work();
}

}  // namespace warpstep
