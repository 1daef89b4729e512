// The CUDA kernel and its launcher: every tensor of a recipe on a device in one launch.
//
// A block takes one chunk: one thread works out the constants of the chunk's tensor, all threads
// then walk the elements with 16-byte accesses. What is stable lies in device memory since plan
// time; what changes each step (gradient addresses, hyper-parameters) travels in the arguments, so
// a captured graph holds it by value.
#include <type_traits>

#include "adamw_cuda.h"
#include "rule.h"

namespace warpstep {
namespace {

// 32,764 bytes of arguments since CUDA 12.1 (compute capability 7.0 and later); a multiple of 8.
constexpr std::uint32_t kArgumentBytes = 32760;
constexpr std::uint32_t kVectorBytes = 16;

struct Header {
  const TensorRow* rows;
  const Chunk* chunks;
  std::uint32_t* arrivals;     // a zero for each tensor: blocks that have read its step counter
  const Hyper* device_hypers;  // null: they are in the payload
  LossScale loss_scale;
  std::uint32_t first_chunk;
  std::uint32_t first_tensor;
  std::uint32_t groups;  // in the payload
  std::uint32_t pad_;
};

struct Arguments : Header {
  // Hyper[groups], then the gradients' addresses from first_tensor on.
  std::uint64_t payload[(kArgumentBytes - sizeof(Header)) / 8];
};
static_assert(sizeof(Arguments) <= kArgumentBytes, "arguments must fit");
static_assert(sizeof(Hyper) % 8 == 0, "gradient addresses follow aligned");

constexpr std::uint32_t kPayloadWords = sizeof(Arguments::payload) / 8;
constexpr std::uint32_t kHyperWords = sizeof(Hyper) / 8;
// So many tensors go in one launch whatever the number of groups.
constexpr std::uint32_t kTensorsPerLaunch = 4000;
static_assert(kTensorsPerLaunch + kHyperWords <= kPayloadWords, "4,000 tensors in a launch");

__device__ __forceinline__ const void* grad_of(const Arguments& args, std::uint32_t tensor) {
  const std::uint32_t word = args.groups * kHyperWords + tensor - args.first_tensor;
  return reinterpret_cast<const void*>(args.payload[word]);
}

__device__ __forceinline__ const Hyper& hyper_of(const Arguments& args, std::uint32_t group) {
  if (args.device_hypers != nullptr) return args.device_hypers[group];
  return reinterpret_cast<const Hyper*>(args.payload)[group];
}

// Reads the step counter; the last of the tensor's blocks to have read it advances it.
__device__ __forceinline__ float take_step(const TensorRow& row, std::uint32_t* arrivals) {
  const float step = *static_cast<volatile float*>(row.step);
  __threadfence();
  if (row.chunks == 1) {
    *row.step = step + 1;
  } else if (atomicAdd(arrivals, 1u) == row.chunks - 1) {
    *arrivals = 0;
    *row.step = step + 1;
  }
  return step;
}

// Consecutive elements of a stream, as they are in memory: one, or as many as fill whole vectors.
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

// The streams of one tensor, and the step of a few consecutive elements of it.
template <class Recipe>
struct Streams {
  using T = typename Recipe::Compute;
  using Param = typename Recipe::Param;
  using Grad = typename Recipe::Grad;
  using Moment = typename Recipe::Moment;

  Param* param;
  const Grad* grad;
  Moment* exp_avg;
  Moment* exp_avg_sq;
  Moment* max_exp_avg_sq;

  struct Aligned {
    bool param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
    __device__ __forceinline__ bool all() const {
      return param && grad && exp_avg && exp_avg_sq && max_exp_avg_sq;
    }
  };

  __device__ __forceinline__ Aligned alignment_at(std::int64_t i) const {
    return {is_aligned(param + i), is_aligned(grad + i), is_aligned(exp_avg + i),
            is_aligned(exp_avg_sq + i), !Recipe::amsgrad || is_aligned(max_exp_avg_sq + i)};
  }

  template <std::uint32_t kElements>
  __device__ __forceinline__ void step(const Constants<T>& constants, std::int64_t i,
                                       const Aligned& aligned) const {
    Packet<Param, kElements> p;
    Packet<Grad, kElements> g;
    Packet<Moment, kElements> m, v, peak;
    p.load(param + i, aligned.param);
    g.load(grad + i, aligned.grad);
    m.load(exp_avg + i, aligned.exp_avg);
    v.load(exp_avg_sq + i, aligned.exp_avg_sq);
    if constexpr (Recipe::amsgrad) peak.load(max_exp_avg_sq + i, aligned.max_exp_avg_sq);

#pragma unroll
    for (std::uint32_t k = 0; k < kElements; ++k) {
      Moments<T> moments{warpstep::load(m.elements[k]), warpstep::load(v.elements[k]), T(0)};
      if constexpr (Recipe::amsgrad) moments.max_exp_avg_sq = warpstep::load(peak.elements[k]);
      const T result = adamw_rule<Recipe::amsgrad>(constants, warpstep::load(p.elements[k]),
                                                   T(warpstep::load(g.elements[k])), moments);
      warpstep::store(result, p.elements[k]);
      warpstep::store(moments.exp_avg, m.elements[k]);
      warpstep::store(moments.exp_avg_sq, v.elements[k]);
      if constexpr (Recipe::amsgrad) {
        warpstep::store(moments.max_exp_avg_sq, peak.elements[k]);
      }
    }

    p.store(param + i, aligned.param);
    m.store(exp_avg + i, aligned.exp_avg);
    v.store(exp_avg_sq + i, aligned.exp_avg_sq);
    if constexpr (Recipe::amsgrad) peak.store(max_exp_avg_sq + i, aligned.max_exp_avg_sq);
  }
};

template <class Recipe>
__global__ void __launch_bounds__(kCudaThreads, 2)
    adamw_kernel(const __grid_constant__ Arguments args) {
  using T = typename Recipe::Compute;
  const Chunk chunk = args.chunks[args.first_chunk + blockIdx.x];
  const void* grad = grad_of(args, chunk.tensor);
  if (grad == nullptr) return;
  if (args.loss_scale.found_inf != nullptr && *args.loss_scale.found_inf != 0) return;
  const TensorRow row = args.rows[chunk.tensor];

  __shared__ Constants<T> shared_constants;
  if (threadIdx.x == 0) {
    const float step = take_step(row, args.arrivals + chunk.tensor);
    shared_constants = constants_of<T>(hyper_of(args, row.group), step, args.loss_scale.grad_scale);
  }
  __syncthreads();
  const Constants<T> constants = shared_constants;

  using S = Streams<Recipe>;
  const S streams{in_global_memory<typename S::Param>(row.param),
                  in_global_memory<const typename S::Grad>(const_cast<void*>(grad)),
                  in_global_memory<typename S::Moment>(row.exp_avg),
                  in_global_memory<typename S::Moment>(row.exp_avg_sq),
                  in_global_memory<typename S::Moment>(row.max_exp_avg_sq)};

  // As many elements at a time as fill one vector of the narrowest stream.
  constexpr std::uint32_t kNarrowest = min_of(
      sizeof(typename S::Param), min_of(sizeof(typename S::Grad), sizeof(typename S::Moment)));
  constexpr std::uint32_t kElements = kVectorBytes / kNarrowest;

  const ChunkRange range = chunk_range(row, chunk.index, kCudaChunk);
  const std::uint32_t size = static_cast<std::uint32_t>(range.end - range.begin);
  const std::uint32_t head = chunk.index == 0 ? min_of(row.head, size) : 0;
  const std::uint32_t vectors = (size - head) / kElements;
  const std::uint32_t tail = size - head - vectors * kElements;

  // Head and tail, a thread an element.
  constexpr typename S::Aligned kScalar{};
  if (threadIdx.x < head + tail) {
    const std::uint32_t i = threadIdx.x < head ? threadIdx.x : vectors * kElements + threadIdx.x;
    streams.template step<1>(constants, range.begin + i, kScalar);
  }

  const std::int64_t body = range.begin + head;
  const typename S::Aligned aligned = streams.alignment_at(body);
  if (aligned.all()) {
    constexpr typename S::Aligned kAll{true, true, true, true, true};
    for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      streams.template step<kElements>(constants, body + i * kElements, kAll);
    }
  } else {
    for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      streams.template step<kElements>(constants, body + i * kElements, aligned);
    }
  }
}

using Kernel = void (*)(Arguments);

// Launches on tensors [first, last) of the table, which cover chunks [first_chunk, last_chunk).
cudaError_t launch(Kernel kernel, Arguments& args, const Launch& launch, std::uint32_t first,
                   std::uint32_t last, std::uint32_t first_chunk, std::uint32_t last_chunk,
                   cudaStream_t stream) {
  args.first_tensor = first;
  args.first_chunk = first_chunk;
  std::memcpy(args.payload + args.groups * kHyperWords, launch.grads + first,
              (last - first) * sizeof(std::uint64_t));
  void* kernel_arguments[] = {&args};
  return cudaLaunchKernel(kernel, dim3(last_chunk - first_chunk), dim3(kCudaThreads),
                          kernel_arguments, 0, stream);
}

// Makes a device current, and the previous one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cudaGetDevice(&previous_);
    if (previous_ != device_) error = cudaSetDevice(device_);
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  cudaError_t error = cudaSuccess;

 private:
  int device_;
  int previous_ = 0;
};

}  // namespace

bool cuda_needs_hyper_table(std::uint32_t tensors, std::uint32_t groups) {
  const std::uint32_t in_launch = min_of(tensors, kTensorsPerLaunch);
  return std::uint64_t{groups} * kHyperWords + in_launch > kPayloadWords;
}

CudaResult adamw_cuda(const Launch& step, const CudaTables& tables, int device, void* stream) {
  const DeviceGuard guard(device);
  CudaResult result{guard.error, 0};

  Arguments args{};
  args.rows = static_cast<const TensorRow*>(tables.rows);
  args.chunks = static_cast<const Chunk*>(tables.chunks);
  args.arrivals = static_cast<std::uint32_t*>(tables.arrivals);
  args.loss_scale = step.loss_scale;
  if (cuda_needs_hyper_table(step.tensors, step.groups)) {
    args.device_hypers = static_cast<const Hyper*>(tables.hypers);
  } else {
    args.groups = step.groups;
    std::memcpy(args.payload, step.hypers, step.groups * sizeof(Hyper));
  }

  Kernel kernel = nullptr;
  visit_recipe(step.recipe, [&](auto recipe) { kernel = adamw_kernel<decltype(recipe)>; });
  if (kernel == nullptr) result.error = cudaErrorInvalidDeviceFunction;

  for (std::uint32_t first = 0, first_chunk = 0; first < step.tensors && !result.error;) {
    const std::uint32_t last = min_of(first + kTensorsPerLaunch, step.tensors);
    std::uint32_t last_chunk = first_chunk;
    bool any_grad = false;
    for (std::uint32_t tensor = first; tensor < last; ++tensor) {
      last_chunk += step.rows[tensor].chunks;
      any_grad |= step.grads[tensor] != nullptr;
    }
    if (any_grad) {
      result.error = launch(kernel, args, step, first, last, first_chunk, last_chunk,
                            static_cast<cudaStream_t>(stream));
      ++result.launches;
    }
    first = last;
    first_chunk = last_chunk;
  }
  return result;
}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

bool cuda_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

int cuda_copy_to_device(void* to, const void* from, std::size_t bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice,
                         static_cast<cudaStream_t>(stream));
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace warpstep
