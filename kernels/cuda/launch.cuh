// What the CUDA kernels share: their arguments, 16-byte access, sums over a block, launching.
#pragma once

#include <type_traits>

#include "../blocks.h"
#include "launch.h"

namespace warpstep {
namespace {

// 32,764 bytes of arguments since CUDA 12.1 (compute capability 7.0 and later); a multiple of 8.
constexpr std::uint32_t kArgumentBytes = 32760;

struct Header {
  const TensorRow* rows;
  const Chunk* chunks;
  std::uint32_t* arrivals;  // a zero for each tensor: blocks that have read its step counter
  Tail tail;
  double* norm;   // grad_norm.cu: the result, a counter of blocks done, a number for each chunk
  double* least;  // Launch::least
  std::uint32_t first_chunk;
  std::uint32_t first_tensor;
  std::uint32_t first_group;
  std::uint32_t groups;  // in the payload: those of its tensors
  std::uint32_t tensors;
  std::uint32_t chunk_count;
  std::uint32_t chunk_size;
  Keys keys;                  // of the seed of random bits
  Format formats[kOperands];  // the step's
  Norm norm_kind;
  std::uint8_t pad_[4];
};
static_assert(sizeof(Header) % 8 == 0, "the payload follows");

struct Arguments : Header {
  // Hyper[groups] from first_group on, then the gradients' addresses from first_tensor on.
  std::uint64_t payload[(kArgumentBytes - sizeof(Header)) / 8];
};
static_assert(sizeof(Arguments) <= kArgumentBytes, "arguments must fit");
static_assert(sizeof(Hyper) % 8 == 0, "gradient addresses follow aligned");

// Threads of a block, and what a kernel takes. In the tests' build for the host threads run one at
// a time, so fewer do, and none has 32 KB of arguments copied to its stack.
#ifdef __CUDACC__
constexpr std::uint32_t kCudaThreads = 256;
using KernelArguments = Arguments;
#else
constexpr std::uint32_t kCudaThreads = 64;
using KernelArguments = const Arguments&;
#endif

constexpr std::uint32_t kPayloadWords = sizeof(Arguments::payload) / 8;
constexpr std::uint32_t kHyperWords = sizeof(Hyper) / 8;
// So many tensors go in one launch, or fewer where they are of more than ten groups.
constexpr std::uint32_t kTensorsPerLaunch = 4000;
static_assert(kTensorsPerLaunch + 10 * kHyperWords <= kPayloadWords, "4,000 tensors in a launch");

__device__ __forceinline__ void* grad_of(const Arguments& args, std::uint32_t tensor) {
  const std::uint32_t word = args.groups * kHyperWords + tensor - args.first_tensor;
  return reinterpret_cast<void*>(args.payload[word]);
}

__device__ __forceinline__ const Hyper& hyper_of(const Arguments& args, std::uint32_t group) {
  return reinterpret_cast<const Hyper*>(args.payload)[group - args.first_group];
}

// Adds to a counter in global memory and returns what it was. What any block has read or written
// before its addition comes before what any does after a later addition: no fence is needed.
// (CUDA C++ has a name for it since 12.8; atomicAdd orders nothing.)
__device__ __forceinline__ std::uint32_t atomic_add_acq_rel(std::uint32_t* counter,
                                                            std::uint32_t value) {
#ifdef __CUDA_ARCH__
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
#else
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
#endif
}

// Consecutive elements of an operand, as they are in memory: one, or as many as fill whole vectors.
template <class F, std::uint32_t kElements>
struct Packet {
  static constexpr std::uint32_t kBytes = kElements * sizeof(F);
  using Word = std::conditional_t<kBytes % kVectorBytes == 0, uint4, F>;
  static constexpr std::uint32_t kWords = kBytes / sizeof(Word);
  union {
    Word words[kWords];
    F elements[kElements];
  };
  __device__ __forceinline__ Packet() {}

  __device__ __forceinline__ void load(const F* from, bool aligned) {
    if (aligned) {
#pragma unroll
      for (std::uint32_t i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
    } else {
#pragma unroll
      for (std::uint32_t i = 0; i < kElements; ++i) elements[i] = from[i];
    }
  }
  __device__ __forceinline__ void store(F* to, bool aligned) const {
    if (aligned) {
#pragma unroll
      for (std::uint32_t i = 0; i < kWords; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
    } else {
#pragma unroll
      for (std::uint32_t i = 0; i < kElements; ++i) to[i] = elements[i];
    }
  }
};

// An address read from a table, known to the compiler as one in global memory: it then emits global
// loads and stores, and not generic ones, which look up the address space first.
template <class F>
__device__ __forceinline__ F* in_global_memory(void* address) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(address));
#endif
  return static_cast<F*>(address);
}

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0;
}

// Combines a number from every thread of a block into one, the same bits each time. All get it.
template <class Combine>
__device__ __forceinline__ double combine_block(double value, Combine&& combine) {
  __shared__ double values[kCudaThreads];
  values[threadIdx.x] = value;
  for (std::uint32_t half = kCudaThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + half]);
    }
  }
  __syncthreads();
  const double result = values[0];
  __syncthreads();  // before the next use
  return result;
}

__device__ __forceinline__ double sum_block(double value) {
  return combine_block(value, [](double a, double b) { return a + b; });
}

// Combines term(number) of each of a run of elements into this thread's share, which begins as
// `share`: together the block's threads have met all. 16 bytes at a time, from the elements' own
// boundary on.
template <class F, class T, class Term, class Combine>
__device__ __forceinline__ T share_of(const F* at, std::uint32_t size, T share, Term&& term,
                                      Combine&& combine) {
  constexpr std::uint32_t kElements = kVectorBytes / sizeof(F);
  const std::uint32_t past = reinterpret_cast<std::uintptr_t>(at) % kVectorBytes;
  const std::uint32_t head =
      min_of<std::uint32_t>((kVectorBytes - past) % kVectorBytes / sizeof(F), size);
  const std::uint32_t vectors = (size - head) / kElements;
  const std::uint32_t rest = size - head - vectors * kElements;
  if (threadIdx.x < head + rest) {
    const std::uint32_t i = threadIdx.x < head ? threadIdx.x : vectors * kElements + threadIdx.x;
    share = combine(share, term(load(at[i])));
  }
  for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    Packet<F, kElements> packet;
    packet.load(at + head + i * kElements, true);
#pragma unroll
    for (std::uint32_t k = 0; k < kElements; ++k) {
      share = combine(share, term(load(packet.elements[k])));
    }
  }
  return share;
}

// Combines `count` numbers, met by the block's threads together, and gives the result to all of
// them: `none` if there are no numbers. A thread has eight loads under way at a time, since each
// waits for memory; the order of the combinations is the same as with one at a time.
template <class Combine>
__device__ __forceinline__ double combined(const double* numbers, std::uint32_t count, double none,
                                           Combine&& combine) {
  constexpr std::uint32_t kAtOnce = 8;
  double total = none;
  for (std::uint64_t first = threadIdx.x; first < count; first += kAtOnce * blockDim.x) {
    double next[kAtOnce];
#pragma unroll
    for (std::uint32_t k = 0; k < kAtOnce; ++k) {
      const std::uint64_t i = first + k * blockDim.x;
      next[k] = i < count ? numbers[i] : none;
    }
#pragma unroll
    for (std::uint32_t k = 0; k < kAtOnce; ++k) total = combine(total, next[k]);
  }
  return combine_block(total, combine);
}

using Kernel = void (*)(KernelArguments);

// Launches a kernel on all tensors, as many at a time as fit its arguments together with their
// groups' hyper-parameters; with `needs_grads`, not on tensors of which none has a gradient.
CudaResult launch_all(Kernel kernel, Arguments& args, const Launch& launch, bool needs_grads,
                      cudaStream_t stream) {
  CudaResult result{cudaSuccess, 0};
  args.chunk_size = launch.chunk_size;
  args.tensors = launch.tensors;
  args.least = launch.least;
  for (std::uint32_t first = 0, first_chunk = 0; first < launch.tensors && !result.error;) {
    const std::uint32_t limit = min_of(first + kTensorsPerLaunch, launch.tensors);
    const std::uint32_t first_group = launch.rows[first].group;
    std::uint32_t last = first, last_chunk = first_chunk, groups = 0;
    bool wanted = !needs_grads;
    for (; last < limit; ++last) {
      const TensorRow& row = launch.rows[last];
      if (launch.groups != 0) {
        const std::uint32_t with_its = row.group - first_group + 1;
        if (with_its * kHyperWords + (last - first + 1) > kPayloadWords) break;
        groups = with_its;
      }
      last_chunk += row.chunks;
      wanted |= launch.grads[last] != nullptr;
    }
    if (wanted) {
      args.first_tensor = first;
      args.first_chunk = first_chunk;
      args.first_group = first_group;
      args.groups = groups;
      if (groups != 0) {
        std::memcpy(args.payload, launch.hypers + first_group, groups * sizeof(Hyper));
      }
      std::memcpy(args.payload + groups * kHyperWords, launch.grads + first,
                  (last - first) * sizeof(std::uint64_t));
      void* kernel_arguments[] = {&args};
      result.error = cudaLaunchKernel(kernel, dim3(last_chunk - first_chunk), dim3(kCudaThreads),
                                      kernel_arguments, 0, stream);
      ++result.launches;
    }
    first = last;
    first_chunk = last_chunk;
  }
  return result;
}

}  // namespace
}  // namespace warpstep
