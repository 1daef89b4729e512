// The step on the CPU for recipes in 16 bits that are no codec's of one element: masters in two
// halves, rounding at random. With averages, copies, statistics or gradients that are written it
// goes through tiles, with the same bits.
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
    step_pairs<Rule, kPart>(c, count, operand<Param>(of, kParam, at, count),
                            Halves{static_cast<bfloat16*>(of.grad) + at},
                            operand<Moment>(of, kMoment + kIndex, at, count)...);
  }

  template <class Kind>
  Kind operand(const ChunkOf& of, std::uint32_t which, std::int64_t at, std::int64_t count) {
    bfloat16* const halves = static_cast<bfloat16*>(of.row.operands[which]) + at;
    if constexpr (std::is_same_v<Kind, MasterHalves>) {
      return {halves, static_cast<std::int16_t*>(of.row.operands[kResidual]) + at};
    } else if constexpr (std::is_same_v<Kind, RandomHalves>) {
      const float step_after = steps_advanced_ ? of.step : of.step + 1;
      const Draw from(keys_, step_after, of.row.number, which);
      return {halves, draws_[which].fill(from, of.row.first + at, count)};
    } else {
      return {halves};
    }
  }

  const Keys keys_;
  const bool steps_advanced_;
  TileDraws<kDecoded> draws_[kMomentEnd];
};

using AllInPairs = List<InPairs<AdamW<false>, MasterHalves, Halves, RandomHalves>,
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
