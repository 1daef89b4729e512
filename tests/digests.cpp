// Steps every kind of recipe on the CPU and prints a digest of all bits: tests/digests.txt has
// them.
//
// It knows neither Python nor torch, so that it runs wherever a compiler compiles for: on another
// architecture, or under an emulator of one. Inputs are made with integers only. NaNs count as one:
// which of them an operation makes is the processor's choice.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "blocks.h"
#include "cpu/launch.h"
#include "cpu/threads.h"

namespace warpstep {
namespace {

constexpr Format none = Format::none, f64 = Format::float64, f32 = Format::float32,
                 bf16 = Format::bfloat16, f16 = Format::float16, i16 = Format::int16,
                 bf16_random = Format::bfloat16_stochastic, e4m3 = Format::e4m3,
                 ue5m3 = Format::ue5m3;

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 32);
  }
  // Of either sign, from 2^-20 to 4. With `specials` one in a hundred is zero, subnormal, huge,
  // infinite or no number.
  float number(bool specials) {
    static constexpr std::uint32_t kSpecial[] = {0u,         0x80000000u, 1u,          0x80000fffu,
                                                 0x7f800000, 0xff800000u, 0x7fc00000u, 0x7f000000u};
    if (bits() % 100 == 0 && specials) return bits_as<float>(kSpecial[bits() % 8]);
    const std::uint32_t exponent = 107 + bits() % 22;
    return bits_as<float>((bits() & 0x807fffffu) | exponent << 23);
  }

 private:
  std::uint64_t state_;
};

// FNV-1a, of 64 bits.
class Digest {
 public:
  void add(std::uint64_t word) {
    for (int i = 0; i < 8; ++i) value_ = (value_ ^ (word >> 8 * i & 0xff)) * 0x100000001b3u;
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

struct Case {
  std::string name;
  RuleId rule;
  Format param, grad;
  std::vector<Format> moments;
  Format residual = none, ema = none, copy = none;
  Decay decay = Decay::decoupled;
  double weight_decay = 0.1;
  GradsAfter grads_after = GradsAfter::kept;
  bool is_scaled = false, maximize = false, has_statistics = false;
};

std::uint64_t element(const std::vector<unsigned char>& memory, std::uint32_t bytes,
                      std::size_t at) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, memory.data() + at * bytes, bytes);
  return bits;
}

std::uint64_t with_one_nan(Format format, std::uint64_t bits) {
  const auto is_nan = [&](std::uint64_t infinity, std::uint64_t sign) {
    return (bits & ~sign) > infinity;
  };
  switch (lies_as(format)) {
    case Format::float64:
      return is_nan(0x7ff0000000000000u, 0x8000000000000000u) ? 0x7ff8000000000000u : bits;
    case Format::float32:
      return is_nan(0x7f800000u, 0x80000000u) ? 0x7fc00000u : bits;
    case Format::bfloat16:
      return is_nan(0x7f80u, 0x8000u) ? 0x7fc0u : bits;
    case Format::float16:
      return is_nan(0x7c00u, 0x8000u) ? 0x7e00u : bits;
    default:
      return format == e4m3 && (bits & 0x7f) == E4m3::kNan ? E4m3::kNan : bits;
  }
}

void put(Format format, float x, unsigned char* to) {
  const auto write = [&](auto stored) { std::memcpy(to, &stored, sizeof(stored)); };
  if (format == f64) write(static_cast<double>(x));
  if (format == f32) write(x);
  if (lies_as(format) == bf16) {
    bfloat16 rounded{};
    store(x, rounded);
    write(rounded);
  }
  if (format == f16) {
    float16 rounded{};
    store(x, rounded);
    write(rounded);
  }
}

// Tensors of some sizes, three steps; what is left in all operands, the norms of the gradients, and
// the statistics, where they are asked for.
void run(const Case& one) {
  static constexpr std::int64_t kSizes[] = {1, 5, 63, 64, 1000, 1031, kCpuChunk + 77};
  Launch launch{};
  launch.recipe.rule = one.rule;
  Format* const formats = launch.recipe.formats;
  formats[kParam] = one.param;
  for (std::size_t i = 0; i < one.moments.size(); ++i) {
    formats[kMoment + i] = one.moments[i];
    if (is_in_blocks(one.moments[i])) formats[kScale + i] = Format::uint8;
  }
  formats[kResidual] = one.residual;
  formats[kEma] = one.ema;
  formats[kCopy] = one.copy;
  formats[kGrad] = one.grad;
  if (!has_cpu_recipe(launch.recipe)) {
    std::printf("%s: no kernel\n", one.name.c_str());
    return;
  }

  Hyper hyper{};
  hyper.numbers[kLr].value = 0.003;
  hyper.numbers[kWeightDecay].value = one.weight_decay;
  if (one.rule == RuleId::adamw) {
    hyper.numbers[kOfRule].value = 0.9;
    hyper.numbers[kOfRule + 1].value = 0.999;
    hyper.numbers[kOfRule + 2].value = 1e-8;
  } else {
    hyper.numbers[kOfRule].value = one.moments.empty() ? 0 : 0.9;
    hyper.numbers[kOfRule + 1].value = one.moments.empty() ? 0 : 0.1;
  }
  hyper.ema_decay = 0.99;
  hyper.decay = one.decay;
  hyper.maximize = one.maximize;

  constexpr std::uint32_t kTensors = sizeof(kSizes) / sizeof(kSizes[0]);
  std::vector<std::vector<unsigned char>> memory[kTensors];
  std::vector<TensorRow> rows(kTensors);
  std::vector<void*> grads(kTensors);
  std::vector<float> steps(kTensors, 0.0f);
  std::vector<Chunk> chunks;
  Random random(one.name.size());
  for (std::uint32_t t = 0; t < kTensors; ++t) {
    TensorRow& row = rows[t];
    row = TensorRow{};
    row.numel = kSizes[t];
    row.step = &steps[t];
    row.number = t;
    row.chunks = count_chunks(row.numel, row.head, kCpuChunk);
    for (std::uint32_t i = 0; i < row.chunks; ++i) chunks.push_back({t, i});
    memory[t].resize(kOperands);
    for (std::uint32_t operand = 0; operand < kOperands; ++operand) {
      const Format format = formats[operand];
      std::vector<unsigned char>& bytes = memory[t][operand];
      bytes.resize(elements_of(operand, row.numel) * bytes_of(format));
      if (operand == kParam) {
        for (std::int64_t i = 0; i < row.numel; ++i) {
          // A NaN would be the least magnitude of its tensor, and all of it would be NaN.
          const float x = random.number(one.decay != Decay::min);
          put(format, x, bytes.data() + i * bytes_of(format));
        }
      }
      if (operand == kResidual) {
        for (unsigned char& byte : bytes) byte = random.bits() & 0xff;
      }
      if (operand < kStable) row.operands[operand] = bytes.empty() ? nullptr : bytes.data();
    }
    grads[t] = memory[t][kGrad].data();
  }
  const float grad_scale = 8, found_inf = 0;
  const double clip_coef = 0.37;
  if (one.is_scaled) {
    launch.tail.grad_scale = &grad_scale;
    launch.tail.found_inf = &found_inf;
    launch.tail.clip_coef = &clip_coef;
  }
  launch.tail.grads_after = one.grads_after;
  launch.rows = rows.data();
  launch.grads = grads.data();
  launch.tensors = kTensors;
  launch.hypers = &hyper;
  launch.groups = 1;
  launch.chunks = chunks.data();
  launch.chunk_count = static_cast<std::uint32_t>(chunks.size());
  launch.chunk_size = kCpuChunk;
  launch.seed = 0x123456789abcdefu;
  std::vector<double> least(kTensors + chunks.size()), partials(chunks.size());
  if (one.decay == Decay::min) launch.least = least.data();
  std::vector<double> statistics(one.has_statistics ? chunks.size() * kStatistics : 0);
  if (one.has_statistics) launch.tail.statistics = statistics.data();
  std::vector<std::uint32_t> batches(chunks.size() + 1);
  for (std::uint32_t i = 0; i < batches.size(); ++i) batches[i] = i;

  Digest digest;
  for (int step = 0; step < 3; ++step) {
    for (std::uint32_t t = 0; t < kTensors; ++t) {
      const std::uint32_t bytes = bytes_of(one.grad);
      for (std::int64_t i = 0; i < rows[t].numel; ++i) {
        put(one.grad, random.number(step > 0), memory[t][kGrad].data() + i * bytes);
      }
    }
    for (Norm kind : {Norm::l2, Norm::inf}) {
      const double norm = grad_norm_cpu(kind, launch, partials.data(), 2);
      digest.add(with_one_nan(f64, bits_as<std::uint64_t>(norm)));
    }
    if (launch.least != nullptr) least_magnitudes_cpu(launch, 2);
    step_cpu(launch, batches.data(), launch.chunk_count, 2);
    for (double sum : statistics) digest.add(with_one_nan(f64, bits_as<std::uint64_t>(sum)));
  }
  for (std::uint32_t t = 0; t < kTensors; ++t) {
    for (std::uint32_t operand = 0; operand < kOperands; ++operand) {
      const std::uint32_t bytes = bytes_of(formats[operand]);
      const std::size_t elements = bytes == 0 ? 0 : memory[t][operand].size() / bytes;
      for (std::size_t i = 0; i < elements; ++i) {
        digest.add(with_one_nan(formats[operand], element(memory[t][operand], bytes, i)));
      }
    }
    digest.add(bits_as<std::uint32_t>(steps[t]));
  }
  std::printf("%s: %016" PRIx64 "\n", one.name.c_str(), digest.value());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const std::pair<const char*, Format> plain[] = {
      {"float64", f64}, {"float32", f32}, {"bfloat16", bf16}, {"float16", f16}};
  for (const auto& [name, format] : plain) {
    const std::string of = name;
    all.push_back({"adamw " + of, RuleId::adamw, format, format, {format, format}});
    all.push_back({"adamw amsgrad " + of, RuleId::adamw, format, format, {format, format, format}});
    all.push_back({"sgd " + of, RuleId::sgd, format, format, {}});
    all.push_back({"sgd momentum " + of, RuleId::sgd, format, format, {format}});
    Case tail{"tail " + of, RuleId::adamw, format, format, {format, format}};
    tail.ema = format;
    tail.grads_after = GradsAfter::unscaled;
    tail.is_scaled = true;
    all.push_back(tail);
    tail.name = "statistics " + of;
    tail.ema = none;
    tail.grads_after = GradsAfter::kept;
    tail.has_statistics = true;
    all.push_back(tail);
  }
  for (const auto& [name, format] : {plain[2], plain[3]}) {
    const std::string of = name;
    all.push_back({of + ", float32 moments", RuleId::adamw, format, format, {f32, f32}});
    all.push_back({of + ", float32 gradients", RuleId::adamw, format, f32, {format, format}});
    all.push_back({of + ", float32 both", RuleId::adamw, format, f32, {f32, f32}});
  }
  all.push_back({"float32, bfloat16 moments", RuleId::adamw, f32, f32, {bf16, bf16}});
  all.push_back({"master", RuleId::adamw, bf16, bf16, {f32, f32}, i16});
  all.push_back({"master, bfloat16", RuleId::adamw, bf16, bf16, {bf16, bf16_random}, i16});
  all.push_back({"master, 8 bits", RuleId::adamw, bf16, bf16, {e4m3, ue5m3}, i16});
  all.push_back({"master, 8 bits, average", RuleId::adamw, bf16, f32, {e4m3, ue5m3}, i16, f32});
  all.push_back({"bfloat16, 8 bits", RuleId::adamw, bf16, bf16, {e4m3, ue5m3}});
  all.push_back({"at random, 8 bits", RuleId::adamw, bf16_random, bf16, {e4m3, ue5m3}});
  all.push_back({"float32, 8 bits", RuleId::adamw, f32, f32, {e4m3, ue5m3}});
  all.push_back({"float32, a copy", RuleId::adamw, f32, bf16, {f32, f32}, none, none, bf16});
  all.push_back({"float32, a float16 copy", RuleId::adamw, f32, f32, {f32, f32}, none, f32, f16});
  all.push_back({"amsgrad, mixed", RuleId::adamw, bf16, f32, {e4m3, ue5m3, f32}, i16});
  all.push_back({"sgd, master", RuleId::sgd, bf16, bf16, {f32}, i16});
  const std::pair<const char*, Decay> forms[] = {
      {"coupled", Decay::coupled}, {"independent", Decay::independent},
      {"l1", Decay::l1},           {"cautious", Decay::cautious},
      {"l1l2", Decay::l1l2},       {"min", Decay::min}};
  for (const auto& [name, form] : forms) {
    Case one{std::string("decay ") + name, RuleId::adamw, f32, f32, {f32, f32}};
    one.decay = form;
    one.maximize = true;
    all.push_back(one);
    one.name += ", master";
    one.param = one.grad = bf16;
    one.residual = i16;
    if (form != Decay::min) all.push_back(one);
  }
  return all;
}

}  // namespace
}  // namespace warpstep

int main() {
  std::fprintf(stderr, "instruction set: %s\n", warpstep::cpu_instruction_set());
  for (const warpstep::Case& one : warpstep::cases()) warpstep::run(one);
}
