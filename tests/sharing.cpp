// Checks when work is shared out among threads, in a world where waits are as long as we say.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>

#include "cpu/threads.h"

namespace warpstep {
namespace {

constexpr Nanoseconds kMicrosecond = 1'000, kMillisecond = 1'000'000;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}
#define EXPECT(...) expect((__VA_ARGS__), #__VA_ARGS__)

// So many calls of work that takes one thread `alone` and several half as long, but where
// `is_late(call)` the helper is waited for besides.
struct Outcome {
  int shared = 0;
  Nanoseconds took = 0;
};
Outcome simulate(Sharing& sharing, std::uint32_t pieces, int calls, Nanoseconds alone,
                 Nanoseconds wait, const std::function<bool(int)>& is_late) {
  Outcome outcome;
  for (int call = 0; call < calls; ++call) {
    if (sharing.pays(pieces)) {
      const Nanoseconds took = alone / 2 + (is_late(call) ? wait : 0);
      sharing.was_shared(pieces, took, alone);
      outcome.took += took;
      ++outcome.shared;
    } else {
      sharing.was_done_alone(pieces, alone);
      outcome.took += alone;
    }
  }
  return outcome;
}

bool always(int) { return true; }
bool never(int) { return false; }

// On a free machine: what happens now and then is no reason to work alone.
void rare_waits() {
  Sharing sharing;
  const Outcome free = simulate(sharing, 8, 10'000, 200 * kMicrosecond, 0, never);
  EXPECT(free.shared == 10'000);
  const Outcome mostly = simulate(sharing, 8, 10'000, 200 * kMicrosecond, 5 * kMillisecond,
                                  [](int call) { return call % 100 == 0; });
  EXPECT(mostly.shared == 10'000);
}

// Beside a busy core: within a twentieth of working alone, the first waits aside. When the core is
// free again, work is shared again.
void every_wait() {
  for (const Nanoseconds wait : {kMillisecond, 4 * kMillisecond, 24 * kMillisecond}) {
    Sharing sharing;
    constexpr int kCalls = 100'000;
    constexpr Nanoseconds kAlone = 200 * kMicrosecond;
    simulate(sharing, 8, 1'000, kAlone, 0, never);
    const Outcome busy = simulate(sharing, 8, kCalls, kAlone, wait, always);
    EXPECT(busy.took < kCalls * kAlone / 20 * 21 + 2 * wait + 5 * kMillisecond);
    EXPECT(busy.shared > 10);
    const int until_tried = static_cast<int>(wait * 20 / kAlone) + 1;
    const Outcome free = simulate(sharing, 8, until_tried + 1'000, kAlone, 0, never);
    EXPECT(free.shared >= 1'000);
  }
}

// Half of it is longer than the wait.
void large_work() {
  Sharing sharing;
  const Outcome large = simulate(sharing, 256, 1'000, 40 * kMillisecond, 15 * kMillisecond, always);
  EXPECT(large.shared == 1'000);
}

// Small work that does not pay leaves large work shared, and large work that pays leaves small
// work alone.
void sizes() {
  Sharing sharing;
  int small_shared = 0;
  for (int call = 0; call < 1'000; ++call) {
    small_shared += simulate(sharing, 8, 1, 200 * kMicrosecond, 10 * kMillisecond, always).shared;
    EXPECT(simulate(sharing, 256, 1, 40 * kMillisecond, 10 * kMillisecond, always).shared == 1);
  }
  EXPECT(small_shared <= 2);
}

using Body = void (*)(std::int64_t, std::int64_t, void*);
int calls_of_parallel_for = 0;

void sleep_for(Nanoseconds time) { std::this_thread::sleep_for(std::chrono::nanoseconds(time)); }

// As OpenMP does where the helper's core is busy: it has not begun when all is done.
int helper_comes_late(std::int64_t, std::int64_t, std::int64_t, Body body, void* context) {
  ++calls_of_parallel_for;
  body(0, 1, context);
  sleep_for(20 * kMillisecond);
  body(1, 2, context);
  return 0;
}

// The helper has taken the calling thread's core: it does all, then spins there.
int helper_displaces_caller(std::int64_t, std::int64_t, std::int64_t, Body body, void* context) {
  ++calls_of_parallel_for;
  std::thread([&] { body(1, 2, context); }).join();
  sleep_for(20 * kMillisecond);
  body(0, 1, context);
  return 0;
}

// Whatever the pieces take here, sharing them is tried again only when a twentieth of it makes up
// for the wait. All pieces are done each time.
void expect_it_is_seen(ParallelFor parallel_for) {
  use_parallel_for(parallel_for);
  calls_of_parallel_for = 0;
  Sharing sharing;
  constexpr std::uint32_t kPieces = 8;
  constexpr int kCalls = 300;
  const auto begin = std::chrono::steady_clock::now();
  for (int call = 0; call < kCalls; ++call) {
    std::atomic<std::uint32_t> done{0};
    run_on_threads(2, kPieces, sharing, [&](std::uint32_t) { ++done; });
    EXPECT(done == kPieces);
  }
  const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - begin;
  EXPECT(calls_of_parallel_for >= 1);
  EXPECT(calls_of_parallel_for <= 1 + took.count() / 20 / (15 * kMillisecond));
  use_parallel_for(nullptr);
}

void late_helper() { expect_it_is_seen(helper_comes_late); }
void held_up_caller() { expect_it_is_seen(helper_displaces_caller); }

}  // namespace
}  // namespace warpstep

int main(int, char** arguments) {
  using namespace warpstep;
  const std::map<std::string, void (*)()> cases = {
      {"rare_waits", rare_waits}, {"every_wait", every_wait},   {"large_work", large_work},
      {"sizes", sizes},           {"late_helper", late_helper}, {"held_up_caller", held_up_caller}};
  cases.at(arguments[1])();
  return 0;
}
