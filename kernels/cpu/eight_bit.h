// The step on the CPU for moments of 8 bits, with AVX-512 or AVX2: in registers and the L1 cache
// from loads to stores. Blocks with something that is no finite number go through tiles, as do a
// tensor's last elements, and what surrounds a step; the bits are the same.
//
// NOTE [four blocks at a time]
// A processor looks some hundred instructions ahead. A block takes more, and waits for itself: for
// the rounds of its random bits, for its root and division, for its largest number. Blocks do not
// wait for each other, so each part of the step is done for four of them before the next part.
#pragma once

#include "groups.h"
#include "tiles.h"

#ifdef WARPSTEP_HAS_VECTORS
namespace warpstep {
namespace {

// That are stepped at a time.
constexpr int kBlocks = kDecoded / kBlock;
constexpr int kGroups = kDecoded / kGroup;
constexpr int kOfBlock = kBlock / kGroup;  // groups
// Whether a group's parameters follow its moments at once. With AVX-512 that is 4% faster than two
// loops; with AVX2 the two together are more than a processor looks ahead: a twelfth slower.
constexpr bool kUpdatesAtOnce = kOfBlock == 1;

// ---- Scales

WARPSTEP_FN Vector larger(Vector a, Vector b) { return WARPSTEP_V(max_epu32)(a, b); }
WARPSTEP_FN Vector largest_of(const Group& x) {
  return larger(larger(x.vectors[0], x.vectors[1]), larger(x.vectors[2], x.vectors[3]));
}
// Of a group's moments, as unsigned numbers: half of the lanes for exp_avg, half for exp_avg_sq. Of
// exp_avg the upper half, which all that is asked of the largest depends on; what is below is any.
WARPSTEP_FN Vector largest_of(const Words& exp_avg, const Group& exp_avg_sq) {
  const Vector halves =
      WARPSTEP_V(max_epu16)(magnitudes_of(exp_avg.first), magnitudes_of(exp_avg.second));
  const Vector m = larger(halves, WARPSTEP_V(slli_epi32)(halves, 16)), v = largest_of(exp_avg_sq);
#ifdef __AVX512BW__
  return larger(_mm512_shuffle_i64x2(m, v, 0x44), _mm512_shuffle_i64x2(m, v, 0xee));
#else
  return larger(_mm256_permute2x128_si256(m, v, 0x20), _mm256_permute2x128_si256(m, v, 0x31));
#endif
}

// Of the blocks that are stepped at once.
class Scales {
 public:
  // `largest`: of each block.
  explicit Scales(const Vector (&largest)[kBlocks]) : largest_(folded(largest)) {
    // As scale_of() and base_of().
    const Vector exponents =
        WARPSTEP_V(srli_epi32)(WARPSTEP_V(add_epi32)(largest_, every<kToNextScale>()), 23);
    const Vector scales = larger(exponents, of_both<E4m3::kReach + 1, Ue5m3::kReach + 1>());
    const Vector bases =
        WARPSTEP_V(sub_epi32)(WARPSTEP_V(slli_epi32)(scales, 23),
                              of_both<(E4m3::kReach << 23) + kHalfOfCode,
                                      (Ue5m3::kReach << 23) + kHalfOfRandom + kRandomMean>());
    const Vector upper_halves = WARPSTEP_V(srli_epi32)(bases, 16);
    store_vector(scales_, scales);
    store_vector(bases_, with_bits(bases, masked(upper_halves, of_both<0xffff, 0>())));
  }

  // Whether the largest are, and none is negative that has no sign.
  bool are_of_numbers() const { return !any(are_32_bits_at_least(largest_, every<0x7f800000>())); }
  WARPSTEP_FN Vector base_of_exp_avg(int block) const { return every_lane(bases_[lane_of(block)]); }
  WARPSTEP_FN Vector base_of_exp_avg_sq(int block) const {
    return every_lane(bases_[lane_of(block) + kBlocks]);
  }
  void store(std::uint8_t* exp_avg, std::uint8_t* exp_avg_sq) const {
    for (int block = 0; block < kBlocks; ++block) {
      exp_avg[block] = static_cast<std::uint8_t>(scales_[lane_of(block)]);
      exp_avg_sq[block] = static_cast<std::uint8_t>(scales_[lane_of(block) + kBlocks]);
    }
  }

 private:
  WARPSTEP_FN static Vector every_lane(std::uint32_t x) {
    return WARPSTEP_V(set1_epi32)(static_cast<int>(x));
  }

  static_assert(kBlocks == 4, "eight numbers");
#ifdef __AVX512BW__  // in two lanes each
  static Vector folded(const Vector (&largest)[kBlocks]) {
    // Halves are put side by side, and the larger ones kept.
    const auto pair = [](Vector a, Vector b) {
      return larger(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
    };
    const Vector a = pair(largest[0], largest[1]), b = pair(largest[2], largest[3]);
    const Vector in_pairs = larger(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    return larger(in_pairs, _mm512_shuffle_epi32(in_pairs, _MM_PERM_CDAB));
  }
  // Where a block's exp_avg is, with exp_avg_sq four lanes further.
  static constexpr int lane_of(int block) { return block / 2 * 2 + block % 2 * 8; }
#else
  static Vector folded(const Vector (&largest)[kBlocks]) {
    const auto pair = [](Vector a, Vector b) {
      return _mm256_castsi256_ps(larger(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)));
    };
    const __m256 a = pair(largest[0], largest[1]), b = pair(largest[2], largest[3]);
    return larger(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
                  _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
  }
  static constexpr int lane_of(int block) { return block; }
#endif

  // One constant in the lanes of exp_avg, another in those of exp_avg_sq.
  template <std::uint32_t kOfExpAvg, std::uint32_t kOfExpAvgSq>
  static Vector of_both() {
#ifdef __AVX512BW__
    return _mm512_mask_blend_epi32(0xf0f0, every<kOfExpAvg>(), every<kOfExpAvgSq>());
#else
    return _mm256_blend_epi32(every<kOfExpAvg>(), every<kOfExpAvgSq>(), 0xf0);
#endif
  }

  Vector largest_;
  alignas(64) std::uint32_t scales_[kSimdBytes / 4], bases_[kSimdBytes / 4];
};

// ---- The step

// A rule, and how its parameter and gradient lie (pairs.h). Moments are e4m3 and ue5m3.
template <class Rule, class Param, class Grad>
class InBlocks {
 public:
  static bool is_for(const RecipeKey& key) {
    RecipeKey mine{Rule::id, {}};
    mine.formats[kParam] = Param::format;
    mine.formats[kResidual] = kHasMaster ? Format::int16 : Format::none;
    mine.formats[kGrad] = Grad::format;
    mine.formats[kExpAvg] = Format::e4m3, mine.formats[kExpAvgSq] = Format::ue5m3;
    mine.formats[kScale] = mine.formats[kScale + 1] = Format::uint8;
    mine.formats[kEma] = key.formats[kEma];  // any
    return key == mine;
  }

  static void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
    const Tail& tail = launch.tail;
    const bool is_plain = only_steps(launch), taken = is_taken(tail);
    const Keys keys(launch.seed);
    const LaneKeys lane_keys(keys);
    TileStepper<Rule> tiles(launch);
    for_chunks<Rule, float>(launch, first, last, [&](const C& c, const ChunkOf& of, Sums& sums) {
      const std::int64_t begin = of.range.begin, end = of.range.end;
      const float step_after = t_of(tail, of.step);
      const auto draws = [&](std::uint32_t operand) {
        return GroupDraws(lane_keys, Draw(keys, step_after, of.row.number, operand),
                          draw_of(of.row, begin) >> 32);
      };
      const InBlocks blocks(of, draws(kParam), draws(kExpAvgSq));
      const CInLanes in_lanes = in_every_lane(c);
      const bool in_registers =
          taken && c.is_usual() && is_finite(c.decay.decay) && draws_are_whole(of);
      for (std::int64_t at = begin; at < end; at += kDecoded) {
        const std::int64_t count = min_of(kDecoded, end - at);
        if (!is_plain) tiles.begin(of, at, count, sums);
        const bool stepped = in_registers && count == kDecoded && blocks.step(in_lanes, at);
        if (!is_plain || !stepped) tiles.finish(c, of, at, count, sums, stepped);
      }
    });
  }

 private:
  using C = Constants<Rule, float>;
  using CInLanes = Constants<Rule, Floats>;
  static constexpr bool kHasMaster = std::is_same_v<Param, MasterHalves>;
  static constexpr bool kIsRandom = std::is_same_v<Param, RandomHalves>;
  static constexpr std::uint32_t kExpAvg = kMoment, kExpAvgSq = kMoment + 1;
  static_assert(Rule::kMoments == 2, "exp_avg and exp_avg_sq");

  // Operands from some element on.
  struct Operands {
    Param param;
    Grad grad;
    std::uint8_t *m_codes, *v_codes;

    Operands from(std::int64_t element) const {
      Operands to = *this;
      to.param = InBlocks::from(param, element);
      to.grad.at += element, to.m_codes += element, to.v_codes += element;
      return to;
    }
  };
  WARPSTEP_FN static Param from(Param param, std::int64_t elements) {
    param.at += elements;
    if constexpr (kHasMaster) param.residual += elements;
    return param;
  }

  // What tells whether all codes that were read, and the parameters after the step, are numbers.
  // An infinity in a parameter passes for a number here, since Part::finite steps it right.
  struct Seen {
    Vector largest_codes{};
    Flags nan{};

    bool only_numbers() const {
      static_assert((E4m3::kInfinite | 0x80) == Ue5m3::kInfinite, "one comparison for both");
      return !any(nan |
                  are_8_bits_at_least(largest_codes, every<Ue5m3::kInfinite * 0x01010101u>()));
    }
  };

  InBlocks(const ChunkOf& of, const GroupDraws& of_param, const GroupDraws& of_exp_avg_sq)
      : row_(of.row), of_param_(of_param), of_exp_avg_sq_(of_exp_avg_sq) {
    const auto operand = [&](std::uint32_t which) { return of.row.operands[which]; };
    all_.param.at = static_cast<decltype(Param::at)>(operand(kParam));
    if constexpr (kHasMaster) all_.param.residual = static_cast<std::int16_t*>(operand(kResidual));
    all_.grad.at = static_cast<decltype(Grad::at)>(of.grad);
    all_.m_codes = static_cast<std::uint8_t*>(operand(kExpAvg));
    all_.v_codes = static_cast<std::uint8_t*>(operand(kExpAvgSq));
    m_scales_ = static_cast<std::uint8_t*>(operand(kScale));
    v_scales_ = static_cast<std::uint8_t*>(operand(kScale + 1));
  }

  // Elements [at, at + kDecoded); false, and nothing done, where something is no finite number.
  WARPSTEP_FN bool step(const CInLanes& c, std::int64_t at) const {
    const Operands operands = all_.from(at);
    std::uint8_t* const m_scales = m_scales_ + at / kBlock;
    std::uint8_t* const v_scales = v_scales_ + at / kBlock;
    Group m[kGroups], v[kGroups], p[kGroups];
    Words m_halves[kGroups], random[kGroups], random_of_param[kGroups];
    Seen seen;

    const auto first_draw = static_cast<std::uint32_t>(draw_of(row_, at));
    const auto update_group = [&](int g) {
      const std::uint32_t index = first_draw + g * kGroup / kDrawn;
      GroupDraws::OfGroup of_v(of_exp_avg_sq_, index), of_p(of_param_, index);
      p[g] = load_group(operands.from(g * kGroup).param);
      if constexpr (kIsRandom) {
        update(c, m[g], v[g], p[g], of_v, of_p);
        random_of_param[g] = of_p.after_all();
      } else {
        update(c, m[g], v[g], p[g], of_v);
      }
      random[g] = of_v.after_all();
      seen.nan = seen.nan | are_nan(p[g]);
    };
    Vector largest[kBlocks];
    for (int block = 0; block < kBlocks; ++block) {
      const Vector m_base = base<E4m3>(m_scales[block]), v_base = base<Ue5m3>(v_scales[block]);
      largest[block] = Vector{};
      ask_ahead<kBlock>(block * kBlock, row_.numel - at, operands.param, operands.grad,
                        operands.m_codes, operands.v_codes);
      for (int g = block * kOfBlock; g < (block + 1) * kOfBlock; ++g) {
        advance(c, operands.from(g * kGroup), m_base, v_base, m[g], v[g], seen);
        m_halves[g] = upper_halves(m[g]);
        largest[block] = larger(largest[block], largest_of(m_halves[g], v[g]));
        if constexpr (kUpdatesAtOnce) update_group(g);
      }
    }
    if constexpr (!kUpdatesAtOnce) {
      for (int g = 0; g < kGroups; ++g) update_group(g);
    }
    const Scales scales(largest);
    if (!seen.only_numbers() || !scales.are_of_numbers()) return false;

    for (int block = 0; block < kBlocks; ++block) {
      const Vector m_base = scales.base_of_exp_avg(block);
      const Vector v_base = scales.base_of_exp_avg_sq(block);
      for (int g = block * kOfBlock; g < (block + 1) * kOfBlock; ++g) {
        const std::int64_t i = g * kGroup;
        store_vector(operands.m_codes + i, encoded_e4m3(m_halves[g], m_base));
        store_vector(operands.v_codes + i, encoded_ue5m3(v[g], v_base, random[g]));
        store_group(p[g], operands.from(i).param, random_of_param[g]);
      }
    }
    scales.store(m_scales, v_scales);
    return true;
  }

  // base_of() a scale, its upper half in lanes of 16 bits.
  template <class Code>
  WARPSTEP_FN static Vector base(std::uint8_t scale) {
    return WARPSTEP_V(set1_epi16)(static_cast<std::int16_t>(base_of<Code>(scale) >> 16));
  }

  // A group's moments after the step.
  WARPSTEP_FN static void advance(const CInLanes& c, const Operands& from, Vector m_base,
                                  Vector v_base, Group& m, Group& v, Seen& seen) {
    const Vector m_codes = load_vector(from.m_codes), v_codes = load_vector(from.v_codes);
    const Vector larger_codes =
        WARPSTEP_V(max_epu8)(with_bits(m_codes, every<0x80808080u>()), v_codes);
    seen.largest_codes = WARPSTEP_V(max_epu8)(seen.largest_codes, larger_codes);
    const Group grad = load_group(from.grad);
    // With the last scale a number's code may be infinite; the moment then stays no finite number.
    m = decoded<E4m3>(interleaved(m_codes), m_base);
    v = decoded<Ue5m3>(interleaved(v_codes), v_base);
    warpstep::advance(c, grad, m, v);
  }

  const TensorRow& row_;
  Operands all_{};
  std::uint8_t *m_scales_, *v_scales_;
  const GroupDraws of_param_, of_exp_avg_sq_;
};

using AllInBlocks =
    List<InBlocks<AdamW<false>, Singles, Singles>,  //
         InBlocks<AdamW<false>, Halves, Halves>, InBlocks<AdamW<false>, MasterHalves, Halves>,
         InBlocks<AdamW<false>, RandomHalves, Halves>>;

}  // namespace
}  // namespace warpstep
#endif
