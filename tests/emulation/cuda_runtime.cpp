// Runs emulated CUDA threads as fibers.
//
// Blocks run one after the other, on the calling thread; in a program of the thread sanitizer all
// at once, each on a thread of its own. The sanitizer is told that a change of fibers orders
// nothing, and that a barrier does. So this file is compiled without its instrumentation: what
// happens here is the machine, and not the program.
#include "cuda_runtime.h"

#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#pragma weak __tsan_create_fiber
#pragma weak __tsan_get_current_fiber
#pragma weak __tsan_switch_to_fiber
#pragma weak __tsan_acquire
#pragma weak __tsan_release

namespace emulation {
namespace {

constexpr std::size_t kStack = 256 * 1024;  // red zones lie on it, and what -Og keeps there

bool finds_races() { return __tsan_create_fiber != nullptr; }

// Where a thread shuffles: with whom, and at which place of the program.
using Site = std::pair<unsigned, const void*>;

// How often a thread has come there, and what it gave the last two times.
struct Exchanges {
  unsigned count = 0;
  std::uint32_t given[2] = {};
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* at[5] = {};  // where it goes on, once it has begun
  bool done = false;
  // By mask: threads that have met in a part of a warp may go on alone, and meet the others later.
  std::map<Site, Exchanges> exchanges;
  Site waits_for{};            // where it waits; a mask of 0: nowhere
  void* fake_stack = nullptr;  // the address sanitizer's
  void* sanitized = nullptr;   // what the thread sanitizer knows the fiber by, which outlives it
};

// The block that an operating system's thread runs. `__shared__` memory is that thread's, too.
struct Block {
  dim3 index{0}, size{0}, thread{0};
  const std::function<void()>* body = nullptr;
  std::deque<Fiber> fibers;  // which stay where they are
  Fiber scheduler;           // on the thread's own stack
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  Fiber* current = nullptr;
  // For the thread sanitizer: barriers in turn, since a thread that is released first may arrive at
  // the next before the last is released; and the beginning and the end of all threads.
  char barriers[2] = {}, begin = 0, end = 0;
  unsigned barrier = 0;
};
// The operating system's thread's, and where it is, which is read without asking whether it has
// been made.
thread_local Block own_block;
thread_local Block* block = nullptr;
// What some threads of a block did while others waited for them.
std::atomic<const char*> diverged{nullptr};

[[noreturn]] void abort_diverged() {
  std::fprintf(stderr, "%s\n", diverged.load());
  std::abort();
}

// Not by swapcontext: it calls the system, and has the address sanitizer forget what it knows of
// the stack. Both took longer than the kernels.
[[noreturn, gnu::noinline, gnu::no_sanitize("address")]] void go_on(Fiber& fiber) {
  __builtin_longjmp(fiber.at, 1);
}

[[gnu::noinline, gnu::no_sanitize("address")]] void leave_for(Fiber& from, Fiber& to) {
  if (__builtin_setjmp(from.at) == 0) go_on(to);
}

[[gnu::noinline, gnu::no_sanitize("address")]] void enter(Fiber& from, const ucontext_t& to) {
  if (__builtin_setjmp(from.at) == 0) setcontext(&to);
}

// The sanitizers must be told of every change of stack.
void switch_fibers(Fiber& from, Fiber& to, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] std::size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, stack, size);
#endif
  if (finds_races()) __tsan_switch_to_fiber(to.sanitized, __tsan_switch_to_fiber_no_sync);
  leave_for(from, to);
}

void after_switch([[maybe_unused]] Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(to.fake_stack, &stack, &size);
  if (&to != &block->scheduler) {
    block->scheduler_stack = stack;
    block->scheduler_stack_size = size;
  }
#endif
}

void to_scheduler(Fiber& from) {
  switch_fibers(from, block->scheduler, block->scheduler_stack, block->scheduler_stack_size);
  after_switch(from);
}

[[noreturn]] void fiber_main() {
  Fiber& fiber = *block->current;
  leave_for(fiber, block->scheduler);  // `begin`, until there is something to run
  after_switch(fiber);
  for (;;) {
    if (finds_races()) __tsan_acquire(&block->begin);
    (*block->body)();
    if (finds_races()) __tsan_release(&block->end);
    fiber.done = true;
    to_scheduler(fiber);
  }
}

// Gives a fiber a stack, on which it runs its thread of one block after the other.
void begin(Fiber& fiber) {
  fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  block->current = &fiber;
  enter(block->scheduler, context);
}

// Whether all that a thread's shuffle waits for have come to it.
bool has_met(unsigned thread) {
  Fiber& fiber = block->fibers[thread];
  const Site site = fiber.waits_for;
  const unsigned mask = site.first;
  if (mask == 0) return true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const unsigned other = thread / 32 * 32 + lane;
    if (other >= block->fibers.size() ||
        block->fibers[other].exchanges[site].count < fiber.exchanges[site].count) {
      return false;
    }
  }
  return true;
}

// Runs a thread up to its next barrier, shuffle or end.
void run_thread(unsigned thread) {
  block->thread = dim3(thread);
  block->current = &block->fibers[thread];
  switch_fibers(block->scheduler, *block->current, block->current->stack.get(), kStack);
  after_switch(block->scheduler);
}

// What the thread sanitizer knows a block's fibers by: it takes most of the time to make them. They
// are used again once the launch is over, which all that they did has then come before.
using Sanitized = std::vector<void*>;

void run_block(unsigned index, unsigned threads, const std::function<void()>& body, unsigned seed,
               Sanitized& sanitized) {
  std::mt19937 random(seed + index);
  block = &own_block;
  block->index = dim3(index);
  block->size = dim3(threads);
  block->body = &body;
  block->fibers.resize(threads);
  if (finds_races()) {
    block->scheduler.sanitized = __tsan_get_current_fiber();
    while (sanitized.size() < threads) sanitized.push_back(__tsan_create_fiber(0));
    for (unsigned i = 0; i < threads; ++i) block->fibers[i].sanitized = sanitized[i];
    __tsan_release(&block->begin);
  }
  for (Fiber& fiber : block->fibers) {
    fiber.done = false;
    fiber.exchanges.clear();
    fiber.waits_for = {};
    fiber.fake_stack = nullptr;
    if (fiber.stack == nullptr) begin(fiber);
  }
  std::vector<unsigned> order(threads), running, waiting;
  std::iota(order.begin(), order.end(), 0u);
  for (std::size_t done = 0; done < threads; ++block->barrier) {
    std::shuffle(order.begin(), order.end(), random);
    running.clear();  // up to the barrier
    for (unsigned thread : order) {
      if (!block->fibers[thread].done) running.push_back(thread);
    }
    while (!running.empty()) {
      waiting.clear();
      bool any_ran = false;
      for (unsigned thread : running) {
        if (has_met(thread)) {
          run_thread(thread);
          any_ran = true;
        }
        if (block->fibers[thread].waits_for.first != 0) waiting.push_back(thread);
      }
      if (!any_ran) {
        diverged = "a shuffle waits for threads that do not come to it";
        abort_diverged();
      }
      std::swap(running, waiting);
    }
    done = std::count_if(block->fibers.begin(), block->fibers.end(),
                         [](const Fiber& fiber) { return fiber.done; });
    if (done != 0 && done != threads) diverged = "some threads of a block left while others waited";
  }
  if (finds_races()) __tsan_acquire(&block->end);
}

bool capturing = false;
std::vector<std::function<void()>> graph;

}  // namespace

void launch(std::function<void()> grid) {
  if (capturing) {
    graph.push_back(std::move(grid));
  } else {
    grid();
  }
}

bool is_capturing() { return capturing; }

dim3 thread_index() { return block->thread; }
dim3 block_index() { return block->index; }
dim3 block_size() { return block->size; }

void synchronize_threads() {
  char* const barrier = &block->barriers[block->barrier % 2];
  if (finds_races()) __tsan_release(barrier);
  to_scheduler(*block->current);
  if (finds_races()) __tsan_acquire(barrier);
}

namespace {

// Orders no access to memory: a shuffle does not.
std::uint32_t exchange_at(const Site& site, std::uint32_t value, unsigned lane) {
  const unsigned mask = site.first, thread = block->thread.x;
  Fiber& fiber = *block->current;
  Exchanges& mine = fiber.exchanges[site];
  const unsigned parity = mine.count++ % 2;
  mine.given[parity] = value;
  fiber.waits_for = site;
  if ((mask >> lane & mask >> thread % 32 & 1) == 0) {
    diverged = "a shuffle with a thread that its mask lacks";
    abort_diverged();
  }
  if (!has_met(thread)) to_scheduler(fiber);
  fiber.waits_for = {};
  return block->fibers[thread / 32 * 32 + lane].exchanges[site].given[parity];
}

}  // namespace

[[gnu::noinline]] std::uint32_t exchange(unsigned mask, std::uint32_t value, unsigned lane) {
  return exchange_at({mask, __builtin_return_address(0)}, value, lane);
}

[[gnu::noinline]] void synchronize_warp(unsigned mask) {
  const Site site{mask, __builtin_return_address(0)};
  const unsigned thread = block->thread.x, warp = thread / 32 * 32;
  Fiber& first = block->fibers[warp + static_cast<unsigned>(__builtin_ctz(mask))];
  const unsigned count = block->fibers[thread].exchanges[site].count;
  void* const barrier = &first.exchanges[site].given[count % 2];
  if (finds_races()) __tsan_release(barrier);
  exchange_at(site, 0, thread % 32);
  if (finds_races()) __tsan_acquire(barrier);
}

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& thread) {
  static std::mt19937 random(0);
  // A test of a huge tensor looks at its last blocks only.
  const char* from = std::getenv("EMULATED_BLOCKS_FROM");
  const unsigned first = from == nullptr ? 0 : static_cast<unsigned>(std::atoi(from));
  std::vector<unsigned> order(blocks - std::min(first, blocks));
  std::iota(order.begin(), order.end(), first);
  std::shuffle(order.begin(), order.end(), random);
  const unsigned seed = random();
  std::vector<std::thread> running;
  static std::deque<Sanitized> of_blocks;  // which stay where they are
  for (unsigned index : order) {
    if (of_blocks.size() == running.size()) of_blocks.emplace_back();
    Sanitized& sanitized = of_blocks[running.size()];
    const auto run = [=, &thread, &sanitized] {
      run_block(index, threads, thread, seed, sanitized);
    };
    if (finds_races()) {
      running.emplace_back(run);
    } else {
      run();
    }
  }
  for (std::thread& one : running) one.join();
  if (diverged) abort_diverged();  // not before: what the sanitizer has found, it tells first
}

}  // namespace emulation

#define EXPORTED __attribute__((visibility("default")))

EXPORTED void emulated_capture_begin() {
  emulation::graph.clear();
  emulation::capturing = true;
}
EXPORTED void emulated_capture_end() { emulation::capturing = false; }
EXPORTED void emulated_replay() {
  for (const auto& grid : emulation::graph) grid();
}
