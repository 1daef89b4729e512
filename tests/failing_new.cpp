// To be preloaded: operator new throws at the n-th call that warpstep's native module makes while
// it is armed, and so takes the part of a machine without memory.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<bool> armed{false};
std::atomic<long> left{0}, seen{0};

bool is_of_native(void* address) {
  Dl_info info;
  return dladdr(address, &info) != 0 && info.dli_fname != nullptr &&
         std::strstr(info.dli_fname, "_native") != nullptr;
}

void* allocate(std::size_t size, std::size_t alignment, void* caller) {
  if (armed && is_of_native(caller)) {
    ++seen;
    if (left-- == 0) throw std::bad_alloc();
  }
  const std::size_t whole = (size + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

constexpr std::size_t kUsual = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

extern "C" void fail_at(long call) {
  left = call;
  seen = 0;
  armed = true;
}
extern "C" long stop_failing() {  // how many calls there were
  armed = false;
  return seen;
}

void* operator new(std::size_t size) { return allocate(size, kUsual, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
