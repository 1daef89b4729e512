// The step on the CPU for bfloat16 gradients where more than one codec of one element has a part: a
// master in two halves, rounding at random, a copy. With averages, other copies, statistics or
// gradients that are written it goes through tiles, with the same bits.
#pragma once

#include "draws.h"
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
    std::uint32_t next = kMoment;
    ((mine.formats[next++] = Moment::format), ...);
    return key == mine;
  }

  static void step_chunks(const Launch& launch, std::uint32_t first, std::uint32_t last) {
    const Tail& tail = launch.tail;
    if (!is_taken(tail) || tail.statistics != nullptr || tail.grads_after != GradsAfter::kept) {
      return step_tiles<Rule>(launch, first, last);
    }
    InPairs stepper(launch);
    for_chunks<Rule, float>(launch, first, last, [&](const C& c, const ChunkOf& of, Sums&) {
      for (std::int64_t at = of.range.begin; at < of.range.end; at += kDecoded) {
        const std::int64_t count = min_of(kDecoded, of.range.end - at);
        if (c.is_usual()) {
          stepper.step<Part::usual>(c, of, at, count, std::index_sequence_for<Moment...>{});
        } else {
          stepper.step<Part::whole>(c, of, at, count, std::index_sequence_for<Moment...>{});
        }
      }
    });
  }

 private:
  using C = Constants<Rule, float>;

  explicit InPairs(const Launch& launch)
      : keys_(launch.seed), steps_advanced_(launch.tail.steps_advanced) {}

  template <Part kPart, std::size_t... kIndex>
  void step(const C& c, const ChunkOf& of, std::int64_t at, std::int64_t count,
            std::index_sequence<kIndex...>) {
    const auto step = [&](auto... operands) {
      if constexpr ((std::is_same_v<Moment, Singles> || ...)) {
        step_singly<Rule, kPart>(c, count, operands...);
      } else {
        step_pairs<Rule, kPart>(c, count, operands...);
      }
    };
    step(operand<Param>(of, kParam, at, count), Halves{static_cast<bfloat16*>(of.grad) + at},
         operand<Moment>(of, kMoment + kIndex, at, count)...);
  }

  template <class Kind>
  Kind operand(const ChunkOf& of, std::uint32_t which, std::int64_t at, std::int64_t count) {
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
      const float step_after = steps_advanced_ ? of.step : of.step + 1;
      const Draw from(keys_, step_after, of.row.number, which);
      return {elements(which, bfloat16{}), draws_[which].fill(from, of.row.first + at, count)};
    } else {
      return {elements(which, bfloat16{})};
    }
  }

  const Keys keys_;
  const bool steps_advanced_;
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
