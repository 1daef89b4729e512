// Codecs beyond formats.h: of two operands, with random bits, and of blocks with a scale.
//
// A master is a float32 in two operands of 16 bits: the parameter, which is the nearest bfloat16
// (ties away from zero), and a residual, the signed rest. Transformer Engine's `master_param` has
// this layout, except that NaNs stay NaNs here.
//
// A block of kBlock numbers has one scale: the exponent E, biased as a float32's, that the numbers
// of most magnitude have. A number is then a code: `exponent and mantissa` counted from 1.0 times
// two to the power of E less the format's reach, with three bits of mantissa; no table and no
// division, only integer operations on the bits of a float32.
//
//              sign   codes      reach   rounded      for
//   e4m3       yes    0 to 127   15      to nearest   exp_avg
//   ue5m3      no     0 to 255   31      at random    exp_avg_sq
//
// Code 0, which would be 1.0, is zero. So in e4m3 every magnitude is zero that is nearer to 1.0
// than to the first code's 1.125, or smaller: raised to that, it could be many times what it was,
// and the update with it. The last code is NaN and the one before it infinity, so that neither
// becomes a number. In ue5m3 no positive number becomes zero: an exp_avg_sq of zero beside an
// exp_avg that is none would make the update explode.
//
// NOTE [random bits]
// Rounding at random, up with the probability of what is cut off, is right in the mean: exp_avg_sq
// can decay by less than half a unit of its last place. The bits are Philox4x32's (Salmon et al.,
// 2011) with its 7 rounds that pass BigCrush, of a key that is the seed and a counter that is the
// element's index in the whole tensor, the step, the parameter's number and the operand: so they
// are the same on every backend, for every cut into chunks, threads and shards. Eight consecutive
// elements share one value of the counter, 16 bits each.
#pragma once

#include "formats.h"

namespace warpstep {
namespace {

// ---- A float32 in two operands of 16 bits

WARPSTEP_FN float joined(bfloat16 high, std::int16_t residual) {
  return bits_as<float>((static_cast<std::uint32_t>(high.bits) << 16) +
                        static_cast<std::uint32_t>(static_cast<std::int32_t>(residual)));
}

constexpr std::uint32_t kHalfOfLast = 0x8000;  // of a bfloat16's last place
// What is split, of a number or, unless `kIsNumber`, a NaN.
template <bool kIsNumber = false>
WARPSTEP_FN std::uint32_t bits_of_master(float x) {
  return !kIsNumber && x != x ? 0x7fff0000u : bits_as<std::uint32_t>(x);
}
WARPSTEP_FN void split(float x, bfloat16& high, std::int16_t& residual) {
  const std::uint32_t bits = bits_of_master(x);
  high.bits = static_cast<std::uint16_t>((bits + kHalfOfLast) >> 16);
  residual = static_cast<std::int16_t>(bits & 0xffffu);
}

// Two neighbours at once, as formats.h has them of one operand.
WARPSTEP_FN void load_pair(const bfloat16* high, const std::int16_t* residual, float (&x)[2]) {
  std::uint32_t highs, lows;
  std::memcpy(&highs, high, sizeof(highs));
  std::memcpy(&lows, residual, sizeof(lows));
  x[0] = bits_as<float>((highs << 16) +
                        static_cast<std::uint32_t>(static_cast<std::int32_t>(lows << 16) >> 16));
  x[1] = bits_as<float>((highs & 0xffff0000u) +
                        static_cast<std::uint32_t>(static_cast<std::int32_t>(lows) >> 16));
}
WARPSTEP_FN void store_pair(const float (&x)[2], bfloat16* high, std::int16_t* residual) {
  const std::uint32_t a = bits_of_master(x[0]), b = bits_of_master(x[1]);
  const std::uint32_t highs = (a + kHalfOfLast) >> 16 | ((b + kHalfOfLast) & 0xffff0000u);
  const std::uint32_t lows = (a & 0xffffu) | b << 16;
  std::memcpy(high, &highs, sizeof(highs));
  std::memcpy(residual, &lows, sizeof(lows));
}

// ---- Random bits

// Elements [kDrawn * index, kDrawn * (index + 1)) share one value of the counter.
constexpr std::uint32_t kRounds = 7;

// The seed as each round takes it. Worked out once a launch.
struct Keys {
  std::uint32_t words[kRounds][2];

  Keys() = default;
  explicit Keys(std::uint64_t seed) {
    for (std::uint32_t round = 0; round < kRounds; ++round) {
      words[round][0] = static_cast<std::uint32_t>(seed) + round * 0x9E3779B9u;
      words[round][1] = static_cast<std::uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

// What the random bits of one operand of one tensor at one step are a function of, beside the
// element's index.
struct Draw {
  Keys keys;              // of the seed
  std::uint32_t step;     // the bits of the step counter after the step
  std::uint32_t operand;  // the parameter's number, and the operand

  WARPSTEP_FN Draw(const Keys& keys_of_seed, float step_after, std::uint32_t number,
                   std::uint32_t of)
      : keys(keys_of_seed), step(bits_as<std::uint32_t>(step_after)), operand(number * 8 + of) {}
};
static_assert(kMomentEnd <= 8, "an operand that is rounded at random has one of eight numbers");

// A round of Philox4x32, of a counter in place; product_of(lane, factor) is of 32 by 32 bits.
template <class Lane, class KeysOfLanes, class Product>
WARPSTEP_FN void philox_round(std::uint32_t round, Lane (&c)[4], const KeysOfLanes& keys,
                              Product&& product_of) {
  const auto product0 = product_of(c[0], 0xD2511F53u), product1 = product_of(c[2], 0xCD9E8D57u);
  c[0] = static_cast<Lane>(product1 >> 32) ^ c[1] ^ keys.words[round][0];
  c[1] = static_cast<Lane>(product1);
  c[2] = static_cast<Lane>(product0 >> 32) ^ c[3] ^ keys.words[round][1];
  c[3] = static_cast<Lane>(product0);
}

// All of them.
template <class Lane, class KeysOfLanes, class Product>
WARPSTEP_FN void philox(Lane (&c)[4], const KeysOfLanes& keys, Product&& product_of) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (std::uint32_t round = 0; round < kRounds; ++round) philox_round(round, c, keys, product_of);
}

// The random bits of elements [kDrawn * index, kDrawn * index + kDrawn), those of the first in the
// lower half of the first word.
WARPSTEP_FN void draw(const Draw& from, std::uint64_t index, std::uint32_t (&words)[kDrawn / 2]) {
  words[0] = static_cast<std::uint32_t>(index), words[1] = static_cast<std::uint32_t>(index >> 32);
  words[2] = from.step, words[3] = from.operand;
  philox(words, from.keys, [](std::uint32_t a, std::uint32_t by) { return std::uint64_t{a} * by; });
}

// One element's share of them.
WARPSTEP_FN std::uint32_t drawn(const std::uint32_t (&words)[kDrawn / 2], std::uint32_t element) {
  return words[element / 2] >> 16 * (element % 2) & 0xffffu;
}

// One of the two neighbouring bfloat16, by 16 random bits, in the upper half; right in the mean.
template <bool kIsNumber = false>
WARPSTEP_FN std::uint32_t rounded_stochastically(float x, std::uint32_t random) {
  return !kIsNumber && x != x ? 0x7fff0000u : bits_as<std::uint32_t>(x) + random;
}
WARPSTEP_FN void store_stochastic(float x, bfloat16& to, std::uint32_t random) {
  to.bits = static_cast<std::uint16_t>(rounded_stochastically(x, random) >> 16);
}
// Two neighbours at once.
WARPSTEP_FN void store_pair_stochastic(const float (&x)[2], bfloat16* to,
                                       const std::uint16_t* random) {
  std::uint32_t both;
  std::memcpy(&both, random, sizeof(both));
  const std::uint32_t bits = rounded_stochastically(x[0], both & 0xffffu) >> 16 |
                             (rounded_stochastically(x[1], both >> 16) & 0xffff0000u);
  std::memcpy(to, &bits, sizeof(bits));
}

// ---- Numbers of 8 bits

// What e4m3 (signed) and ue5m3 differ in.
template <bool kHasSign>
struct Code {
  static constexpr bool kSigned = kHasSign;
  static constexpr std::int32_t kNan = kSigned ? 0x7f : 0xff;
  static constexpr std::int32_t kInfinite = kNan - 1;
  static constexpr std::int32_t kReach = kSigned ? 15 : 31;
};
using E4m3 = Code<true>;
using Ue5m3 = Code<false>;

// What a number counts for in its block's maximum, from which scale_of makes the scale: the bits of
// its magnitude and one exponent more, so that NaNs and infinities are negative and count for
// nothing, as do negative numbers where there is no sign. A maximum begins as that of zero.
constexpr std::int32_t kMagnitudeOfZero = 0x00800000;
template <class C>
WARPSTEP_FN std::int32_t magnitude_of(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  return static_cast<std::int32_t>((C::kSigned ? bits & 0x7fffffffu : bits) + kMagnitudeOfZero);
}

// The exponent of the largest; the next one where rounding might go beyond the last code that is a
// number, which is that of 1.625. At least so much that every code is a normal float32.
constexpr std::uint32_t kToNextScale = 0x300000;  // from 1.625 to 2
template <class C>
WARPSTEP_FN std::uint32_t scale_of(std::int32_t largest) {
  const auto magnitude = static_cast<std::uint32_t>(largest - kMagnitudeOfZero);
  const std::uint32_t exponent = (magnitude + kToNextScale) >> 23;
  constexpr std::uint32_t kLeast = C::kReach + 1;
  return exponent < kLeast ? kLeast : exponent;
}

// What is added to a code, as bits of a float32.
template <class C>
WARPSTEP_FN std::int32_t base_of(std::uint32_t scale) {
  const std::int32_t base = static_cast<std::int32_t>(scale) - C::kReach;
  return (base < 1 ? 1 : base) << 23;
}

// The bits of a number, as many as `Bits` has, of a float32's upper ones: sixteen are enough.
// `base` is cut off in the same way. With `kAllNumbers` the block has no NaN and no infinity.
template <class C, bool kAllNumbers, class Bits>
WARPSTEP_FN Bits decoded_bits(std::uint8_t from, Bits base) {
  constexpr int kCut = 32 - 8 * sizeof(Bits);
  const Bits code = from & C::kNan;
  Bits bits = code == 0 ? 0 : (code << (20 - kCut)) + base;
  if (!kAllNumbers) {
    bits = code < C::kInfinite ? bits : (0x7f800000 >> kCut) | (code & 1) << (22 - kCut);
  }
  return C::kSigned ? bits | (from & 0x80) << (24 - kCut) : bits;
}
template <class C, bool kAllNumbers>
WARPSTEP_FN float decoded(std::uint8_t from, std::int32_t base) {
  return bits_as<float>(decoded_bits<C, kAllNumbers, std::int32_t>(from, base));
}

// Rounded to nearest, ties away from zero; or (ue5m3) at random. Of the 20 bits that are cut off
// then, the upper 16 get random bits added, and the lower four about the mean of what random bits
// would add to them. With `kAllNumbers` every magnitude_of() the block is positive.
constexpr std::int32_t kHalfOfCode = 0x80000, kHalfOfRandom = 8;
template <class C>
WARPSTEP_FN std::int32_t rounded_to_code(std::int32_t magnitude, std::int32_t base,
                                         std::uint32_t random) {
  return C::kSigned ? magnitude - (base - kHalfOfCode)
                    : magnitude - (base - kHalfOfRandom) + static_cast<std::int32_t>(random << 4);
}
template <class C, bool kAllNumbers>
WARPSTEP_FN std::uint8_t encoded(float x, std::int32_t base, std::uint32_t random) {
  const std::int32_t bits = bits_as<std::int32_t>(x);
  std::int32_t magnitude = kAllNumbers && !C::kSigned ? bits : bits & 0x7fffffff;
  if (!kAllNumbers && !C::kSigned) magnitude = x >= 0 ? magnitude : 0x7fffffff;
  // No positive number of ue5m3 becomes zero.
  const std::int32_t least = C::kSigned ? 0 : min_of(magnitude, 1);
  std::int32_t code = rounded_to_code<C>(magnitude, base, random) >> 20;
  code = code < least ? least : code;
  if (!kAllNumbers && magnitude >= 0x7f800000) {
    code = magnitude == 0x7f800000 ? C::kInfinite : C::kNan;
  }
  return static_cast<std::uint8_t>(C::kSigned ? code | (bits >> 24 & 0x80) : code);
}

}  // namespace
}  // namespace warpstep
