// The step on the CPU for bfloat16 gradients where more than one codec of one element has a part: a
// master in two halves, rounding at random, a copy. What surrounds it is done tile by tile
// (tiles.h), with the same bits.
#pragma once

#include "draws.h"
#include "groups.h"
#include "pairs.h"
#include "tiles.h"

namespace warpstep {
namespace {

// A rule, and how its parameter and moments lie (pairs.h). Gradients are bfloat16.
template <class Rule, class Param, class... Moment>
class InPairs {
 public:
  static bool is_for(const RecipeKey& key) {
    RecipeKey mine{Rule::id, {}};
    mine.formats[kParam] = Param::format;
    mine.formats[kResidual] = std::is_same_v<Param, MasterHalves> ? Format::int16 : Format::none;
    mine.formats[kCopy] = std::is_same_v<Param, CopiedSingles> ? Format::bfloat16 : Format::none;
    mine.formats[kGrad] = Format::bfloat16;
    mine.formats[kEma] = key.formats[kEma];  // any
    std::uint32_t next = kMoment;
    ((mine.formats[next++] = Moment::format), ...);
    return key == mine;
  }

  static void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
    InPairs stepper(launch);
    TileStepper<Rule> tiles(launch);
    const bool is_plain = only_steps(launch), taken = is_taken(launch.tail);
    for_chunks<Rule, float>(launch, first, last, [&](const C& c, const ChunkOf& of, Sums& sums) {
      const auto [begin, end] = of.range;
      if (is_plain) return stepper.step(c, of, begin, end);
      for (std::int64_t at = begin; at < end; at += kDecoded) {
        const std::int64_t count = min_of(kDecoded, end - at);
        tiles.begin(of, at, count, sums);
        if (taken) stepper.step(c, of, at, at + count);
        tiles.finish(c, of, at, count, sums, taken);
      }
    });
  }

 private:
  using C = Constants<Rule, float>;

  explicit InPairs(const Launch& launch) : keys_(launch.seed), tail_(launch.tail) {}

  // Elements [at, end) of a chunk.
  __attribute__((noinline)) void step(const C& c, const ChunkOf& of, std::int64_t at,
                                      std::int64_t end) {
    for (; at < end; at += kDecoded) {
#ifdef WARPSTEP_HAS_VECTORS
      if constexpr (kInGroups) at += step_groups(c, of, at, end);
#endif
      const std::int64_t count = min_of(kDecoded, end - at);
      if (c.is_usual()) {
        step_pairwise<Part::usual>(c, of, at, count, std::index_sequence_for<Moment...>{});
      } else {
        step_pairwise<Part::whole>(c, of, at, count, std::index_sequence_for<Moment...>{});
      }
    }
  }

#ifdef WARPSTEP_HAS_VECTORS
  // Where an exp_avg_sq is rounded at random, a step in groups takes an eighth to a quarter less
  // than one in pairs: its random bits are made between roots and divisions, and not by themselves.
  static constexpr bool kInGroups = std::is_same_v<List<Moment...>, List<Halves, RandomHalves>>;

  // Elements [at, end), as long as there are whole groups of nothing but numbers: how many.
  std::int64_t step_groups(const C& c, const ChunkOf& of, std::int64_t at, std::int64_t end) const {
    if (!c.is_usual() || !is_finite(c.decay.decay) || !draws_are_whole(of)) return 0;
    const float step_after = t_of(tail_, of.step);
    const auto draws_of = [&](std::uint32_t which) {
      return GroupDraws(lane_keys_, Draw(keys_, step_after, of.row.number, which),
                        draw_of(of.row, at) >> 32);
    };
    const GroupDraws draws_of_p = draws_of(kParam), draws_of_v = draws_of(kMoment + 1);
    const auto in_lanes = in_every_lane(c);
    auto index = static_cast<std::uint32_t>(draw_of(of.row, at));
    std::int64_t done = 0;
    for (; at + done + kGroup <= end; done += kGroup, index += kGroup / kDrawn) {
      const auto p = from<Param>(of, kParam, at + done);
      const auto m = from<Halves>(of, kMoment, at + done);
      const auto v = from<RandomHalves>(of, kMoment + 1, at + done);
      const Halves g{static_cast<bfloat16*>(of.grad) + at + done};
      Group param = load_group(p), exp_avg = load_group(m), exp_avg_sq = load_group(v);
      ask_ahead<kGroup>(0, of.row.numel - (at + done), p, g, m, v);
      GroupDraws::OfGroup of_p(draws_of_p, index), of_v(draws_of_v, index);
      advance(in_lanes, load_group(g), exp_avg, exp_avg_sq);
      if constexpr (std::is_same_v<Param, RandomHalves>) {
        update(in_lanes, exp_avg, exp_avg_sq, param, of_v, of_p);
      } else {
        update(in_lanes, exp_avg, exp_avg_sq, param, of_v);
      }
      // A moment's NaN goes through root, quotient and sum into the parameter, and what is infinite
      // is rounded right.
      if (any(are_nan(param))) break;
      store_group(param, p, of_p.after_all());
      store_group(exp_avg, m, Words{});
      store_group(exp_avg_sq, v, of_v.after_all());
    }
    return done;
  }
#endif

  template <Part kPart, std::size_t... kIndex>
  void step_pairwise(const C& c, const ChunkOf& of, std::int64_t at, std::int64_t count,
                     std::index_sequence<kIndex...>) {
    const std::int64_t left = of.row.numel - at;
    const auto step = [&](auto... operands) {
      if constexpr ((std::is_same_v<Moment, Singles> || ...)) {
        step_singly<Rule, kPart>(c, count, left, operands...);
      } else {
        step_pairs<Rule, kPart>(c, count, left, operands...);
      }
    };
    step(operand<Param>(of, kParam, at, count), Halves{static_cast<bfloat16*>(of.grad) + at},
         operand<Moment>(of, kMoment + kIndex, at, count)...);
  }

  template <class Kind>
  Kind operand(const ChunkOf& of, std::uint32_t which, std::int64_t at, std::int64_t count) {
    Kind lying = from<Kind>(of, which, at);
    if constexpr (std::is_same_v<Kind, RandomHalves>) {
      const float step_after = t_of(tail_, of.step);
      const Draw draw(keys_, step_after, of.row.number, which);
      lying.random = draws_[which].fill(draw, of.row.first + at, count);
    }
    return lying;
  }

  // An operand from an element on, without random bits.
  template <class Kind>
  static Kind from(const ChunkOf& of, std::uint32_t which, std::int64_t at) {
    const auto elements = [&](std::uint32_t which_one, auto element) {
      return static_cast<decltype(element)*>(of.row.operands[which_one]) + at;
    };
    if constexpr (std::is_same_v<Kind, Singles>) {
      return {elements(which, float{})};
    } else if constexpr (std::is_same_v<Kind, CopiedSingles>) {
      return {elements(which, float{}), elements(kCopy, bfloat16{})};
    } else if constexpr (std::is_same_v<Kind, MasterHalves>) {
      return {elements(which, bfloat16{}), elements(kResidual, std::int16_t{})};
    } else if constexpr (std::is_same_v<Kind, RandomHalves>) {
      return {elements(which, bfloat16{}), nullptr};
    } else {
      return {elements(which, bfloat16{})};
    }
  }

  const Keys keys_;
#ifdef WARPSTEP_HAS_VECTORS
  const LaneKeys lane_keys_{keys_};
#endif
  const Tail& tail_;
  TileDraws<kDecoded> draws_[kMomentEnd];
};

using AllInPairs = List<InPairs<AdamW<false>, CopiedSingles, Singles, Singles>,
                        InPairs<AdamW<false>, MasterHalves, Singles, Singles>,
                        InPairs<AdamW<false>, MasterHalves, Halves, RandomHalves>,
                        InPairs<AdamW<false>, RandomHalves, Halves, RandomHalves>,
                        InPairs<AdamW<false>, Halves, Halves, RandomHalves>>;

// The kernel of a recipe that is among these; `kernel` for any other.
template <class... Types>
StepChunks find_among(List<Types...>, const RecipeKey& key, StepChunks kernel) {
  ((kernel = Types::is_for(key) ? Types::step_chunks : kernel), ...);
  return kernel;
}

}  // namespace
}  // namespace warpstep
