// The step on the CPU for moments of 8 bits, with AVX-512: in registers and the L1 cache from loads
// to stores. Blocks with something that is no finite number go through tiles, as do a tensor's last
// elements, and everything with averages, copies, statistics or gradients that are written; the
// bits are the same.
//
// NOTE [four blocks at a time]
// A processor looks some hundred instructions ahead. A block takes more, and waits for itself: for
// the rounds of its random bits, for its root and division, for its largest number. Blocks do not
// wait for each other, so each part of the step is done for four of them before the next part.
#pragma once

#include "block_avx512.h"
#include "tiles.h"

#ifdef __AVX512BW__
namespace warpstep {
namespace {

constexpr int kBlocks = kDecoded / kBlock;  // that are stepped at a time

// ---- Scales

WARPSTEP_FN __m512i larger(__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }
WARPSTEP_FN __m512i largest_of(const Block& x) {
  return larger(larger(x.vectors[0], x.vectors[1]), larger(x.vectors[2], x.vectors[3]));
}
// Of a block's moments, as unsigned numbers: eight lanes for exp_avg, then eight for exp_avg_sq.
WARPSTEP_FN __m512i largest_of(const Block& exp_avg, const Block& exp_avg_sq) {
  const __m512i m = largest_of(magnitudes_of(exp_avg)), v = largest_of(exp_avg_sq);
  return larger(_mm512_shuffle_i64x2(m, v, 0x44), _mm512_shuffle_i64x2(m, v, 0xee));
}

// Of the blocks that are stepped at once.
class Scales {
 public:
  Scales(__m512i first, __m512i second, __m512i third, __m512i fourth) {
    static_assert(kBlocks == 4, "eight numbers, in two lanes each");
    // Halves are put side by side, and the larger ones kept.
    const auto folded = [](__m512i a, __m512i b) {
      return larger(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
    };
    const __m512i a = folded(first, second), b = folded(third, fourth);
    const __m512i in_pairs = larger(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    largest_ = larger(in_pairs, _mm512_shuffle_epi32(in_pairs, _MM_PERM_CDAB));
    // As scale_of() and base_of().
    const __m512i exponents =
        _mm512_srli_epi32(_mm512_add_epi32(largest_, every<kToNextScale>()), 23);
    scales_ = larger(exponents, of_both<E4m3::kReach + 1, Ue5m3::kReach + 1>());
    bases_ = _mm512_sub_epi32(
        _mm512_slli_epi32(scales_, 23),
        of_both<(E4m3::kReach << 23) + kHalfOfCode, (Ue5m3::kReach << 23) + kHalfOfRandom>());
  }

  // Whether the largest are, and none is negative that has no sign.
  bool are_of_numbers() const {
    return _mm512_cmpge_epu32_mask(largest_, every<0x7f800000>()) == 0;
  }
  template <int kOfBlock>
  WARPSTEP_FN __m512i base_of_exp_avg() const {
    return base<lane_of(kOfBlock)>();
  }
  template <int kOfBlock>
  WARPSTEP_FN __m512i base_of_exp_avg_sq() const {
    return base<lane_of(kOfBlock) + 4>();
  }
  void store(std::uint8_t* exp_avg, std::uint8_t* exp_avg_sq) const {
    const __m512i order =
        _mm512_setr_epi32(lane_of(0), lane_of(1), lane_of(2), lane_of(3), lane_of(0) + 4,
                          lane_of(1) + 4, lane_of(2) + 4, lane_of(3) + 4, 0, 0, 0, 0, 0, 0, 0, 0);
    alignas(16) std::uint8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes),
                    _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(order, scales_)));
    std::memcpy(exp_avg, bytes, kBlocks);
    std::memcpy(exp_avg_sq, bytes + kBlocks, kBlocks);
  }

 private:
  // Where a block's exp_avg is, with exp_avg_sq four lanes further.
  static constexpr int lane_of(int block) { return block / 2 * 2 + block % 2 * 8; }

  template <std::uint32_t kOfExpAvg, std::uint32_t kOfExpAvgSq>
  static __m512i of_both() {
    return _mm512_mask_blend_epi32(0xf0f0, every<kOfExpAvg>(), every<kOfExpAvgSq>());
  }
  template <int kLane>
  WARPSTEP_FN __m512i base() const {
    return _mm512_permutexvar_epi32(every<kLane>(), bases_);
  }

  __m512i largest_, scales_, bases_;
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
    return key == mine;
  }

  static void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
    const Tail& tail = launch.tail;
    const bool only_steps =
        is_taken(tail) && tail.statistics == nullptr && tail.grads_after == GradsAfter::kept;
    const Keys keys(launch.seed);
    const LaneKeys lane_keys(keys);
    TileStepper<Rule> tiles(launch);
    for_chunks<Rule, float>(launch, first, last, [&](const C& c, const ChunkOf& of, Sums& sums) {
      const std::int64_t begin = of.range.begin, end = of.range.end;
      const float step_after = tail.steps_advanced ? of.step : of.step + 1;
      const auto draws = [&](std::uint32_t operand) {
        return BlockDraws(lane_keys, Draw(keys, step_after, of.row.number, operand),
                          draw_of(of.row, begin) >> 32);
      };
      const InBlocks blocks(of, draws(kParam), draws(kExpAvgSq));
      const bool in_registers =
          only_steps && c.is_usual() && is_finite(c.decay.decay) && InBlocks::draws_are_whole(of);
      for (std::int64_t at = begin; at < end; at += kDecoded) {
        if (in_registers && at + kDecoded <= end && blocks.step(c, at)) continue;
        tiles.step(c, of, at, min_of(kDecoded, end - at), sums);
      }
    });
  }

 private:
  using C = Constants<Rule, float>;
  static constexpr bool kHasMaster = std::is_same_v<Param, MasterHalves>;
  static constexpr bool kIsRandom = std::is_same_v<Param, RandomHalves>;
  static constexpr std::uint32_t kExpAvg = kMoment, kExpAvgSq = kMoment + 1;
  static_assert(Rule::kMoments == 2, "exp_avg and exp_avg_sq");

  // A block's numbers after the step.
  struct Result {
    Block param, exp_avg, exp_avg_sq;
    __m512i largest;  // of its moments
  };

  static std::uint64_t draw_of(const TensorRow& row, std::int64_t at) {
    return static_cast<std::uint64_t>(row.first + at) / kDrawn;
  }
  // Whether the chunk begins with a draw, and the upper bits of its draws' indices are the same.
  static bool draws_are_whole(const ChunkOf& of) {
    return of.row.first % kDrawn == 0 &&
           draw_of(of.row, of.range.begin) >> 32 == draw_of(of.row, of.range.end) >> 32;
  }

  InBlocks(const ChunkOf& of, const BlockDraws& of_param, const BlockDraws& of_exp_avg_sq)
      : row_(of.row),
        grad_{static_cast<decltype(Grad::at)>(of.grad)},
        of_param_(of_param),
        of_exp_avg_sq_(of_exp_avg_sq) {}

  // Elements [at, at + kDecoded); false, and nothing done, where something is no finite number.
  WARPSTEP_FN bool step(const C& c, std::int64_t at) const {
    Words random[kBlocks], random_of_param[kBlocks];
    draw(of_exp_avg_sq_, at, random);
    if constexpr (kIsRandom) draw(of_param_, at, random_of_param);

    Result results[kBlocks];
    bool are_numbers = true;
    for (int b = 0; b < kBlocks; ++b) are_numbers &= step_block(c, at + b * kBlock, results[b]);
    const Scales scales(results[0].largest, results[1].largest, results[2].largest,
                        results[3].largest);
    if (!are_numbers || !scales.are_of_numbers()) return false;

    store(results, scales, random, random_of_param, at, std::make_index_sequence<kBlocks>{});
    scales.store(operand<std::uint8_t>(kScale, at / kBlock),
                 operand<std::uint8_t>(kScale + 1, at / kBlock));
    return true;
  }

  WARPSTEP_FN void draw(const BlockDraws& from, std::int64_t at, Words (&random)[kBlocks]) const {
    auto index = static_cast<std::uint32_t>(draw_of(row_, at));
    for (Words& bits : random) bits = from.of_block(index), index += kBlock / kDrawn;
  }

  // Whether all that it read, and the parameter after the step, are numbers. An infinite parameter
  // counts where Part::finite steps it right.
  WARPSTEP_FN bool step_block(const C c, std::int64_t at, Result& to) const {
    const __m512i m_codes = _mm512_loadu_si512(operand<std::uint8_t>(kExpAvg, at));
    const __m512i v_codes = _mm512_loadu_si512(operand<std::uint8_t>(kExpAvgSq, at));
    const std::uint8_t m_scale = *operand<std::uint8_t>(kScale, at / kBlock);
    const std::uint8_t v_scale = *operand<std::uint8_t>(kScale + 1, at / kBlock);
    const __m512i largest_codes =
        _mm512_max_epu8(_mm512_or_si512(m_codes, every<0x80808080u>()), v_codes);
    const __mmask64 no_numbers =
        _mm512_cmpge_epu8_mask(largest_codes, every<Ue5m3::kInfinite * 0x01010101u>());
    static_assert((E4m3::kInfinite | 0x80) == Ue5m3::kInfinite, "one comparison for both");

    const Block p = load_block(param_at(at)), g = load_block(Grad{grad_.at + at});
    // With the last scale a number's code may be infinite; the moment then stays no finite number.
    const Block m = decoded<E4m3>(interleaved(m_codes), base_of<E4m3>(m_scale));
    const Block v = decoded<Ue5m3>(interleaved(v_codes), base_of<Ue5m3>(v_scale));
    struct Vector {
      float lane[16];
    };
    for (int i = 0; i < kVectors; ++i) {
      Vector param = bits_as<Vector>(p.vectors[i]), grad = bits_as<Vector>(g.vectors[i]);
      Vector exp_avg = bits_as<Vector>(m.vectors[i]), exp_avg_sq = bits_as<Vector>(v.vectors[i]);
      for (int k = 0; k < 16; ++k) {
        float moments[] = {exp_avg.lane[k], exp_avg_sq.lane[k]};
        param.lane[k] = stepped<Rule, Part::finite>(c, param.lane[k], grad.lane[k], moments);
        exp_avg.lane[k] = moments[0], exp_avg_sq.lane[k] = moments[1];
      }
      to.param.vectors[i] = bits_as<__m512i>(param);
      to.exp_avg.vectors[i] = bits_as<__m512i>(exp_avg);
      to.exp_avg_sq.vectors[i] = bits_as<__m512i>(exp_avg_sq);
    }
    to.largest = largest_of(to.exp_avg, to.exp_avg_sq);
    const auto any_nan = [&](int i, int j) {
      return _mm512_cmp_ps_mask(bits_as<__m512>(to.param.vectors[i]),
                                bits_as<__m512>(to.param.vectors[j]), _CMP_UNORD_Q);
    };
    return (no_numbers | any_nan(0, 1) | any_nan(2, 3)) == 0;
  }

  template <std::size_t... kBlockOf>
  WARPSTEP_FN void store(const Result (&results)[kBlocks], const Scales& scales,
                         const Words (&random)[kBlocks], const Words (&random_of_param)[kBlocks],
                         std::int64_t at, std::index_sequence<kBlockOf...>) const {
    (store_block_of<kBlockOf>(results[kBlockOf], scales, random[kBlockOf],
                              random_of_param[kBlockOf], at + kBlockOf * kBlock),
     ...);
  }
  template <int kBlockOf>
  WARPSTEP_FN void store_block_of(const Result& from, const Scales& scales, const Words& random,
                                  const Words& random_of_param, std::int64_t at) const {
    _mm512_storeu_si512(operand<std::uint8_t>(kExpAvg, at),
                        encoded_e4m3(from.exp_avg, scales.base_of_exp_avg<kBlockOf>()));
    _mm512_storeu_si512(
        operand<std::uint8_t>(kExpAvgSq, at),
        encoded_ue5m3(from.exp_avg_sq, scales.base_of_exp_avg_sq<kBlockOf>(), random));
    store_block(from.param, param_at(at), random_of_param);
  }

  template <class T>
  WARPSTEP_FN T* operand(std::uint32_t which, std::int64_t at) const {
    return static_cast<T*>(row_.operands[which]) + at;
  }
  WARPSTEP_FN Param param_at(std::int64_t at) const {
    Param param{};
    param.at = static_cast<decltype(Param::at)>(row_.operands[kParam]) + at;
    if constexpr (kHasMaster) param.residual = operand<std::int16_t>(kResidual, at);
    return param;
  }

  const TensorRow& row_;
  const Grad grad_;
  const BlockDraws of_param_, of_exp_avg_sq_;
};

using AllInBlocks =
    List<InBlocks<AdamW<false>, Singles, Singles>,  //
         InBlocks<AdamW<false>, Halves, Halves>, InBlocks<AdamW<false>, MasterHalves, Halves>,
         InBlocks<AdamW<false>, RandomHalves, Halves>>;

}  // namespace
}  // namespace warpstep
#endif
