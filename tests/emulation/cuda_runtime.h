// Stands in for the CUDA built-ins that the kernels use, so that they compile for the host.
//
// Device memory is host memory. A block's threads are fibers, run one at a time, in shuffled order,
// up to the next __syncthreads(), or to a shuffle that waits for others of its mask. A block's
// fibers share a thread of the operating system, and so what is thread_local. Threads of a warp
// that have gone different ways do not meet in a shuffle that each has in its own. Compiled for the
// thread sanitizer, blocks run at once, and what neither a barrier nor an atomic's memory order
// keeps apart is a data race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x_) : x(x_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidDeviceFunction = 98, cudaErrorInvalidResourceHandle = 400 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

namespace emulation {
dim3 thread_index();
dim3 block_index();
dim3 block_size();
void synchronize_threads();
// What the thread with this lane gives, once all threads of the mask, lanes of one warp, are here:
// in the same place of the program.
std::uint32_t exchange(unsigned mask, std::uint32_t value, unsigned lane);
void synchronize_warp(unsigned mask);
// Runs `thread` for every thread of every block.
void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& thread);
// Runs a launch; or, while the stream is being captured, keeps it for the graph's replays.
void launch(std::function<void()> grid);
bool is_capturing();
}  // namespace emulation

// For tests, by ctypes: what torch.cuda.graph does, for the only stream that there is.
extern "C" {
void emulated_capture_begin();
void emulated_capture_end();
void emulated_replay();
}

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())

inline void __syncthreads() { emulation::synchronize_threads(); }
// Each place that shuffles is to call the emulation itself, which knows the place by that.
__forceinline__ void __syncwarp(unsigned mask) { emulation::synchronize_warp(mask); }
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 4, "a register");
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = emulation::exchange(mask, bits, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
// Of whole warps.
__forceinline__ bool __all_sync(unsigned mask, bool one) {
  std::uint32_t all = one;
  for (int lanes = 1; lanes < 32; lanes *= 2) all &= __shfl_xor_sync(mask, all, lanes);
  return all != 0;
}
// Four of the eight bytes of two registers, as four hexadecimal digits choose.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned chosen) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (chosen >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// Devices are as environment variables say: which is current, and whether it can run the kernels.
// All streams are the first one's.
inline int emulated_fact(const char* variable, int usually) {
  const char* const value = std::getenv(variable);
  return value == nullptr ? usually : std::atoi(value);
}
inline int emulated_device() { return emulated_fact("EMULATED_DEVICE", 0); }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulated_device(), cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
struct cudaFuncAttributes {};
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = emulated_fact("EMULATED_DRIVER", 13000), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulated_fact("EMULATED_CAPABILITY", 9), cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return emulated_fact("EMULATED_LOADING", cudaSuccess);
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  const bool is_capturing = emulation::is_capturing() && emulated_device() == 0;
  *status = is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// All threads read one copy of the argument, at whose end the address sanitizer's memory begins.
template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(const Argument&), dim3 grid, dim3 block,
                             void** arguments, std::size_t, cudaStream_t) {
  static_assert(sizeof(Argument) <= 32764, "a CUDA kernel takes no more arguments");
  if (emulated_device() != 0) return cudaErrorInvalidResourceHandle;
  const auto argument = std::make_shared<const Argument>(*static_cast<Argument*>(arguments[0]));
  emulation::launch([=] { emulation::run_grid(grid.x, block.x, [&] { kernel(*argument); }); });
  return cudaSuccess;
}
