// Stands in for the CUDA built-ins that kernels/adamw.cu uses, so that it compiles for the host.
//
// Device memory is host memory. A block's threads are fibers, run one at a time up to the next
// __syncthreads(); blocks run one after the other, in shuffled order. What this cannot show:
// data races between threads that really run at once, and memory ordering.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x_) : x(x_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidDeviceFunction = 98 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };

namespace emulation {
extern dim3 thread_index, block_index, block_size;
void synchronize_threads();
// Runs `thread` for every thread of every block.
void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& thread);
}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)

inline void __syncthreads() { emulation::synchronize_threads(); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             std::size_t, cudaStream_t) {
  static_assert(sizeof(Argument) <= 32764, "a CUDA kernel takes no more arguments");
  const Argument& argument = *static_cast<const Argument*>(arguments[0]);
  emulation::run_grid(grid.x, block.x, [&] { kernel(argument); });
  return cudaSuccess;
}
