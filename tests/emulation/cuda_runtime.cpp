// Runs emulated CUDA threads as fibers.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

dim3 thread_index(0), block_index(0), block_size(0);

namespace {

constexpr std::size_t kStack =
    192 * 1024;  // an argument block of 32 KiB lies on it, with red zones

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  void* fake_stack = nullptr;
};

ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;

// The address sanitizer must be told of every change of stack.
void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] std::size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}
void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] bool from_scheduler) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(saved, &stack, &size);
  if (from_scheduler) {
    scheduler_stack = stack;
    scheduler_stack_size = size;
  }
#endif
}

void to_scheduler() {
  before_switch(current->done ? nullptr : &current->fake_stack, scheduler_stack,
                scheduler_stack_size);
  swapcontext(&current->context, &scheduler);
  after_switch(current->fake_stack, true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  before_switch(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  after_switch(scheduler_fake_stack, false);
}

void fiber_main() {
  after_switch(nullptr, true);
  (*body)();
  current->done = true;
  to_scheduler();
}

void run_block(std::vector<Fiber>& fibers, std::mt19937& random) {
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> order(fibers.size());
  std::iota(order.begin(), order.end(), 0u);
  for (std::size_t done = 0; done < fibers.size();) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned thread : order) {
      thread_index = dim3(thread);
      resume(fibers[thread]);
    }
    done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });
    if (done != 0 && done != fibers.size()) {
      std::fprintf(stderr, "some threads of block %u left while others wait\n", block_index.x);
      std::abort();
    }
  }
}

}  // namespace

void synchronize_threads() {
  const dim3 index = thread_index;
  to_scheduler();
  thread_index = index;
}

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& thread) {
  static std::vector<Fiber> fibers;
  static std::mt19937 random(0);
  fibers.resize(threads);
  body = &thread;
  block_size = dim3(threads);
  // A test of a huge tensor looks at its last blocks only.
  const char* from = std::getenv("EMULATED_BLOCKS_FROM");
  const unsigned first = from == nullptr ? 0 : static_cast<unsigned>(std::atoi(from));
  std::vector<unsigned> order(blocks - std::min(first, blocks));
  std::iota(order.begin(), order.end(), first);
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned block : order) {
    block_index = dim3(block);
    run_block(fibers, random);
  }
}

}  // namespace emulation
