// Steps the same tensors by the CPU's kernel and by the CUDA kernel through tiles, and compares all
// bits (tests/test_tiles.py). Formats, sizes, alignments, the tail and hyper-parameters are drawn.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/launch.h"
#include "cuda/launch.h"

namespace warpstep {
namespace {

std::mt19937 generator;
std::uint32_t below(std::uint32_t limit) { return generator() % limit; }
bool one_in(std::uint32_t times) { return below(times) == 0; }
template <class T, std::size_t kSize>
T one_of(const T (&values)[kSize]) {
  return values[below(kSize)];
}

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// One operand of a tensor, for both kernels: numbers from memory that is not aligned to them on.
struct Memory {
  Format format = Format::none;
  std::uint32_t offset = 0;  // in elements
  std::vector<std::uint64_t> cpu, cuda;

  void* at(std::vector<std::uint64_t>& words) const {
    return format == Format::none
               ? nullptr
               : reinterpret_cast<char*>(words.data()) + offset * bytes_of(format);
  }
};

constexpr Format kPlain[] = {Format::float32, Format::bfloat16, Format::float16};
// A rule's first moment, and its others.
constexpr Format kSigned[] = {Format::float32, Format::bfloat16_stochastic, Format::bfloat16,
                              Format::float16, Format::e4m3};
constexpr Format kPositive[] = {Format::float32, Format::bfloat16_stochastic, Format::bfloat16,
                                Format::float16, Format::ue5m3};

constexpr float kSizes[] = {1, 1, 1, 1e-6f, 1e-12f, 1e-16f, 1e-21f, 1e-26f, 1e-35f, 1e12f, 1e15f};
// What a tensor's numbers are like.
struct Kind {
  bool odd;     // some are not finite, or no codes
  bool sparse;  // many are zero
  float size;   // of gradients and moments
};

void fill(Memory& memory, std::int64_t count, std::uint32_t operand, const Kind& kind) {
  const bool odd = kind.odd;
  std::normal_distribution<float> normal;
  auto* const bytes = static_cast<std::uint8_t*>(memory.at(memory.cpu));
  const bool is_second = operand == kMoment + 1 || operand == kMoment + 2;
  for (std::int64_t i = 0; i < count; ++i) {
    float x = normal(generator) * std::pow(10.0f, static_cast<float>(below(7)) - 5);
    if (operand != kParam) x *= one_in(50) ? one_of(kSizes) : kind.size;
    if (is_second) x = x * x;
    if (kind.sparse && !one_in(3)) x = one_in(2) ? 0.0f : -0.0f;
    if (kind.sparse && is_second) x = std::fabs(x);
    constexpr float kOdd[] = {NAN, INFINITY, -INFINITY, -1, -1e-4f, 0};
    if (odd && one_in(200)) x = one_of(kOdd);
    const std::uint32_t bits = bits_of(x);
    std::uint32_t stored = bits;
    if (operand >= kScale && operand < kScaleEnd) {
      const int exponent = static_cast<int>(std::log2(kind.size));
      const int of_block = operand == kScale ? 115 + exponent : 110 + 2 * exponent;
      stored = odd && one_in(20) ? below(256) : std::min(std::max(of_block, 1), 240) + below(14);
    } else if (operand == kResidual) {
      stored = below(65536);
    } else if (memory.format == Format::float16) {
      const std::uint32_t code = below(0x3c00) | (is_second ? 0 : below(2) << 15);
      stored = odd && one_in(200) ? below(65536) : code;
    } else if (bytes_of(memory.format) == 2) {
      stored = bits >> 16;
    } else if (bytes_of(memory.format) == 1) {
      const bool has_sign = memory.format == Format::e4m3;
      const std::uint32_t sign = has_sign ? below(2) << 7 : 0, no_number = has_sign ? 126 : 254;
      stored = sign | below(no_number);
      if (odd && one_in(100)) stored = sign | (no_number + below(2));
      if (kind.sparse && !one_in(3)) stored = has_sign ? below(2) << 7 : 0;
    }
    std::memcpy(bytes + i * bytes_of(memory.format), &stored, bytes_of(memory.format));
  }
}

struct Tensor {
  std::int64_t numel;
  Memory operands[kOperands];
  float step = 0;
  bool has_grad = true;
  TensorRow row{};
};

// The NaNs of float32 operands are of any bits, since an instruction takes them from one of its
// inputs.
bool same(const Memory& memory) {
  if (memory.format != Format::float32) return memory.cpu == memory.cuda;
  for (std::size_t i = 0; i < memory.cpu.size() * 2; ++i) {
    float a, b;
    std::memcpy(&a, reinterpret_cast<const char*>(memory.cpu.data()) + i * 4, 4);
    std::memcpy(&b, reinterpret_cast<const char*>(memory.cuda.data()) + i * 4, 4);
    if (bits_of(a) != bits_of(b) && !(a != a && b != b)) return false;
  }
  return true;
}

RecipeKey draw_recipe() {
  RecipeKey key{};
  auto& formats = key.formats;
  key.rule = one_in(3) ? RuleId::sgd : RuleId::adamw;
  const std::uint32_t moments = key.rule == RuleId::sgd ? below(2) : one_in(3) ? 3 : 2;
  formats[kParam] = one_in(4) ? Format::bfloat16_stochastic : one_of(kPlain);
  if (formats[kParam] == Format::bfloat16 && !one_in(4)) formats[kResidual] = Format::int16;
  formats[kGrad] = one_of(kPlain);
  for (std::uint32_t k = 0; k < moments; ++k) {
    const Format moment = k == 0 ? one_of(kSigned) : one_of(kPositive);
    formats[kMoment + k] = moment;
    formats[kScale + k] = is_in_blocks(moment) ? Format::uint8 : Format::none;
  }
  formats[kEma] = one_in(3) ? one_of(kPlain) : Format::none;
  formats[kCopy] = one_in(3) ? kPlain[1 + below(2)] : Format::none;
  // Those that have kernels of their own.
  constexpr Format f32 = Format::float32, bf16 = Format::bfloat16;
  constexpr Format st = Format::bfloat16_stochastic, e4 = Format::e4m3, ue5 = Format::ue5m3;
  constexpr Format none = Format::none, u8 = Format::uint8, i16 = Format::int16;
  const RecipeKey own[] = {
      {RuleId::adamw, {bf16, f32, f32, none, none, none, none, i16, none, none, bf16}},
      {RuleId::adamw, {bf16, bf16, st, none, none, none, none, i16, none, none, bf16}},
      {RuleId::adamw, {bf16, e4, ue5, none, u8, u8, none, i16, none, none, bf16}},
      {RuleId::adamw, {st, e4, ue5, none, u8, u8, none, none, none, none, bf16}},
      {RuleId::adamw, {f32, f32, f32, none, none, none, none, none, none, bf16, bf16}}};
  return one_in(3) ? one_of(own) : key;
}

// Both kernels step tensors of a recipe once. Returns what differs, or nothing.
std::string compare(const RecipeKey& key) {
  bool has_blocks = false, is_drawn = false;
  for (const Format format : key.formats) {
    has_blocks = has_blocks || is_in_blocks(format);
    is_drawn = is_drawn || is_stochastic(format);
  }
  const bool plain = one_in(2);  // as most steps are: aligned, and without a tail
  const bool odd = one_in(3);
  constexpr std::uint32_t kTensors = 4, kChunk = kCudaChunkLeast;
  constexpr std::int64_t kNumels[] = {1, 5, 8, 63, 64, 65, 500, 512, kChunk, 2 * kChunk + 77};
  Tensor tensors[kTensors];
  std::vector<TensorRow> rows[2];
  std::vector<void*> grads[2];
  std::vector<Chunk> chunks[2];
  for (std::uint32_t i = 0; i < kTensors; ++i) {
    Tensor& tensor = tensors[i];
    tensor.numel = one_of(kNumels);
    tensor.has_grad = i != 2;
    tensor.step = static_cast<float>(below(3));
    const bool is_aligned = plain || one_in(2);
    const Kind kind{odd, one_in(5), one_of(kSizes)};
    TensorRow row{};
    row.numel = tensor.numel;
    row.first = is_aligned ? 64 * below(3) : std::int64_t{1} << below(40);
    row.first += is_aligned || one_in(2) ? 0 : below(64);
    row.number = below(1000);
    row.group = i / 2;
    row.head = has_blocks ? 0 : is_drawn ? static_cast<std::uint32_t>(-row.first & 7) : below(8);
    if (is_aligned && !is_drawn) row.head = 0;
    for (std::uint32_t k = 0; k < kOperands; ++k) {
      Memory& memory = tensor.operands[k];
      memory.format = key.formats[k];
      if (memory.format == Format::none) continue;
      const std::int64_t count = elements_of(k, tensor.numel);
      memory.offset = is_aligned || one_in(2) ? 0 : below(16);
      memory.cpu.resize(((count + memory.offset) * bytes_of(memory.format) + 7) / 8);
      fill(memory, count, k, kind);
      memory.cuda = memory.cpu;
    }
    for (int on = 0; on < 2; ++on) {
      const auto at = [&](std::uint32_t k) {
        Memory& memory = tensor.operands[k];
        return memory.at(on == 0 ? memory.cpu : memory.cuda);
      };
      for (std::uint32_t k = 0; k < kStable; ++k) row.operands[k] = at(k);
      row.chunks = count_chunks(row.numel, row.head, on == 0 ? kCpuChunk : kChunk);
      rows[on].push_back(row);
      grads[on].push_back(tensor.has_grad ? at(kGrad) : nullptr);
      for (std::uint32_t index = 0; index < row.chunks; ++index) chunks[on].push_back({i, index});
    }
  }
  float steps[2][kTensors];
  for (int on = 0; on < 2; ++on) {
    for (std::uint32_t i = 0; i < kTensors; ++i) {
      steps[on][i] = tensors[i].step;
      if (i != 3) rows[on][i].step = &steps[on][i];
    }
  }

  constexpr Decay kDecays[] = {Decay::coupled,  Decay::decoupled, Decay::independent, Decay::l1,
                               Decay::cautious, Decay::l1l2,      Decay::min};
  Hyper hypers[2]{};
  for (Hyper& hyper : hypers) {
    const bool sgd = key.rule == RuleId::sgd;
    constexpr double kEpsilons[] = {1e-8, 1e-7, 1e-4, 1e-16, 1e-30, 0, 1e7};
    const double numbers[kNumbers] = {1e-2, 0.1, 0.9, sgd ? 0.1 : 0.95,
                                      sgd ? 1.0 : one_of(kEpsilons)};
    for (std::uint32_t k = 0; k < kNumbers; ++k) hyper.numbers[k].value = numbers[k];
    hyper.ema_decay = 0.9;
    hyper.decay = plain || one_in(2) ? Decay::decoupled : one_of(kDecays);
    hyper.maximize = one_in(4);
  }
  const float grad_scale = 4, found_inf = one_in(3) ? 1.0f : 0.0f;
  const double clip_coef = 0.7;
  Tail tail{};
  if (one_in(3)) tail.grad_scale = &grad_scale;
  if (one_in(3)) tail.found_inf = &found_inf;
  if (one_in(3)) tail.clip_coef = &clip_coef;
  const bool has_statistics = !plain && one_in(3);
  constexpr GradsAfter kAfter[] = {GradsAfter::zeroed, GradsAfter::unscaled,
                                   GradsAfter::unscaled_if_taken};
  if (!plain && one_in(3)) tail.grads_after = one_of(kAfter);
  tail.steps_advanced = one_in(5);
  const std::uint64_t seed = std::uint64_t{generator()} << 32 | generator();

  double least[kTensors] = {0.5, 0.01, 0, 0.1};

  std::vector<double> statistics[2];
  for (int on = 0; on < 2; ++on) {
    const auto count = static_cast<std::uint32_t>(chunks[on].size());
    statistics[on].assign(kStatistics * count, 0);
    tail.statistics = has_statistics ? statistics[on].data() : nullptr;
    const Launch launch{key,
                        tail,
                        rows[on].data(),
                        grads[on].data(),
                        kTensors,
                        hypers,
                        2,
                        chunks[on].data(),
                        count,
                        on == 0 ? static_cast<std::uint32_t>(kCpuChunk) : kChunk,
                        seed,
                        least};
    if (on == 0) {
      const StepChunks step = cpu_kernels_baseline({}).find(key);
      if (step == nullptr) return "no kernel on the CPU";
      step(launch, 0, count);
      for (std::uint32_t i = 0; i < 3; ++i) {
        const bool taken = tail.found_inf == nullptr || found_inf == 0;
        if (tensors[i].has_grad && taken && !tail.steps_advanced) steps[0][i] += 1;
      }
    } else {
      std::uint32_t arrivals[kTensors] = {};
      const CudaTables tables{rows[1].data(), chunks[1].data(), arrivals};
      if (step_cuda(launch, tables, nullptr).error != 0) return "no kernel on CUDA";
      for (const std::uint32_t arrival : arrivals) {
        if (arrival != 0) return "arrivals";
      }
    }
  }

  for (std::uint32_t i = 0; i < kTensors; ++i) {
    for (std::uint32_t k = 0; k < kOperands; ++k) {
      if (same(tensors[i].operands[k])) continue;
      return "operand " + std::to_string(k) + " of " + std::to_string(tensors[i].numel) +
             " elements";
    }
    if (steps[0][i] != steps[1][i]) return "step counters";
  }
  if (has_statistics) {
    double sums[2][kTensors][kStatistics] = {};
    for (int on = 0; on < 2; ++on) {
      for (std::size_t c = 0; c < chunks[on].size(); ++c) {
        for (std::uint32_t k = 0; k < kStatistics; ++k) {
          sums[on][chunks[on][c].tensor][k] += statistics[on][c * kStatistics + k];
        }
      }
    }
    for (std::uint32_t i = 0; i < kTensors; ++i) {
      if (!tensors[i].has_grad) continue;  // -1 for each chunk
      for (std::uint32_t k = 0; k < kStatistics; ++k) {
        const double a = sums[0][i][k], b = sums[1][i][k];
        // float32 sums of the CPU's tiles: some twenty roundings.
        const bool close = std::fabs(a - b) <= 1e-5 * std::fabs(a) || (a != a && b != b) || a == b;
        if (!close || (k == 3 && a != b))
          return "statistics " + std::to_string(k) + ": " + std::to_string(a) + ", " +
                 std::to_string(b);
      }
    }
  }
  return "";
}

std::string name_of(const RecipeKey& key) {
  std::string name = key.rule == RuleId::sgd ? "sgd" : "adamw";
  for (const Format format : key.formats) name += " " + std::to_string(static_cast<int>(format));
  return name;
}

}  // namespace
}  // namespace warpstep

int main(int count, char** arguments) {
  using namespace warpstep;
  const int cases = count > 1 ? std::atoi(arguments[1]) : 1000;
  const int first = count > 2 ? std::atoi(arguments[2]) : 0;
  int bad = 0;
  for (int i = first; i < first + cases; ++i) {
    generator.seed(static_cast<unsigned>(i));
    const RecipeKey key = draw_recipe();
    const std::string difference = compare(key);
    if (difference.empty()) continue;
    std::fprintf(stderr, "case %d (%s): %s\n", i, name_of(key).c_str(), difference.c_str());
    if (++bad == 10) break;
  }
  std::printf("%d cases\n", cases);
  return bad != 0;
}
