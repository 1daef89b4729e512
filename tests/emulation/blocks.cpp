// Steps tensors by AVX-512's groups (cpu/eight_bit.h and sixteen_bit.h), on stand-ins for its
// intrinsics (avx512/immintrin.h), and by tiles, and compares all bits. Numbers, options, and now
// and then what is no number, at random. Prints how many tensors differ, and how many were stepped
// by vectors.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define __AVX2__ 1
#define __AVX512BW__ 1
#define __AVX512F__ 1
#define __FMA__ 1
// Rounding by AVX512_BF16 has no stand-in: launch.h has the processor not know it.
#include "cpu/launch.h"
#undef WARPSTEP_KNOWS_AVX512_BF16

#include "cpu/eight_bit.h"
#include "cpu/sixteen_bit.h"

namespace warpstep {
namespace {

constexpr std::int64_t kElements = 5 * kDecoded + 3 * kBlock + 17;
using Operand = std::vector<unsigned char>;

class Trial {
 public:
  explicit Trial(std::uint32_t seed) : random_(seed) {}

  // A parameter of `param`'s format, with a residual or not; moments of 8 bits or of 16.
  bool differs(Format param, bool has_master, Format grad, bool has_codes) {
    launch_.recipe = {RuleId::adamw, {}};
    Format* const formats = launch_.recipe.formats;
    formats[kParam] = param, formats[kGrad] = grad;
    if (has_master) formats[kResidual] = Format::int16;
    formats[kMoment] = has_codes ? Format::e4m3 : Format::bfloat16;
    formats[kMoment + 1] = has_codes ? Format::ue5m3 : Format::bfloat16_stochastic;
    if (has_codes) formats[kScale] = formats[kScale + 1] = Format::uint8;

    Hyper hyper{};
    hyper.numbers[kLr].value = once_in(4) ? 10 : 1e-3;
    hyper.numbers[kWeightDecay].value = 0.1 * below(3);
    hyper.numbers[AdamW<false>::kBeta1].value = once_in(3) ? 0 : 0.9;
    hyper.numbers[AdamW<false>::kBeta2].value = once_in(3) ? 0.6 : 0.999;
    hyper.numbers[AdamW<false>::kEps].value = once_in(3) ? 0 : 1e-8;
    hyper.decay = Decay::decoupled;
    hyper.maximize = once_in(2);
    TensorRow row{};
    float step = static_cast<float>(below(100));
    row.numel = kElements, row.step = &step, row.number = below(100), row.chunks = 1;
    row.first = once_in(3)   ? static_cast<std::int64_t>(kDrawn) * below(1000)
                : once_in(3) ? (std::int64_t{1} << 35) - 1024  // where an index takes a second word
                             : 0;
    const Chunk chunk{0, 0};
    launch_.rows = &row, launch_.tensors = 1, launch_.hypers = &hyper, launch_.groups = 1;
    launch_.chunks = &chunk, launch_.chunk_count = 1, launch_.chunk_size = kCpuChunk;
    launch_.seed = random_();

    std::vector<Operand> by_tiles = operands();
    std::vector<Operand> by_groups = by_tiles;
    step_by(step_tiles<AdamW<false>>, row, by_tiles);
    step_by(has_codes ? find_among(AllInBlocks{}, launch_.recipe, nullptr)
                      : find_among(AllInPairs{}, launch_.recipe, nullptr),
            row, by_groups);
    return by_tiles != by_groups;
  }

 private:
  std::uint32_t below(std::uint32_t end) { return random_() % end; }
  bool once_in(std::uint32_t times) { return below(times) == 0; }

  std::vector<Operand> operands() {
    const bool has_specials = once_in(3);
    const std::uint32_t scale = once_in(3) ? 0 : 100 + below(30);
    const std::uint32_t scales = scale == 0 ? 256 : 1 + below(40);
    std::vector<Operand> all(kOperands);
    for (std::uint32_t operand = 0; operand < kOperands; ++operand) {
      const Format format = launch_.recipe.formats[operand];
      const std::uint32_t size = bytes_of(format);
      all[operand].resize(elements_of(operand, kElements) * size);
      for (std::size_t at = 0; at < all[operand].size(); at += size) {
        const std::uint32_t bits =
            format == Format::uint8 ? scale + below(scales) : element(operand, has_specials);
        std::memcpy(all[operand].data() + at, &bits, size);
      }
    }
    return all;
  }

  std::uint32_t element(std::uint32_t operand, bool has_specials) {
    const Format format = launch_.recipe.formats[operand];
    const bool is_special = has_specials && once_in(800), is_zero = once_in(20);
    if (format == Format::int16) return random_();
    if (format == Format::e4m3) {
      return is_special ? random_() : (is_zero ? 0 : below(E4m3::kInfinite)) | below(2) << 7;
    }
    if (format == Format::ue5m3)
      return is_special ? random_() : is_zero ? 0 : below(Ue5m3::kInfinite);
    static constexpr std::uint32_t kSpecials[] = {0x7f800000, 0xff800000, 0x7fc00000, 1,
                                                  0x80000001, 0x7f7f0000, 0xff7f0000};
    std::uint32_t bits = (random_() & 0x807fffffu) | (87 + below(50)) << 23;
    if (is_zero) bits &= 0x80000000u;
    if (operand == kMoment + 1) bits &= 0x7fffffffu;
    if (is_special) bits = kSpecials[below(7)];
    return format == Format::float32 ? bits : bits >> 16;
  }

  void step_by(StepChunks kernel, TensorRow& row, std::vector<Operand>& operands) {
    for (std::uint32_t operand = 0; operand < kStable; ++operand) {
      row.operands[operand] = operands[operand].empty() ? nullptr : operands[operand].data();
    }
    void* grad = operands[kGrad].data();
    launch_.grads = &grad;
    kernel(launch_, 0, 1);
  }

  std::mt19937 random_;
  Launch launch_{};
};

}  // namespace
}  // namespace warpstep

int main(int, char** arguments) {
  using namespace warpstep;
  const int trials = std::atoi(arguments[1]);
  int differ = 0, by_vectors = 0;
  for (int trial = 0; trial < trials; ++trial) {
    const long roots = vectors_of_roots;
    Trial one(trial);
    const int which = trial % 7;  // of 8 bits the first four
    const Format param = which == 0       ? Format::float32
                         : which % 3 == 1 ? Format::bfloat16_stochastic
                                          : Format::bfloat16;
    const Format grad = which == 0 ? Format::float32 : Format::bfloat16;
    differ += one.differs(param, which == 3 || which == 6, grad, which < 4);
    by_vectors += vectors_of_roots != roots;
  }
  std::printf("%d %d\n", differ, by_vectors);
}
