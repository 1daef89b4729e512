// The CUDA kernel of the step for operands of any format: those recipes that have no kernel in
// step.cu (recipes.h, visit_tiled).
//
// A thread takes eight elements at a time: decoded to float32, stepped, encoded. Eight neighbouring
// threads have a block of 64 numbers of 8 bits, whose maximum they find by shuffles.
#include "../recipes.h"
#include "block.cuh"
#include "eight_elements.cuh"

namespace warpstep {
namespace {

// The formats of a launch: as it says, or constants.
struct AnyFormats {
  static constexpr bool kAreConstants = false;
  __device__ __forceinline__ static Format of(const Arguments& args, std::uint32_t operand) {
    return args.formats[operand];
  }
};

// Parameters (float32 ones in two operands of 16 bits, where there is a residual), gradients, copy,
// moments.
template <Format kParamFormat, Format kResidualFormat, Format kGradFormat, Format kCopyFormat,
          Format... kMomentFormats>
struct TheseFormats {
  static constexpr bool kAreConstants = true;
  WARPSTEP_FN static constexpr Format of(std::uint32_t operand) {
    constexpr Format kMoments[kMomentEnd - kMoment] = {kMomentFormats...};
    if (operand >= kMoment && operand < kMomentEnd) return kMoments[operand - kMoment];
    if (operand >= kScale && operand < kScaleEnd) {
      return is_in_blocks(kMoments[operand - kScale]) ? Format::uint8 : Format::none;
    }
    return operand == kParam      ? kParamFormat
           : operand == kResidual ? kResidualFormat
           : operand == kGrad     ? kGradFormat
           : operand == kCopy     ? kCopyFormat
                                  : Format::none;
  }
  WARPSTEP_FN static constexpr Format of(const Arguments&, std::uint32_t operand) {
    return of(operand);
  }
  static bool are_of(const RecipeKey& key) {
    bool same = true;
    for (std::uint32_t k = 0; k < kOperands; ++k) same = same && key.formats[k] == of(k);
    return same;
  }
};

// What threads need in every iteration and have no registers for: in shared memory, and volatile so
// that the compiler does not keep it in registers all the same.
template <bool kTail>
struct Shared {
  void* operands[kOperands];  // addresses of the chunk's first elements
  std::int64_t first;         // where that is in the whole tensor
  std::uint32_t number;
  double sums[kStatistics][kTail ? kCudaThreads : 1];  // as in Sums
  float before[kEight][kTail ? kCudaThreads : 1];      // parameters, for the statistics
};

// Offsets `i` count elements of the chunk.
template <class Rule, class Formats, bool kTail>
class TileStepper {
 public:
  using C = Constants<Rule, float>;

  __device__ __forceinline__ TileStepper(const Arguments& args, const C& constants,
                                         const BlockChunk& chunk, volatile Shared<kTail>& shared)
      : args_(args), c_(constants), chunk_(chunk), shared_(shared) {}

  // All elements of the chunk.
  __device__ __forceinline__ void walk() const {
    // First what is in no whole vector (in blocks: in none that a whole warp has), or in none that
    // is aligned in all operands. The threads of a block of 64 go through it together, those too
    // that have no elements.
    const std::uint32_t head = chunk_.head, size = chunk_.size;
    const std::uint32_t unit = has_blocks() ? kWarp * kEight : kEight;
    const std::uint32_t whole = is_aligned_at(head) ? (size - head) / unit * unit : 0;
    const std::uint32_t after = head + whole;
    if (whole != size) {
      const std::uint32_t slots = kBlock + (size - after + kBlock - 1) / kBlock * kBlock;
      for (std::uint32_t slot = threadIdx.x * kEight; slot < slots; slot += kCudaThreads * kEight) {
        const bool is_head = slot < kBlock;
        const std::uint32_t i = is_head ? 0 : after + slot - kBlock;
        const std::uint32_t end = slot == 0 ? head : is_head ? 0 : size;
        step<false>(i, Which<false>{i < end ? min_of(kEight, end - i) : 0});
      }
    }
    constexpr Which<true> kEach{kEight};
    const bool quick = may_be_quick();
    for (std::uint32_t i = head + threadIdx.x * kEight; i < after; i += kCudaThreads * kEight) {
      if (!quick || !step<kHasQuick>(i, kEach)) step<false>(i, kEach);
    }
  }

 private:
  __device__ __forceinline__ FormatOf format(std::uint32_t operand) const {
    return {operand, Formats::of(args_, operand)};
  }
  __device__ __forceinline__ bool has(std::uint32_t operand) const {
    return !format(operand).is(Format::none);
  }
  __device__ __forceinline__ bool has_blocks() const {
    bool has = false;
#pragma unroll
    for (std::uint32_t k = 0; k < Rule::kMoments; ++k) {
      has = has || format(kMoment + k).is_in_blocks();
    }
    return has;
  }
  __device__ __forceinline__ char* address(std::uint32_t operand, std::uint32_t i) const {
    return in_global_memory<char>(shared_.operands[operand]) +
           std::uint64_t{i} * bytes_of(format(operand).format);
  }
  __device__ __forceinline__ std::uint8_t* scale_at(std::uint32_t k, std::uint32_t i) const {
    return in_global_memory<std::uint8_t>(shared_.operands[kScale + k]) + i / kBlock;
  }

  // Whether vectors begin at an element in every operand, and draws of random bits.
  __device__ __forceinline__ bool is_aligned_at(std::uint32_t i) const {
    std::uintptr_t past = 0;
#pragma unroll
    for (std::uint32_t k = 0; k < kOperands; ++k) {
      if (!has(k) || (k >= kScale && k < kScaleEnd)) continue;
      const auto at = reinterpret_cast<std::uintptr_t>(address(k, i));
      past |= at % min_of(kVectorBytes, kEight * bytes_of(format(k).format));
      if (format(k).is_stochastic()) past |= (shared_.first + i) % kDrawn;
    }
    return past == 0;
  }

  // The random bits of an operand's elements from some element on.
  template <bool kAll>
  __device__ __forceinline__ void draw_for(std::uint32_t operand, std::uint32_t i,
                                           Random& random) const {
    const Draw from(args_.keys, chunk_.step, shared_.number, operand);
    const std::uint64_t first = static_cast<std::uint64_t>(shared_.first + i);
    draw(from, first / kDrawn, random);
    if (kAll) return;
    // Those of eight elements from the middle of one draw to that of the next.
    std::uint32_t words[kDrawn];
    Random next;
    draw(from, first / kDrawn + 1, next);
#pragma unroll
    for (std::uint32_t k = 0; k < kDrawn / 2; ++k) {
      words[k] = random[k];
      words[k + kDrawn / 2] = next[k];
    }
#pragma unroll
    for (std::uint32_t ahead = 2; ahead > 0; --ahead) {
#pragma unroll
      for (std::uint32_t k = 0; k + ahead < kDrawn; ++k) {
        if (first & 2 * ahead) words[k] = words[k + ahead];
      }
    }
#pragma unroll
    for (std::uint32_t k = 0; k < kDrawn / 2; ++k) {
      random[k] = first & 1 ? words[k] >> 16 | words[k + 1] << 16 : words[k];
    }
  }

  template <bool kAll>
  __device__ __forceinline__ Bits load(std::uint32_t operand, std::uint32_t i,
                                       Which<kAll> which) const {
    Bits bits;
    bits.load(format(operand), address(operand, i), which);
    return bits;
  }
  template <bool kAll>
  __device__ __forceinline__ void store(std::uint32_t operand, std::uint32_t i, Which<kAll> which,
                                        const Bits& bits) const {
    bits.store(format(operand), address(operand, i), which);
  }

  // Whether a step of usual elements is there: where formats are constants, since it is the kernels
  // with 8-bit moments that are bound by instructions.
  static constexpr bool kHasQuick = !kTail && Formats::kAreConstants;
  __device__ __forceinline__ bool may_be_quick() const {
    if constexpr (!kHasQuick)
      return false;
    else
      return c_.is_usual() && c_.rule.may_be_in_range() && is_finite(c_.decay.decay);
  }

  // Eight elements from `i` on. With `kUsual` by fewer instructions, if all of them (of a whole
  // warp, if there are blocks) are usual; if not, writes nothing and returns false.
  template <bool kUsual, bool kAll>
  __device__ __forceinline__ bool step(std::uint32_t i, Which<kAll> which) const {
    const bool taken = !kTail || chunk_.taken;
    const bool has_residual = has(kResidual);

    // All that is loaded, before anything waits for it.
    Bits param = load(kParam, i, which);
    if (has_residual) {
      param.load(format(kResidual), address(kResidual, i), which, kResidualWord);
    }
    Bits grad = load(kGrad, i, which);
    Bits moments[Rule::kMoments + 1];
#pragma unroll
    for (std::uint32_t k = 0; k < Rule::kMoments; ++k) {
      moments[k] = load(kMoment + k, i, which);
      if (format(kMoment + k).is_in_blocks() && which.count != 0) {
        moments[k].words[kScaleWord] = *scale_at(k, i);
      }
    }
    const bool averages = kTail && taken && has(kEma);
    Bits average;
    if (averages && kAll) average = load(kEma, i, which);

    Eight p, g;
    float m[kEight][Rule::kMoments + 1];
    std::uint32_t unusual = decode<kUsual>(format(kParam), has_residual, param, p);
    decode<kUsual>(format(kGrad), false, grad, g);
    if constexpr (kTail) leave_gradients(i, which, g);
    const bool counts = kTail && args_.tail.statistics != nullptr;
    if constexpr (kTail) {
      if (counts) {
#pragma unroll
        for (std::uint32_t k = 0; k < kEight; ++k) shared_.before[k][threadIdx.x] = p[k];
      }
    }
    if (taken) {
#pragma unroll
      for (std::uint32_t j = 0; j < Rule::kMoments; ++j) {
        Eight numbers;
        unusual |= decode<kUsual>(format(kMoment + j), false, moments[j], numbers);
#pragma unroll
        for (std::uint32_t k = 0; k < kEight; ++k) m[k][j] = numbers[k];
      }
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) {
        constexpr Part kPart = kUsual ? Part::in_range : kTail ? Part::whole : Part::uniform;
        p[k] = stepped<Rule, kPart>(c_, p[k], g[k], m[k]);
      }
      if constexpr (kUsual) {
        typename Rule::InRange in_range;
#pragma unroll
        for (std::uint32_t k = 0; k < kEight; ++k) in_range.add(p[k], m[k]);
        const bool are_usual = unusual == 0 && in_range.are(c_.rule.eps_hat);
        // A block of 64 goes one way together.
        if (!(has_blocks() ? __all_sync(~0u, are_usual) : are_usual)) return false;
      }
      leave_param<kUsual>(i, which, p, param);
      leave_moments<kUsual>(i, which, m, moments);
      // From here on the parameter is what is stored.
      if (kTail || has(kCopy)) decode(format(kParam), has_residual, param, p);
      if (averages) {
        if (!kAll) average = load(kEma, i, which);
        Eight numbers;
        decode(format(kEma), false, average, numbers);
#pragma unroll
        for (std::uint32_t k = 0; k < kEight; ++k) numbers[k] = averaged(c_.tail, numbers[k], p[k]);
        encode(format(kEma), false, numbers, which, [](Random&) {}, average);
        store(kEma, i, which, average);
      }
      if (has(kCopy)) {
        Bits copy;
        encode(format(kCopy), false, p, which, [](Random&) {}, copy);
        store(kCopy, i, which, copy);
      }
    }
    if constexpr (kTail) {
      if (!counts) return true;
      double params = 0, changes = 0;
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) {
        const double after = p[k], change = after - shared_.before[k][threadIdx.x];
        params += which.has(k) ? after * after : 0;
        changes += which.has(k) ? change * change : 0;
      }
      add_up(1, params);
      add_up(2, changes);
    }
    return true;
  }

  template <bool kUsual, bool kAll>
  __device__ __forceinline__ void leave_param(std::uint32_t i, Which<kAll> which, const Eight& p,
                                              Bits& param) const {
    const bool has_residual = has(kResidual);
    encode<kUsual>(
        format(kParam), has_residual, p, which,
        [&](Random& random) { draw_for<kAll>(kParam, i, random); }, param);
    store(kParam, i, which, param);
    if (has_residual) {
      param.store(format(kResidual), address(kResidual, i), which, kResidualWord);
    }
  }

  template <bool kUsual, bool kAll>
  __device__ __forceinline__ void leave_moments(std::uint32_t i, Which<kAll> which,
                                                const float (&m)[kEight][Rule::kMoments + 1],
                                                Bits (&moments)[Rule::kMoments + 1]) const {
#pragma unroll
    for (std::uint32_t j = 0; j < Rule::kMoments; ++j) {
      Eight numbers;
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) numbers[k] = m[k][j];
      encode<kUsual>(
          format(kMoment + j), false, numbers, which,
          [&](Random& random) { draw_for<kAll>(kMoment + j, i, random); }, moments[j]);
      store(kMoment + j, i, which, moments[j]);
    }
    if (!has_blocks()) return;
    // The threads have read the scales that one of them overwrites.
    __syncwarp(threads_of_block<kAll>());
    const bool is_first = threadIdx.x % kBlockThreads == 0;
#pragma unroll
    for (std::uint32_t j = 0; j < Rule::kMoments; ++j) {
      if (format(kMoment + j).is_in_blocks() && is_first && which.count != 0) {
        *scale_at(j, i) = static_cast<std::uint8_t>(moments[j].words[kScaleWord]);
      }
    }
  }

  // The gradients' part of the tail.
  template <bool kAll>
  __device__ __forceinline__ void leave_gradients(std::uint32_t i, Which<kAll> which,
                                                  const Eight& g) const {
    const Tail& tail = args_.tail;
    if (tail.statistics != nullptr) {
      double grads = 0;
      std::uint32_t not_finite = 0;
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) {
        const double gradient = g[k];
        grads += which.has(k) ? gradient * gradient : 0;
        not_finite += which.has(k) && !is_finite(g[k]);
      }
      add_up(0, grads);
      add_up(3, not_finite);
    }
    const bool zeroes = tail.grads_after == GradsAfter::zeroed;
    if (zeroes || leaves_unscaled(tail, chunk_.taken)) {
      Eight left;
      Bits grad;
      // An infinity, too, becomes zero.
#pragma unroll
      for (std::uint32_t k = 0; k < kEight; ++k) left[k] = zeroes ? 0 : g[k] * c_.tail.grad_left;
      encode(format(kGrad), false, left, which, [](Random&) {}, grad);
      store(kGrad, i, which, grad);
    }
  }

  __device__ __forceinline__ void add_up(std::uint32_t sum, double more) const {
    shared_.sums[sum][threadIdx.x] = shared_.sums[sum][threadIdx.x] + more;
  }

  const Arguments& args_;
  const C& c_;
  const BlockChunk& chunk_;
  volatile Shared<kTail>& shared_;
};

// Three blocks share a multiprocessor, or two, as in resident_blocks() of step.cu: 80 registers do
// where formats are constants; with room for any format a thread needs up to 128.
template <class Rule, class Formats, bool kTail>
__global__ void __launch_bounds__(kCudaThreads, Formats::kAreConstants ? 3 : 2)
    tile_kernel(const __grid_constant__ KernelArguments args) {
  __shared__ volatile Shared<kTail> shared;
  step_chunk<Rule, float, kTail>(
      args,
      [&](const TensorRow& row, void* grad, std::int64_t begin) {
        if constexpr (kTail) {
          for (std::uint32_t k = 0; k < kStatistics; ++k) shared.sums[k][threadIdx.x] = 0;
        }
        const bool looks_up = threadIdx.x == kWarp;  // while the first warp finds the constants
        if (looks_up) {
#pragma unroll
          for (std::uint32_t k = 0; k < kOperands; ++k) {
            const bool is_scale = k >= kScale && k < kScaleEnd;
            char* const first = static_cast<char*>(k == kGrad ? grad : row.operands[k]);
            shared.operands[k] =
                first + (is_scale ? begin / kBlock : begin * bytes_of(Formats::of(args, k)));
          }
          shared.first = row.first + begin;
          shared.number = row.number;
        }
        return nullptr;
      },
      [&](std::nullptr_t, const auto& constants, const BlockChunk& chunk, Sums& sums) {
        TileStepper<Rule, Formats, kTail>(args, constants, chunk, shared).walk();
        if constexpr (kTail) {
          sums = {shared.sums[0][threadIdx.x], shared.sums[1][threadIdx.x],
                  shared.sums[2][threadIdx.x], shared.sums[3][threadIdx.x]};
        }
      });
}

// Recipes of AdamW that have a plain kernel each, of fewer registers and instructions.
template <class... Types>
struct FormatsList {};
constexpr Format kNone = Format::none, kFloat32 = Format::float32, kBfloat16 = Format::bfloat16;
constexpr Format kStochastic = Format::bfloat16_stochastic, kInt16 = Format::int16;
using UsedMost =
    FormatsList<TheseFormats<kBfloat16, kInt16, kBfloat16, kNone, kFloat32, kFloat32>,
                TheseFormats<kBfloat16, kInt16, kBfloat16, kNone, kBfloat16, kStochastic>,
                TheseFormats<kBfloat16, kInt16, kBfloat16, kNone, Format::e4m3, Format::ue5m3>,
                TheseFormats<kStochastic, kNone, kBfloat16, kNone, Format::e4m3, Format::ue5m3>,
                TheseFormats<kFloat32, kNone, kBfloat16, kBfloat16, kFloat32, kFloat32>>;

template <class... Types, class Visit>
void in_kernel_of_its_own(FormatsList<Types...>, const RecipeKey& key, Visit&& visit) {
  ((Types::are_of(key) ? visit(Types{}) : void()), ...);
}

}  // namespace

CudaResult step_tiles_cuda(const Launch& launch, const CudaTables& tables, bool with_tail,
                           void* stream) {
  Kernel kernel = nullptr;
  visit_tiled(launch.recipe, [&](auto rule) {
    using Rule = decltype(rule);
    kernel = with_tail ? tile_kernel<Rule, AnyFormats, true> : tile_kernel<Rule, AnyFormats, false>;
  });
  if (kernel == nullptr) return {cudaErrorInvalidDeviceFunction, 0};
  if (!with_tail && launch.recipe.rule == RuleId::adamw) {
    in_kernel_of_its_own(UsedMost{}, launch.recipe, [&](auto formats) {
      kernel = tile_kernel<AdamW<false>, decltype(formats), false>;
    });
  }
  return launch_step(kernel, launch, tables, stream);
}

}  // namespace warpstep
