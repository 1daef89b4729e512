// A group of elements in four vector registers: its operands from memory and back, its codes, its
// random bits. Bit for bit what formats.h and blocks.h have of one element, where all are numbers.
// There are as many elements as a vector has bytes: with AVX-512 a block (blocks.h), with AVX2 half
// of one.
//
// NOTE [the order in a group]
// The four vectors are the even and the odd elements of the group's first half, then those of its
// second half. So two vectors are the halves of 32-bit lanes, as 16-bit operands lie in memory
// (pairs.h), and the four are the bytes of 32-bit lanes, once the halves of the codes are
// interleaved(). Decoding is done in lanes of 16 bits, and most of encoding in lanes of 8: each
// instruction does two or four times as much as with the lanes of float32.
#pragma once

#include "chunks.h"
#include "draws.h"
#include "pairs.h"
#include "vectors.h"

#ifdef WARPSTEP_HAS_VECTORS
namespace warpstep {
namespace {

constexpr std::int64_t kGroup = kSimdBytes;
static_assert(kBlock % kGroup == 0, "whole groups");
constexpr int kVectors = 4;  // of a group

// A group's numbers, or their bits.
struct Group {
  Vector vectors[kVectors];
};

// of(i) of each vector. Not a loop: what it works on is in registers from the beginning.
template <class Of>
WARPSTEP_FN void for_vectors(Of&& of) {
  of(0), of(1), of(2), of(3);
  static_assert(kVectors == 4, "all of them");
}

// ---- Operands of 16 and 32 bits

// A word of 16 bits an element, as they lie in memory.
struct Words {
  Vector first, second;  // half of the group

  static Words load(const void* from) {
    return {load_vector(from), load_vector(static_cast<const Vector*>(from) + 1)};
  }
  void store(void* to) const {
    store_vector(to, first);
    store_vector(static_cast<Vector*>(to) + 1, second);
  }
};

// In lanes of 32 bits, above zeros.
WARPSTEP_FN Group widened(const Words& x) {
  const auto lower = [](Vector words) { return masked(words, every<0xffff>()); };
  const auto upper = [](Vector words) { return WARPSTEP_V(srli_epi32)(words, 16); };
  return {{lower(x.first), upper(x.first), lower(x.second), upper(x.second)}};
}
// The halves of 32-bit lanes, as bfloat16.
WARPSTEP_FN Vector lower_as_numbers(Vector x) { return WARPSTEP_V(slli_epi32)(x, 16); }
WARPSTEP_FN Vector upper_as_numbers(Vector x) { return masked(x, every<0xffff0000u>()); }
WARPSTEP_FN Words upper_halves(const Group& x) {
  return {upper_halves(x.vectors[0], x.vectors[1]), upper_halves(x.vectors[2], x.vectors[3])};
}

WARPSTEP_FN Group load_group(const Halves& from) {
  const auto [first, second] = Words::load(from.at);
  return {{lower_as_numbers(first), upper_as_numbers(first), lower_as_numbers(second),
           upper_as_numbers(second)}};
}
WARPSTEP_FN Group load_group(const Singles& from) {
  const auto first = EvenAndOdd::load(from.at), second = EvenAndOdd::load(from.at + kGroup / 2);
  return {{first.even, first.odd, second.even, second.odd}};
}
WARPSTEP_FN Group load_group(const RandomHalves& from) { return load_group(Halves{from.at}); }
WARPSTEP_FN Group load_group(const MasterHalves& from) {
  const Group high = load_group(Halves{from.at});
  const auto [first, second] = Words::load(from.residual);
  // With their signs: a sum of products is the shortest way to the lower half's.
  const auto lower = [](Vector x) { return WARPSTEP_V(madd_epi16)(x, every<1>()); };
  const auto upper = [](Vector x) { return WARPSTEP_V(srai_epi32)(x, 16); };
  return {{WARPSTEP_V(add_epi32)(high.vectors[0], lower(first)),
           WARPSTEP_V(add_epi32)(high.vectors[1], upper(first)),
           WARPSTEP_V(add_epi32)(high.vectors[2], lower(second)),
           WARPSTEP_V(add_epi32)(high.vectors[3], upper(second))}};
}

// Of numbers, no NaN among them. `random` has 16 bits an element, where they are needed.
WARPSTEP_FN void store_group(const Group& x, const Singles& to, const Words&) {
  EvenAndOdd{x.vectors[0], x.vectors[1]}.store(to.at);
  EvenAndOdd{x.vectors[2], x.vectors[3]}.store(to.at + kGroup / 2);
}
WARPSTEP_FN void store_group(const Group& x, const Halves& to, const Words&) {
  Group rounded;
  for_vectors([&](int i) {
    const Vector is_odd = masked(WARPSTEP_V(srli_epi32)(x.vectors[i], 16), every<1>());
    rounded.vectors[i] =
        WARPSTEP_V(add_epi32)(WARPSTEP_V(add_epi32)(x.vectors[i], every<0x7fff>()), is_odd);
  });
  upper_halves(rounded).store(to.at);
}
WARPSTEP_FN void store_group(const Group& x, const MasterHalves& to, const Words&) {
  Group rounded;
  for_vectors([&](int i) {
    rounded.vectors[i] = WARPSTEP_V(add_epi32)(x.vectors[i], every<kHalfOfLast>());
  });
  upper_halves(rounded).store(to.at);
  Words{lower_halves(x.vectors[0], x.vectors[1]), lower_halves(x.vectors[2], x.vectors[3])}.store(
      to.residual);
}
WARPSTEP_FN void store_group(const Group& x, const RandomHalves& to, const Words& random) {
  Group rounded = widened(random);
  for_vectors(
      [&](int i) { rounded.vectors[i] = WARPSTEP_V(add_epi32)(x.vectors[i], rounded.vectors[i]); });
  upper_halves(rounded).store(to.at);
}

// ---- Codes

// 16 times the mean of 16 random bits.
constexpr std::uint32_t kRandomMean = 0x80000;

// Of interleaved() codes that are numbers. `base` is a bfloat16 in each half of 32-bit lanes.
template <class C>
WARPSTEP_FN Group decoded(Vector codes, Vector base) {
  Vector even, odd;  // as bfloat16
  if constexpr (C::kSigned) {
    const Vector mask = every<0x87f087f0u>();
    even = masked(WARPSTEP_V(srai_epi16)(WARPSTEP_V(slli_epi16)(codes, 8), 4), mask);
    odd = masked(WARPSTEP_V(srai_epi16)(codes, 4), mask);
  } else {
    even = masked(WARPSTEP_V(slli_epi16)(codes, 4), every<0x0ff00ff0>());
    odd = masked(WARPSTEP_V(srli_epi16)(codes, 4), every<0x0ff00ff0>());
  }
  const auto with_base = [&](Vector x) {
    return added_where_any(x, every<C::kSigned ? 0x07f007f0 : 0x0ff00ff0>(), base);
  };
  even = with_base(even), odd = with_base(odd);
  return {{lower_as_numbers(even), lower_as_numbers(odd), upper_as_numbers(even),
           upper_as_numbers(odd)}};
}

WARPSTEP_FN Vector magnitudes_of(Vector halves) { return masked(halves, every<0x7fff7fff>()); }

// Of numbers' upper halves, which all that is in a code depends on: rounding to nearest asks for no
// more. `base` with what blocks.h's encoded() takes from it, its upper half in both halves.
WARPSTEP_FN Vector encoded_e4m3(const Words& x, Vector base) {
  const auto code_of = [&](Vector half) {
    return WARPSTEP_V(srai_epi16)(WARPSTEP_V(sub_epi16)(magnitudes_of(half), base), 4);
  };
  // As bytes: what is below zero as zero, and the signs.
  const Vector codes = WARPSTEP_V(packus_epi16)(code_of(x.first), code_of(x.second));
  const Vector signs = WARPSTEP_V(packs_epi16)(x.first, x.second);
  return firsts_then_seconds(by_mask(every<0x7f7f7f7f>(), codes, signs));
}

// As bytes, too large and too small ones as the largest and least there are. In each 128 bits there
// are four of each vector.
WARPSTEP_FN Vector packed(const Group& x) {
  return WARPSTEP_V(packus_epi16)(WARPSTEP_V(packs_epi32)(x.vectors[0], x.vectors[1]),
                                  WARPSTEP_V(packs_epi32)(x.vectors[2], x.vectors[3]));
}
// Those as they lie in memory.
WARPSTEP_FN Vector in_order(Vector packed) {
  alignas(16) static constexpr std::uint8_t kPairs[] = {0, 4,  1, 5,  2,  6,  3,  7,
                                                        8, 12, 9, 13, 10, 14, 11, 15};
  return firsts_then_seconds(WARPSTEP_V(shuffle_epi8)(packed, in_each_128(kPairs)));
}

// `base` with what blocks.h's encoded() takes from it, and kRandomMean.
WARPSTEP_FN Vector encoded_ue5m3(const Group& x, Vector base, const Words& random) {
  // 16 times the random bits less their mean, as products of signed numbers are to be had.
  const auto times = [](Vector bits, Vector factors) {
    return WARPSTEP_V(madd_epi16)(WARPSTEP_V_BITS(xor)(bits, every<0x80008000u>()), factors);
  };
  const Vector even = every<16>(), odd = every<16 << 16>();
  Group codes = {{times(random.first, even), times(random.first, odd), times(random.second, even),
                  times(random.second, odd)}};
  for_vectors([&](int i) {
    const Vector above_base = WARPSTEP_V(sub_epi32)(x.vectors[i], base);
    codes.vectors[i] =
        WARPSTEP_V(srai_epi32)(WARPSTEP_V(add_epi32)(above_base, codes.vectors[i]), 20);
  });
  // No positive number becomes zero.
  const Vector least = WARPSTEP_V(min_epu8)(packed(x), every<0x01010101>());
  return in_order(WARPSTEP_V(max_epu8)(packed(codes), least));
}

// ---- Random bits

// An operand's, for the groups of a chunk.
class GroupDraws {
 public:
  // `keys`: those of `from`. `upper`: the upper 32 bits of draws' indices, which the chunk shares.
  GroupDraws(const LaneKeys& keys, const Draw& from, std::uint64_t upper)
      : keys_(keys),
        upper_(Lanes{} + upper),
        step_(Lanes{} + from.step),
        operand_(Lanes{} + from.operand) {}

  // A group's, a round at a time.
  class OfGroup {
   public:
    // `index`: the lower bits of the group's first draw.
    WARPSTEP_FN OfGroup(const GroupDraws& draws, std::uint32_t index)
        : keys_(draws.keys_),
          words_{Lanes{} + index + kOrder, draws.upper_, draws.step_, draws.operand_} {
      static_assert(kGroup == kDrawn * kLanes, "a lane a draw");
    }
    WARPSTEP_FN void round(std::uint32_t which) { philox_round(which, words_, keys_, product_of); }
    WARPSTEP_FN Words after_all() const {
      const auto pair = [&](int of) {
        return side_by_side(reinterpret_cast<Vector>(words_[of]),
                            reinterpret_cast<Vector>(words_[of + 1]));
      };
      const Vector a = pair(0), b = pair(2);
      return {WARPSTEP_V(unpacklo_epi64)(a, b), WARPSTEP_V(unpackhi_epi64)(a, b)};
    }

   private:
    // The group's halves take turns.
#ifdef __AVX512BW__
    static constexpr Lanes kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
#else
    static constexpr Lanes kOrder = {0, 2, 1, 3};
#endif
    const LaneKeys& keys_;
    Lanes words_[4];
  };

 private:
  const LaneKeys& keys_;
  const Lanes upper_, step_, operand_;
};

inline std::uint64_t draw_of(const TensorRow& row, std::int64_t element) {
  return static_cast<std::uint64_t>(row.first + element) / kDrawn;
}
// Whether the chunk begins with a draw, and the upper bits of its draws' indices are the same.
inline bool draws_are_whole(const ChunkOf& of) {
  return (of.row.first + of.range.begin) % kDrawn == 0 &&
         draw_of(of.row, of.range.begin) >> 32 == draw_of(of.row, of.range.end) >> 32;
}

// ---- The step

// Constants in every lane.
template <class Rule>
Constants<Rule, Floats> in_every_lane(const Constants<Rule, float>& c) {
  constexpr std::size_t kNumbers = sizeof(c) / sizeof(float);
  static_assert(sizeof(Constants<Rule, Floats>) == kNumbers * sizeof(Floats), "only numbers");
  Floats numbers[kNumbers];
  for (std::size_t i = 0; i < kNumbers; ++i) {
    numbers[i] = Floats(reinterpret_cast<const float*>(&c)[i]);
  }
  Constants<Rule, Floats> in_lanes;
  std::memcpy(&in_lanes, numbers, sizeof(in_lanes));
  return in_lanes;
}

// A group's moments after the step.
template <class Rule>
WARPSTEP_FN void advance(const Constants<Rule, Floats>& c, const Group& grad, Group& m, Group& v) {
  for_vectors([&](int i) {
    Floats moments[] = {Floats(m.vectors[i]), Floats(v.vectors[i])};
    const Floats g = Floats(grad.vectors[i]) * c.tail.grad_factor;
    Rule::template advance<Part::finite>(c.rule, g, moments);
    m.vectors[i] = moments[0].bits(), v.vectors[i] = moments[1].bits();
  });
}

// Its parameters after the step, and between their roots and divisions random bits.
template <class Rule, class... OfGroup>
WARPSTEP_FN void update(const Constants<Rule, Floats>& c, const Group& m, const Group& v, Group& p,
                        OfGroup&... draws) {
  const auto round = [&](std::uint32_t which) __attribute__((always_inline)) {
    if (which < kRounds) (draws.round(which), ...);
  };
  static_assert(2 * kVectors >= kRounds, "all of them");
  for_vectors([&](int i) __attribute__((always_inline)) {
    round(2 * i), round(2 * i + 1);
    const Floats moments[] = {Floats(m.vectors[i]), Floats(v.vectors[i])};
    const Floats u = Rule::template update_of<Part::finite>(c.rule, moments);
    p.vectors[i] = decayed<Part::finite>(c.decay, Floats(p.vectors[i]), u).bits();
  });
}

// Where a group has NaNs.
WARPSTEP_FN Flags are_nan(const Group& x) {
  const auto of_two = [&](int i) {
    return are_nan(Floats(x.vectors[i]), Floats(x.vectors[i + 1]));
  };
  return of_two(0) | of_two(2);
}

}  // namespace
}  // namespace warpstep
#endif
