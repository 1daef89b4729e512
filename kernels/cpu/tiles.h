// The step on the CPU for operands of any format: decoded a tile at a time to float32, stepped by
// step.h, and encoded. What is float32 in memory is stepped in place.
#pragma once

#include "../blocks.h"
#include "draws.h"
#include "step.h"

namespace warpstep {
namespace {

// Elements that are decoded at a time. Fewer than step.h's tile has: memory is read while a tile is
// decoded and next to none while it is computed with, so the shorter the turns, the better the two
// overlap. On an EPYC with two threads 8-bit moments took 1.12 ns an element and thread with tiles
// of 1,024, 0.86 with 512, 0.78 with 256, 0.84 with 128. Asking for the next tile's memory in
// advance made no difference there, and cost a quarter more where all was in the caches.
constexpr std::int64_t kDecoded = 256;
static_assert(kDecoded % kBlock == 0 && kDecoded <= kTile, "whole blocks, within a tile");

template <class F>
void decode_elements(const F* __restrict from, std::int64_t count, float* __restrict to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}
template <class F>
void encode_elements(const float* __restrict from, std::int64_t count, F* __restrict to) {
  for (std::int64_t i = 0; i < count; ++i) store(from[i], to[i]);
}

void decode_master(const bfloat16* __restrict high, const std::int16_t* __restrict residual,
                   std::int64_t count, float* __restrict to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = joined(high[i], residual[i]);
}
void encode_master(const float* __restrict from, std::int64_t count, bfloat16* __restrict high,
                   std::int16_t* __restrict residual) {
  for (std::int64_t i = 0; i < count; ++i) split(from[i], high[i], residual[i]);
}

void encode_stochastic(const float* __restrict from, std::int64_t count,
                       const std::uint16_t* __restrict random, bfloat16* __restrict to) {
  for (std::int64_t i = 0; i < count; ++i) store_stochastic(from[i], to[i], random[i]);
}

// Calls of(first, size, block) for each block.
template <class Of>
WARPSTEP_FN void for_blocks(std::int64_t count, Of&& of) {
  // All blocks but a tensor's last have kBlock elements, which makes better code.
  std::int64_t at = 0;
  for (; at + kBlock <= count; at += kBlock) of(at, kBlock, at / kBlock);
  if (at < count) of(at, count - at, at / kBlock);
}

// A number of 8 bits has no more than a bfloat16's: by way of those, twice as many go into a
// vector.
template <class C, bool kAllNumbers>
WARPSTEP_FN void decode_run(const std::uint8_t* __restrict from, std::int64_t size,
                            std::int32_t base, bfloat16* __restrict to) {
  const auto upper = static_cast<std::uint16_t>(base >> 16);
  for (std::int64_t i = 0; i < size; ++i) {
    to[i].bits = decoded_bits<C, kAllNumbers, std::uint16_t>(from[i], upper);
  }
}
template <class C>
void decode_blocks(const std::uint8_t* from, const std::uint8_t* scales, std::int64_t count,
                   float* to) {
  bfloat16 numbers[kDecoded];
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto code = static_cast<std::uint8_t>(from[i] & C::kNan);
    largest = code > largest ? code : largest;
  }
  const bool all_numbers = largest < C::kInfinite;
  for_blocks(count, [&](std::int64_t at, std::int64_t size, std::int64_t block) {
    const std::int32_t base = base_of<C>(scales[block]);
    if (all_numbers) return decode_run<C, true>(from + at, size, base, numbers + at);
    decode_run<C, false>(from + at, size, base, numbers + at);
  });
  decode_elements(numbers, count, to);
}

// `random`: 16 bits an element; null where none are needed.
template <class C, bool kAllNumbers>
WARPSTEP_FN void encode_run(const float* __restrict from, std::int64_t size, std::int32_t base,
                            const std::uint16_t* __restrict random, std::uint8_t* __restrict to) {
  for (std::int64_t i = 0; i < size; ++i) {
    to[i] = encoded<C, kAllNumbers>(from[i], base, C::kSigned ? 0 : random[i]);
  }
}
// Returns the scale.
template <class C>
WARPSTEP_FN std::uint8_t encode_block(const float* from, std::int64_t size,
                                      const std::uint16_t* random, std::uint8_t* to) {
  // As unsigned numbers, infinities, NaNs and signs that the code has not are above all numbers.
  std::uint32_t above = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t bits = bits_as<std::uint32_t>(from[i]);
    above = max_of(above, C::kSigned ? bits & 0x7fffffffu : bits);
  }
  if (above < 0x7f800000u) {
    const std::uint32_t scale = scale_of<C>(static_cast<std::int32_t>(above) + kMagnitudeOfZero);
    encode_run<C, true>(from, size, base_of<C>(scale), random, to);
    return static_cast<std::uint8_t>(scale);
  }
  std::int32_t largest = kMagnitudeOfZero;
  for (std::int64_t i = 0; i < size; ++i) largest = max_of(largest, magnitude_of<C>(from[i]));
  const std::uint32_t scale = scale_of<C>(largest);
  encode_run<C, false>(from, size, base_of<C>(scale), random, to);
  return static_cast<std::uint8_t>(scale);
}
template <class C>
void encode_blocks(const float* from, std::int64_t count, const std::uint16_t* random,
                   std::uint8_t* to, std::uint8_t* scales) {
  for_blocks(count, [&](std::int64_t at, std::int64_t size, std::int64_t block) {
    scales[block] = encode_block<C>(from + at, size, random + at, to + at);
  });
}

// One operand's part of a tile.
struct TileOperand {
  Format format;
  void* elements;
  void* companion;  // the scales of what lies in blocks, the residual of a master, else null

  // Its numbers: its own memory where they are float32, else `decoded`.
  float* decode(std::int64_t count, float* decoded) const {
    switch (format) {
      case Format::float32:
        return static_cast<float*>(elements);
      case Format::float16:
        decode_elements(static_cast<const float16*>(elements), count, decoded);
        return decoded;
      case Format::e4m3:
        decode_blocks<E4m3>(codes(), scales(), count, decoded);
        return decoded;
      case Format::ue5m3:
        decode_blocks<Ue5m3>(codes(), scales(), count, decoded);
        return decoded;
      default:
        if (companion != nullptr) {
          decode_master(halves(), static_cast<const std::int16_t*>(companion), count, decoded);
        } else {
          decode_elements(halves(), count, decoded);
        }
        return decoded;
    }
  }

  // `random()` has 16 bits an element.
  template <class Random>
  void encode(const float* numbers, std::int64_t count, Random&& random) const {
    switch (format) {
      case Format::float32:
        if (numbers != elements) std::memcpy(elements, numbers, count * sizeof(float));
        return;
      case Format::float16:
        return encode_elements(numbers, count, static_cast<float16*>(elements));
      case Format::e4m3:
        return encode_blocks<E4m3>(numbers, count, nullptr, codes(), scales());
      case Format::ue5m3:
        return encode_blocks<Ue5m3>(numbers, count, random(), codes(), scales());
      case Format::bfloat16_stochastic:
        return encode_stochastic(numbers, count, random(), halves());
      default:
        if (companion == nullptr) return encode_elements(numbers, count, halves());
        encode_master(numbers, count, halves(), static_cast<std::int16_t*>(companion));
    }
  }

 private:
  bfloat16* halves() const { return static_cast<bfloat16*>(elements); }
  std::uint8_t* codes() const { return static_cast<std::uint8_t*>(elements); }
  std::uint8_t* scales() const { return static_cast<std::uint8_t*>(companion); }
};

// A rule over a tensor's tiles. All numbers are float32.
template <class Rule, class Indices = std::make_index_sequence<Rule::kMoments>>
class TileStepper;

template <class Rule, std::size_t... kIndex>
class TileStepper<Rule, std::index_sequence<kIndex...>> {
 public:
  using Numbers =
      Stepper<Recipe<Rule, float32, float32, std::enable_if_t<kIndex + 1 != 0, float32>...>>;
  using C = Constants<Rule, float>;

  explicit TileStepper(const Launch& launch)
      : launch_(launch), keys_(launch.seed), taken_(is_taken(launch.tail)) {}

  // `at` is a tile's first element, and in no block's middle.
  void step(const C& c, const ChunkOf& of, std::int64_t at, std::int64_t count, Sums& sums) {
    begin(of, at, count, sums);
    finish(c, of, at, count, sums, false);
  }

  // The same in two parts, with room for a step that is taken between them, in memory.
  void begin(const ChunkOf& of, std::int64_t at, std::int64_t count, Sums& sums) {
    if (launch_.tail.statistics != nullptr) count_before(of, at, count, sums);
  }
  __attribute__((noinline)) void finish(const C& c, const ChunkOf& of, std::int64_t at,
                                        std::int64_t count, Sums& sums, bool stepped) {
    if (taken_ && !stepped) step_decoded(c, of, at, count);
    const bool copies = taken_ && (has(kEma) || has(kCopy));
    const bool counts = launch_.tail.statistics != nullptr;
    if (copies || counts) {
      const float* const p = decoded_param(of, at, count);  // as it is stored
      if (copies) leave_copies(c, of, p, at, count);
      if (counts) count_after(p, count, sums);
    }
    leave_gradients(c, of, at, count);
  }

 private:
  static float32* as_numbers(const float* numbers) {
    return reinterpret_cast<float32*>(const_cast<float*>(numbers));
  }

  bool has(std::uint32_t operand) const { return launch_.recipe.formats[operand] != Format::none; }
  TileOperand operand(const ChunkOf& of, std::uint32_t which, std::int64_t at) const {
    const Format format = launch_.recipe.formats[which];
    void* const first = which == kGrad ? of.grad : of.row.operands[which];
    return {format, static_cast<char*>(first) + at * bytes_of(format), nullptr};
  }
  TileOperand param_operand(const ChunkOf& of, std::int64_t at) const {
    TileOperand param = operand(of, kParam, at);
    if (has(kResidual)) param.companion = operand(of, kResidual, at).elements;
    return param;
  }
  TileOperand moment_operand(const ChunkOf& of, std::uint32_t index, std::int64_t at) const {
    TileOperand moment = operand(of, kMoment + index, at);
    if (is_in_blocks(moment.format)) {
      moment.companion = operand(of, kScale + index, at / kBlock).elements;
    }
    return moment;
  }

  auto draws(const ChunkOf& of, std::uint32_t operand, std::int64_t at, std::int64_t count) {
    return [=] {
      const float step_after = t_of(launch_.tail, of.step);
      const Draw from(keys_, step_after, of.row.number, operand);
      return random_.fill(from, of.row.first + at, count);
    };
  }

  float* decoded_param(const ChunkOf& of, std::int64_t at, std::int64_t count) {
    return param_operand(of, at).decode(count, param_);
  }
  const float* decoded_grad(const ChunkOf& of, std::int64_t at, std::int64_t count) {
    return operand(of, kGrad, at).decode(count, grad_);
  }

  void step_decoded(const C& c, const ChunkOf& of, std::int64_t at, std::int64_t count) {
    [[maybe_unused]] const TileOperand moments[] = {moment_operand(of, kIndex, at)...,
                                                    TileOperand{}};
    [[maybe_unused]] float* const m[] = {moments[kIndex].decode(count, moments_[kIndex])...,
                                         nullptr};
    float* const p = decoded_param(of, at, count);
    const float* const g = decoded_grad(of, at, count);
    Numbers::step(c, {as_numbers(p), as_numbers(g), {as_numbers(m[kIndex])...}, nullptr}, count,
                  count);
    (moments[kIndex].encode(m[kIndex], count, draws(of, kMoment + kIndex, at, count)), ...);
    param_operand(of, at).encode(p, count, draws(of, kParam, at, count));
  }

  // The average and the copy, of the parameter `p`.
  void leave_copies(const C& c, const ChunkOf& of, const float* p, std::int64_t at,
                    std::int64_t count) {
    if (has(kEma)) {
      const TileOperand ema = operand(of, kEma, at);
      float* const average = ema.decode(count, average_);
      Numbers::average(c.tail, as_numbers(p), as_numbers(average), count, count);
      ema.encode(average, count, [] { return nullptr; });
    }
    if (has(kCopy)) operand(of, kCopy, at).encode(p, count, [] { return nullptr; });
  }

  void count_before(const ChunkOf& of, std::int64_t at, std::int64_t count, Sums& sums) {
    count_gradients(sums, as_numbers(decoded_grad(of, at, count)), 0.0f, count);
    if (taken_) std::memcpy(before_, decoded_param(of, at, count), count * sizeof(float));
  }
  void count_after(const float* p, std::int64_t count, Sums& sums) {
    sums.param += sum_of_squares(p, count, count);
    if (!taken_) return;
    for (std::int64_t i = 0; i < count; ++i) before_[i] = p[i] - before_[i];
    sums.change += sum_of_squares(before_, count, count);
  }

  void leave_gradients(const C& c, const ChunkOf& of, std::int64_t at, std::int64_t count) {
    const TileOperand grad = operand(of, kGrad, at);
    if (launch_.tail.grads_after == GradsAfter::zeroed) {
      std::memset(grad.elements, 0, count * bytes_of(grad.format));
    } else if (leaves_unscaled(launch_.tail, taken_)) {
      const float* const g = grad.decode(count, grad_);
      for (std::int64_t i = 0; i < count; ++i) grad_[i] = g[i] * c.tail.grad_left;
      grad.encode(grad_, count, [] { return nullptr; });
    }
  }

  const Launch& launch_;
  const Keys keys_;
  const bool taken_;
  alignas(64) float param_[kDecoded];
  alignas(64) float grad_[kDecoded];
  alignas(64) float moments_[sizeof...(kIndex) + 1][kDecoded];
  alignas(64) float before_[kDecoded];
  alignas(64) float average_[kDecoded];
  TileDraws<kDecoded> random_;
};

// The kernel of a rule for operands of any format.
template <class Rule>
void step_tiles(const Launch& launch, std::uint32_t first, std::uint32_t last) {
  TileStepper<Rule> stepper(launch);
  for_chunks<Rule, float>(launch, first, last, [&](const auto& c, const ChunkOf& of, Sums& sums) {
    for (std::int64_t at = of.range.begin; at < of.range.end; at += kDecoded) {
      stepper.step(c, of, at, min_of(kDecoded, of.range.end - at), sums);
    }
  });
}

}  // namespace
}  // namespace warpstep
