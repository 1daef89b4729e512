// The CUDA kernel of the step: every tensor of a recipe on a device in one launch.
//
// A block takes one chunk: one thread works out the constants of the chunk's tensor, all threads
// then walk the elements with 16-byte accesses. What is stable lies in device memory since plan
// time; what changes each step (gradient addresses, hyper-parameters) travels in the arguments, so
// a captured graph holds it by value.
//
// There are two kernels for each recipe: a plain one, and one with the tail, whose parts are told
// apart at run time (all threads of a launch go the same way).
#include <utility>

#include "../recipes.h"
#include "block.cuh"

namespace warpstep {
namespace {

// Packets of a tensor's moments, each in its format. `Indices` count them.
template <std::uint32_t kElements, std::size_t kIndex, class Moment>
struct MomentPacket {
  Packet<Moment, kElements> packet;
};
template <std::uint32_t kElements, class Indices, class... Moment>
struct MomentPackets;
template <std::uint32_t kElements, std::size_t... kIndex, class... Moment>
struct MomentPackets<kElements, std::index_sequence<kIndex...>, Moment...>
    : MomentPacket<kElements, kIndex, Moment>... {
  __device__ __forceinline__ void load(const Operands& operands, [[maybe_unused]] std::int64_t i,
                                       const Aligned& aligned) {
    (packet<kIndex, Moment>().load(operands.template of<Moment>(kMoment + kIndex) + i,
                                   aligned.operands[kMoment + kIndex]),
     ...);
  }
  __device__ __forceinline__ void store(const Operands& operands, [[maybe_unused]] std::int64_t i,
                                        const Aligned& aligned) {
    (packet<kIndex, Moment>().store(operands.template of<Moment>(kMoment + kIndex) + i,
                                    aligned.operands[kMoment + kIndex]),
     ...);
  }
  template <class T>
  __device__ __forceinline__ void numbers_of([[maybe_unused]] std::uint32_t k,
                                             [[maybe_unused]] T* numbers) {
    ((numbers[kIndex] = warpstep::load(packet<kIndex, Moment>().elements[k])), ...);
  }
  template <class T>
  __device__ __forceinline__ void set([[maybe_unused]] std::uint32_t k,
                                      [[maybe_unused]] const T* numbers) {
    (warpstep::store(numbers[kIndex], packet<kIndex, Moment>().elements[k]), ...);
  }

 private:
  template <std::size_t kOne, class One>
  __device__ __forceinline__ Packet<One, kElements>& packet() {
    return static_cast<MomentPacket<kElements, kOne, One>*>(this)->packet;
  }
};

// The operands of one tensor, and the step of a few consecutive elements of it.
template <class Recipe, bool kTail>
struct Stepper;

template <class Rule, class Param, class Grad, class... Moment, bool kTail>
struct Stepper<Recipe<Rule, Param, Grad, Moment...>, kTail> {
  using T = typename Param::Compute;

  Operands operands;
  Format ema;

  // As many elements at a time as fill one vector of the narrowest operand.
  __host__ __device__ static constexpr std::uint32_t narrowest() {
    std::uint32_t least = min_of(sizeof(Param), sizeof(Grad));
    ((least = min_of<std::uint32_t>(least, sizeof(Moment))), ...);
    return least;
  }
  static constexpr std::uint32_t kElements = kVectorBytes / narrowest();

  __device__ __forceinline__ Aligned alignment_at(std::int64_t i) const {
    Aligned aligned = all_aligned();
    aligned.operands[kParam] = is_aligned(operands.template of<Param>(kParam) + i);
    aligned.operands[kGrad] = is_aligned(operands.template of<Grad>(kGrad) + i);
    constexpr std::uint32_t kBytes[kMomentEnd - kMoment] = {sizeof(Moment)...};
#pragma unroll
    for (std::uint32_t k = 0; k < kMomentEnd - kMoment; ++k) {
      aligned.operands[kMoment + k] =
          kBytes[k] == 0 || is_aligned(operands.template of<char>(kMoment + k) + i * kBytes[k]);
    }
    aligned.operands[kEma] =
        !kTail || is_aligned(operands.template of<char>(kEma) + i * bytes_of(ema));
    return aligned;
  }

  template <std::uint32_t kElements>
  __device__ __forceinline__ void step(const Constants<Rule, T>& constants, const Tail& tail,
                                       bool taken, std::int64_t i, const Aligned& aligned,
                                       Sums& sums) const {
    Packet<Param, kElements> p;
    Packet<Grad, kElements> g;
    MomentPackets<kElements, std::index_sequence_for<Moment...>, Moment...> m;
    p.load(operands.template of<Param>(kParam) + i, aligned.operands[kParam]);
    g.load(operands.template of<Grad>(kGrad) + i, aligned.operands[kGrad]);
    m.load(operands, i, aligned);
    // The average too before anything waits for an operand: one memory latency, not two.
    T average[kElements];
    const bool averages = kTail && taken && ema != Format::none;
    if (averages) {
      in_format_of_average([&](auto format) {
        Packet<decltype(format), kElements> e;
        e.load(operands.template of<decltype(format)>(kEma) + i, aligned.operands[kEma]);
#pragma unroll
        for (std::uint32_t k = 0; k < kElements; ++k) average[k] = T(warpstep::load(e.elements[k]));
      });
    }

    T before[kElements];
#pragma unroll
    for (std::uint32_t k = 0; k < kElements; ++k) before[k] = warpstep::load(p.elements[k]);
    if (!kTail || taken) {
#pragma unroll
      for (std::uint32_t k = 0; k < kElements; ++k) {
        const T gradient = T(warpstep::load(g.elements[k]));
        T moments[sizeof...(Moment) + 1];
        m.numbers_of(k, moments);
        constexpr Part kPart = kTail ? Part::whole : Part::uniform;
        warpstep::store(stepped<Rule, kPart>(constants, before[k], gradient, moments),
                        p.elements[k]);
        m.set(k, moments);
      }
    }
    if constexpr (kTail) {
#pragma unroll
      for (std::uint32_t k = 0; k < kElements; ++k) {
        if (tail.statistics != nullptr) count(sums, before[k], p.elements[k], g.elements[k]);
        if (tail.grads_after == GradsAfter::zeroed) g.elements[k] = Grad{};
        if (leaves_unscaled(tail, taken)) {
          using G = typename Grad::Compute;
          warpstep::store(warpstep::load(g.elements[k]) * static_cast<G>(constants.tail.grad_left),
                          g.elements[k]);
        }
      }
    }

    if (!kTail || taken) {
      p.store(operands.template of<Param>(kParam) + i, aligned.operands[kParam]);
      m.store(operands, i, aligned);
    }
    if constexpr (kTail) {
      if (averages) {
        in_format_of_average([&](auto format) {
          Packet<decltype(format), kElements> e;
#pragma unroll
          for (std::uint32_t k = 0; k < kElements; ++k) {
            const T now = warpstep::load(p.elements[k]);  // the parameter as it is stored
            warpstep::store(averaged(constants.tail, average[k], now), e.elements[k]);
          }
          e.store(operands.template of<decltype(format)>(kEma) + i, aligned.operands[kEma]);
        });
      }
      if (tail.grads_after == GradsAfter::zeroed || leaves_unscaled(tail, taken)) {
        g.store(operands.template of<Grad>(kGrad) + i, aligned.operands[kGrad]);
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
  __device__ __forceinline__ void in_format_of_average(Visit&& visit) const {
    if (ema == Param::format) {
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
  constexpr bool kMany = Recipe::Rule::kMoments > 2;
  if (Recipe::Param::format == Format::float64) return kTail && kMany ? 1 : 2;
  if (kTail) return 2;
  return Stepper<Recipe, kTail>::narrowest() < sizeof(float) || kMany ? 3 : 4;
}

template <class Recipe, bool kTail>
__global__ void __launch_bounds__(kCudaThreads, resident_blocks<Recipe, kTail>())
    step_kernel(const __grid_constant__ KernelArguments args) {
  using S = Stepper<Recipe, kTail>;
  constexpr std::uint32_t kElements = S::kElements;
  step_chunk<typename Recipe::Rule, typename Recipe::Compute, kTail>(
      args, [](const TensorRow& row, void* grad, std::int64_t) { return Operands(row, grad); },
      [&](const Operands& operands, const auto& constants, const BlockChunk& chunk, Sums& sums) {
        const Tail& tail = args.tail;
        const S stepper{operands, args.formats[kEma]};
        const std::uint32_t vectors = (chunk.size - chunk.head) / kElements;
        const std::uint32_t rest = chunk.size - chunk.head - vectors * kElements;

        // Head and rest, a thread an element.
        constexpr Aligned kScalar{};
        if (threadIdx.x < chunk.head + rest) {
          const std::uint32_t i =
              threadIdx.x < chunk.head ? threadIdx.x : vectors * kElements + threadIdx.x;
          stepper.template step<1>(constants, tail, chunk.taken, chunk.begin + i, kScalar, sums);
        }

        const std::int64_t body = chunk.begin + chunk.head;
        const Aligned aligned = stepper.alignment_at(body);
        if (aligned.all()) {
          constexpr Aligned kAll = all_aligned();
          for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
            stepper.template step<kElements>(constants, tail, chunk.taken, body + i * kElements,
                                             kAll, sums);
          }
        } else {
          for (std::uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
            stepper.template step<kElements>(constants, tail, chunk.taken, body + i * kElements,
                                             aligned, sums);
          }
        }
      });
}

// Whether the plain kernel does not do.
bool needs_tail(const Launch& launch) {
  const Tail& tail = launch.tail;
  const bool averages = launch.recipe.formats[kEma] != Format::none;
  if (averages || tail.statistics != nullptr || tail.grads_after != GradsAfter::kept) {
    return true;
  }
  for (std::uint32_t group = 0; group < launch.groups; ++group) {
    if (is_selective(launch.hypers[group].decay)) return true;
  }
  return false;
}

}  // namespace

CudaResult step_cuda(const Launch& launch, const CudaTables& tables, void* stream) {
  const bool with_tail = needs_tail(launch);
  Kernel kernel = nullptr;
  visit_recipe(launch.recipe, [&](auto recipe) {
    using Recipe = decltype(recipe);
    kernel = with_tail ? step_kernel<Recipe, true> : step_kernel<Recipe, false>;
  });
  return kernel != nullptr ? launch_step(kernel, launch, tables, stream)
                           : step_tiles_cuda(launch, tables, with_tail, stream);
}

const char* cuda_architectures() { return WARPSTEP_CUDA_ARCHITECTURES; }
const char* cuda_device_type() { return WARPSTEP_CUDA_DEVICE_TYPE; }
const char* why_no_cuda() { return ""; }

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int cuda_current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

std::string cuda_device_reason(int device) {
  int driver = 0, major = 0;
  int error = cudaDriverGetVersion(&driver);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error && (driver < 12010 || major < 7)) {
    return "a kernel has 32 KB of arguments from compute capability 7.0 and CUDA 12.1 on, and its "
           "is " +
           std::to_string(major) + ".x, its driver's CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10);
  }
  cudaFuncAttributes attributes;  // of any kernel: all are in one image
  const auto kernel = step_kernel<Recipe<AdamW<false>, float32, float32, float32, float32>, false>;
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
