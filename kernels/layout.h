// What a launch reads: plain structs shared by host and device. No arithmetic, no ownership.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WARPSTEP_FN __host__ __device__ __forceinline__
#else
#define WARPSTEP_FN inline __attribute__((always_inline))
#endif

namespace warpstep {

template <class A>
WARPSTEP_FN constexpr A min_of(A a, A b) {
  return b < a ? b : a;
}
template <class A>
WARPSTEP_FN constexpr A max_of(A a, A b) {
  return a < b ? b : a;
}

// How the elements of one operand lie in memory, and how numbers become them: formats.h has the
// codecs of one element, blocks.h those of more.
enum class Format : std::uint8_t {
  none,
  float64,
  float32,
  bfloat16,
  float16,
  int16,
  uint8,
  bfloat16_stochastic,  // bfloat16, rounded up or down at random
  e4m3,                 // 8 bits a number, in blocks that have a scale each
  ue5m3                 // 8 bits a positive number, rounded up or down at random; as many a block
};

// The same, as far as memory goes.
WARPSTEP_FN constexpr Format lies_as(Format format) {
  return format == Format::bfloat16_stochastic               ? Format::bfloat16
         : format == Format::e4m3 || format == Format::ue5m3 ? Format::uint8
                                                             : format;
}

WARPSTEP_FN constexpr std::uint32_t bytes_of(Format format) {
  return format == Format::none             ? 0
         : format == Format::float64        ? 8
         : format == Format::float32        ? 4
         : lies_as(format) == Format::uint8 ? 1
                                            : 2;
}

WARPSTEP_FN constexpr bool is_in_blocks(Format format) {
  return format == Format::e4m3 || format == Format::ue5m3;
}
WARPSTEP_FN constexpr bool is_stochastic(Format format) {
  return format == Format::bfloat16_stochastic || format == Format::ue5m3;
}

// Numbers of 8 bits that share a scale.
constexpr std::uint32_t kBlock = 64;

// Elements that share one draw of random bits; and what CUDA's kernels load and store at once.
constexpr std::uint32_t kDrawn = 8;
constexpr std::uint32_t kVectorBytes = 16;

// The tensors that a step of one parameter works on, in the order of everything that has one each.
// What the moments are (exp_avg, ...), and how many there are, is the rule's to say.
enum Operand : std::uint32_t {
  kParam,
  kMoment,
  kMomentEnd = kMoment + 3,
  kScale = kMomentEnd,  // uint8: of each moment that lies in blocks, the blocks' scales
  kScaleEnd = kScale + 3,
  kResidual = kScaleEnd,  // int16: with the bfloat16 parameter, a float32 (blocks.h)
  kEma,
  kCopy,  // the parameter after the step, rounded
  kGrad,
  kOperands
};
// How many elements an operand has, of a tensor that has `numel`.
WARPSTEP_FN constexpr std::int64_t elements_of(std::uint32_t operand, std::int64_t numel) {
  const bool is_scale = operand >= kScale && operand < kScaleEnd;
  return is_scale ? (numel + kBlock - 1) / kBlock : numel;
}
// All but the gradient, whose address changes from step to step.
constexpr std::uint32_t kStable = kGrad;

enum class RuleId : std::uint8_t { adamw, sgd };

// What a kernel is built for: a rule, and the format of each operand; none where there is none.
struct RecipeKey {
  RuleId rule;
  Format formats[kOperands];

  bool operator==(const RecipeKey& other) const {
    bool same = rule == other.rule;
    for (std::uint32_t i = 0; i < kOperands; ++i) same = same && formats[i] == other.formats[i];
    return same;
  }
};

// A hyper-parameter: a number, or (for CUDA graphs) where on the device it stands.
struct Scalar {
  enum Kind : std::uint32_t { number, float32_address, float64_address };
  union {
    double value;
    const void* address;
  };
};

// How weight decay acts; rules/decay.h has the formulas.
enum class Decay : std::uint8_t { coupled, decoupled, independent, l1, cautious, l1l2, min };

// The numbers of every rule; from kOfRule on they are what the rule says.
enum Number : std::uint32_t { kLr, kWeightDecay, kOfRule, kNumbers = kOfRule + 3 };

// Hyper-parameters of one parameter group, as they are at this step.
struct Hyper {
  Scalar numbers[kNumbers];      // weight_decay: for Decay::independent, divided by the base lr
  double ema_decay;              // of the average of the weights
  std::uint8_t kinds[kNumbers];  // of Scalar::Kind
  Decay decay;
  std::uint8_t maximize;  // 0 or 1
  std::uint8_t pad_[1];
};

// One tensor of the table: what stays the same from step to step.
struct TensorRow {
  void* operands[kStable];  // null where there is none
  float* step;  // steps taken so far; the launch advances it. Null where none are counted
  std::int64_t numel;
  std::int64_t first;    // where its first element is in the whole tensor, if it is a shard
  std::uint32_t group;   // index into the Hyper table
  std::uint32_t chunks;  // how many chunks the tensor is cut into, at least one
  std::uint32_t head;    // elements before the 16-byte boundary of (most of) its operands
  std::uint32_t number;  // of the parameter among the optimizer's; random bits depend on it
};

// The run of elements that one thread block, or one CPU task, works on.
struct Chunk {
  std::uint32_t tensor;  // row of the tensor table
  std::uint32_t index;   // which chunk of that tensor
};

// Elements [begin, end) of a chunk. All boundaries but the first and the last lie `head` elements
// past a multiple of the chunk size, so that a tensor's head and rest are met once, not per chunk.
struct ChunkRange {
  std::int64_t begin;
  std::int64_t end;
};

constexpr std::uint32_t count_chunks(std::int64_t numel, std::uint32_t head,
                                     std::int64_t chunk_size) {
  return numel <= static_cast<std::int64_t>(head) + chunk_size
             ? 1
             : static_cast<std::uint32_t>((numel - head + chunk_size - 1) / chunk_size);
}

WARPSTEP_FN ChunkRange chunk_range(const TensorRow& row, std::uint32_t index,
                                   std::int64_t chunk_size) {
  const std::int64_t begin = index == 0 ? 0 : row.head + index * chunk_size;
  const std::int64_t end = row.head + (index + std::int64_t{1}) * chunk_size;
  return {begin, min_of(end, row.numel)};
}

// What a step leaves in the gradients. `unscaled` ones are clipped, too: what the rule has seen.
enum class GradsAfter : std::uint8_t {
  kept,
  zeroed,
  unscaled,
  unscaled_if_taken  // as torch's fused operators
};

// What training loops do around the step, done in its pass. Zeros mean: nothing of it.
struct Tail {
  const float* grad_scale;  // gradients are divided by it (torch's GradScaler)
  const float* found_inf;   // anything but zero: the step is not taken
  const double* clip_coef;  // the unscaled gradients are multiplied by it
  double* statistics;       // kStatistics for each chunk
  GradsAfter grads_after;
  bool steps_advanced;  // the caller has advanced the step counters, and the launch does not
};

// Sums over a chunk that a launch leaves in Tail::statistics: squares of the unscaled gradients, of
// the parameters after the step and of what the step changed them by; and how many gradients are
// not finite, -1 for a tensor without any.
constexpr std::uint32_t kStatistics = 4;

// Which norm of the gradients: the root of the sum of their squares, or the largest magnitude.
enum class Norm : std::uint8_t { l2, inf };

// One step of all tensors of one recipe on one device. Arrays are the caller's.
struct Launch {
  RecipeKey recipe;
  Tail tail;
  const TensorRow* rows;  // host copy; their groups never decrease
  void* const* grads;     // one a row; null where a parameter has none at this step
  std::uint32_t tensors;
  const Hyper* hypers;  // one a group, and none for a norm
  std::uint32_t groups;
  const Chunk* chunks;  // host copy, in row order
  std::uint32_t chunk_count;
  std::uint32_t chunk_size;  // in elements
  std::uint64_t seed;        // of random bits
  // double[tensors + chunk_count] on the device: the least magnitude of each row that needs_least()
  // (rules/decay.h), before the step; then scratch. Null where no group's decay is Decay::min.
  double* least;
};

}  // namespace warpstep
