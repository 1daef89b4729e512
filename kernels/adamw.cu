// The CUDA kernel of the step: every tensor of a recipe on a device in one launch.
//
// A block takes one chunk: one thread works out the constants of the chunk's tensor, all threads
// then walk the elements with 16-byte accesses. What is stable lies in device memory since plan
// time; what changes each step (gradient addresses, hyper-parameters) travels in the arguments, so
// a captured graph holds it by value.
//
// There are two kernels for each recipe: a plain one, and one with the tail, whose parts are told
// apart at run time (all threads of a launch go the same way).
#include "launch_cuda.cuh"
#include "rule.h"

namespace warpstep {
namespace {

// Reads the step counter; the last of the tensor's blocks to have read it advances it. All of them
// have read it by then: their reads come before their arrivals, and the last arrival before the
// write.
__device__ __forceinline__ float take_step(const TensorRow& row, std::uint32_t* arrivals) {
  const float step = *row.step;
  if (row.chunks == 1) {
    *row.step = step + 1;
  } else if (atomic_add_acq_rel(arrivals, 1) == row.chunks - 1) {
    *arrivals = 0;
    *row.step = step + 1;
  }
  return step;
}

// A thread's share of Tail::statistics.
struct Sums {
  double grad, param, change, not_finite;
};

// The streams of one tensor, and the step of a few consecutive elements of it.
template <class Recipe, bool kTail>
struct Streams {
  using T = typename Recipe::Compute;
  using Param = typename Recipe::Param;
  using Grad = typename Recipe::Grad;
  using Moment = typename Recipe::Moment;

  Param* param;
  Grad* grad;
  Moment* exp_avg;
  Moment* exp_avg_sq;
  Moment* max_exp_avg_sq;
  void* ema;

  struct Aligned {
    bool param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema;
    __device__ __forceinline__ bool all() const {
      return param && grad && exp_avg && exp_avg_sq && max_exp_avg_sq && ema;
    }
  };

  __device__ __forceinline__ Aligned alignment_at(std::int64_t i, const Tail& tail) const {
    return {
        is_aligned(param + i),
        is_aligned(grad + i),
        is_aligned(exp_avg + i),
        is_aligned(exp_avg_sq + i),
        !Recipe::amsgrad || is_aligned(max_exp_avg_sq + i),
        !kTail || !tail.has_ema || is_aligned(static_cast<char*>(ema) + i * bytes_of(tail.ema))};
  }

  template <std::uint32_t kElements>
  __device__ __forceinline__ void step(const Constants<T>& constants, const Tail& tail, bool taken,
                                       std::int64_t i, const Aligned& aligned, Sums& sums) const {
    Packet<Param, kElements> p;
    Packet<Grad, kElements> g;
    Packet<Moment, kElements> m, v, peak;
    p.load(param + i, aligned.param);
    g.load(grad + i, aligned.grad);
    m.load(exp_avg + i, aligned.exp_avg);
    v.load(exp_avg_sq + i, aligned.exp_avg_sq);
    if constexpr (Recipe::amsgrad) peak.load(max_exp_avg_sq + i, aligned.max_exp_avg_sq);
    // The average too before anything waits for an operand: one memory latency, not two.
    T average[kElements];
    const bool averages = kTail && taken && tail.has_ema;
    if (averages) {
      in_format_of_average(tail, [&](auto format) {
        Packet<decltype(format), kElements> e;
        e.load(in_global_memory<decltype(format)>(ema) + i, aligned.ema);
#pragma unroll
        for (std::uint32_t k = 0; k < kElements; ++k) average[k] = T(warpstep::load(e.elements[k]));
      });
    }

#pragma unroll
    for (std::uint32_t k = 0; k < kElements; ++k) {
      const T before = warpstep::load(p.elements[k]);
      const T gradient = T(warpstep::load(g.elements[k]));
      Moments<T> moments{warpstep::load(m.elements[k]), warpstep::load(v.elements[k]), T(0)};
      if constexpr (Recipe::amsgrad) moments.max_exp_avg_sq = warpstep::load(peak.elements[k]);
      const T result = adamw_rule<Recipe::amsgrad, kTail ? Part::whole : Part::uniform>(
          constants, before, gradient, moments);
      if (!kTail || taken) {
        warpstep::store(result, p.elements[k]);
        warpstep::store(moments.exp_avg, m.elements[k]);
        warpstep::store(moments.exp_avg_sq, v.elements[k]);
        if constexpr (Recipe::amsgrad) {
          warpstep::store(moments.max_exp_avg_sq, peak.elements[k]);
        }
      }
      if constexpr (kTail) {
        if (tail.statistics != nullptr) count(sums, before, p.elements[k], g.elements[k]);
        if (tail.grads_after == GradsAfter::zeroed) g.elements[k] = Grad{};
        if (leaves_unscaled(tail, taken)) {
          using G = typename Grad::Compute;
          warpstep::store(warpstep::load(g.elements[k]) * static_cast<G>(constants.grad_left),
                          g.elements[k]);
        }
      }
    }

    if (!kTail || taken) {
      p.store(param + i, aligned.param);
      m.store(exp_avg + i, aligned.exp_avg);
      v.store(exp_avg_sq + i, aligned.exp_avg_sq);
      if constexpr (Recipe::amsgrad) peak.store(max_exp_avg_sq + i, aligned.max_exp_avg_sq);
    }
    if constexpr (kTail) {
      if (averages) {
        in_format_of_average(tail, [&](auto format) {
          Packet<decltype(format), kElements> e;
#pragma unroll
          for (std::uint32_t k = 0; k < kElements; ++k) {
            const T now = warpstep::load(p.elements[k]);  // the parameter as it is stored
            warpstep::store(lerp(average[k], now, constants.ema_weight, constants.ema_kept,
                                 constants.ema_weight < T(0.5)),
                            e.elements[k]);
          }
          e.store(in_global_memory<decltype(format)>(ema) + i, aligned.ema);
        });
      }
      if (tail.grads_after == GradsAfter::zeroed || leaves_unscaled(tail, taken)) {
        g.store(grad + i, aligned.grad);
      }
    }
  }

  __device__ __forceinline__ static void count(Sums& sums, T before, Param after, Grad gradient) {
    const double g = warpstep::load(gradient);
    const double p = warpstep::load(after);
    const double change = p - static_cast<double>(before);
    sums.grad += g * g;
    sums.param += p * p;
    sums.change += change * change;
    sums.not_finite += is_finite(warpstep::load(gradient)) ? 0 : 1;
  }

  // Averages are of the parameter's format, or float32.
  template <class Visit>
  __device__ __forceinline__ static void in_format_of_average(const Tail& tail, Visit&& visit) {
    if (tail.ema == Param::format) {
      visit(Param{});
    } else if constexpr (Param::format != Format::float32) {
      visit(float32{});
    }
  }
};

// Blocks that share a multiprocessor, which limits a thread's registers to what needs no local
// memory: 64 for four, 80 for three, 128 for two.
template <class Recipe, bool kTail>
constexpr int resident_blocks() {
  if (Recipe::Param::format == Format::float64) return kTail && Recipe::amsgrad ? 1 : 2;
  if (kTail) return 2;
  const bool is_narrow = sizeof(typename Recipe::Param) + sizeof(typename Recipe::Grad) +
                             sizeof(typename Recipe::Moment) <
                         3 * sizeof(float);
  return is_narrow || Recipe::amsgrad ? 3 : 4;
}

template <class Recipe, bool kTail>
__global__ void __launch_bounds__(kCudaThreads, resident_blocks<Recipe, kTail>())
    adamw_kernel(const __grid_constant__ Arguments args) {
  using T = typename Recipe::Compute;
  const Tail& tail = args.tail;
  const std::uint32_t chunk_index = args.first_chunk + blockIdx.x;
  const Chunk chunk = args.chunks[chunk_index];
  double* const statistics = kTail && tail.statistics != nullptr
                                 ? tail.statistics + std::uint64_t{chunk_index} * kStatistics
                                 : nullptr;
  void* const grad = grad_of(args, chunk.tensor);
  if (grad == nullptr) {
    if (statistics != nullptr && threadIdx.x < kStatistics) {
      statistics[threadIdx.x] = threadIdx.x == 3 ? -1 : 0;
    }
    return;
  }
  const bool taken = is_taken(tail);
  if (!kTail && !taken) return;
  const TensorRow row = args.rows[chunk.tensor];

  __shared__ Constants<T> shared_constants;
  if (threadIdx.x == 0) {
    const Hyper hyper = hyper_of(args, row.group);  // whole: no load waits for another
    const float step =
        taken && !tail.steps_advanced ? take_step(row, args.arrivals + chunk.tensor) : *row.step;
    shared_constants = constants_of<T>(hyper, step, tail);
  }
  __syncthreads();
  const Constants<T> constants = shared_constants;

  using S = Streams<Recipe, kTail>;
  const S streams{in_global_memory<typename S::Param>(row.param),
                  in_global_memory<typename S::Grad>(grad),
                  in_global_memory<typename S::Moment>(row.exp_avg),
                  in_global_memory<typename S::Moment>(row.exp_avg_sq),
                  in_global_memory<typename S::Moment>(row.max_exp_avg_sq),
                  row.ema};

  // As many elements at a time as fill one vector of the narrowest stream.
  constexpr std::uint32_t kNarrowest = min_of(
      sizeof(typename S::Param), min_of(sizeof(typename S::Grad), sizeof(typename S::Moment)));
  constexpr std::uint32_t kElements = kVectorBytes / kNarrowest;

  const ChunkRange range = chunk_range(row, chunk.index, args.chunk_size);
  const std::uint32_t size = static_cast<std::uint32_t>(range.end - range.begin);
  const std::uint32_t head = chunk.index == 0 ? min_of(row.head, size) : 0;
  const std::uint32_t vectors = (size - head) / kElements;
  const std::uint32_t rest = size - head - vectors * kElements;
  Sums sums{};

  // Head and tail, a thread an element.
  constexpr typename S::Aligned kScalar{};
  if (threadIdx.x < head + rest) {
    const std::uint32_t i = threadIdx.x < head ? threadIdx.x : vectors * kElements + threadIdx.x;
    streams.template step<1>(constants, tail, taken, range.begin + i, kScalar, sums);
  }

  const std::int64_t body = range.begin + head;
  const typename S::Aligned aligned = streams.alignment_at(body, tail);
  if (aligned.all()) {
    constexpr typename S::Aligned kAll{true, true, true, true, true, true};
    for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      streams.template step<kElements>(constants, tail, taken, body + i * kElements, kAll, sums);
    }
  } else {
    for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      streams.template step<kElements>(constants, tail, taken, body + i * kElements, aligned, sums);
    }
  }

  if (statistics != nullptr) {
    const double unscale = shared_constants.unscale;  // in no register until now
    const double totals[kStatistics] = {sum_block(sums.grad) * unscale * unscale,
                                        sum_block(sums.param), sum_block(sums.change),
                                        sum_block(sums.not_finite)};
    if (threadIdx.x == 0) {
      for (std::uint32_t k = 0; k < kStatistics; ++k) statistics[k] = totals[k];
    }
  }
}

// Whether the plain kernel does not do.
bool needs_tail(const Launch& launch) {
  const Tail& tail = launch.tail;
  if (tail.has_ema || tail.statistics != nullptr || tail.grads_after != GradsAfter::kept) {
    return true;
  }
  for (std::uint32_t group = 0; group < launch.groups; ++group) {
    if (is_selective(launch.hypers[group].decay)) return true;
  }
  return false;
}

}  // namespace

CudaResult adamw_cuda(const Launch& launch, const CudaTables& tables, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error) return {guard.error, 0};

  Arguments args{};
  args.rows = static_cast<const TensorRow*>(tables.rows);
  args.chunks = static_cast<const Chunk*>(tables.chunks);
  args.arrivals = static_cast<std::uint32_t*>(tables.arrivals);
  args.tail = launch.tail;

  Kernel kernel = nullptr;
  visit_recipe(launch.recipe, [&](auto recipe) {
    using Recipe = decltype(recipe);
    kernel = needs_tail(launch) ? adamw_kernel<Recipe, true> : adamw_kernel<Recipe, false>;
  });
  if (kernel == nullptr) return {cudaErrorInvalidDeviceFunction, 0};
  const bool needs_grads = launch.tail.statistics == nullptr;  // else there is none to be noted
  return launch_all(kernel, args, launch, needs_grads, static_cast<cudaStream_t>(stream));
}

const char* cuda_architectures() { return WARPSTEP_CUDA_ARCHITECTURES; }
const char* cuda_device_type() { return WARPSTEP_CUDA_DEVICE_TYPE; }
const char* why_no_cuda() { return ""; }

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string cuda_device_reason(int device) {
  const DeviceGuard guard(device);
  int error = guard.error, driver = 0, major = 0;
  if (!error) error = cudaDriverGetVersion(&driver);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error && (driver < 12010 || major < 7)) {
    return "a kernel has 32 KB of arguments from compute capability 7.0 and CUDA 12.1 on, and its "
           "is " +
           std::to_string(major) + ".x, its driver's CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10);
  }
  cudaFuncAttributes attributes;  // of any kernel: all are in one image
  const auto kernel = adamw_kernel<Recipe<float32, float32, float32, false>, false>;
  if (!error) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (!error) return "";
  cudaGetLastError();  // and forgets it
  return std::string("the CUDA kernels do not load there: ") + cuda_error_text(error);
}

bool cuda_is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace warpstep
