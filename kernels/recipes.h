// The recipes that there are kernels for. Rules and combinations of formats that are most used have
// kernels of their own, with elements that never leave registers; every other combination goes
// through tiles, with formats that are told apart at run time.
#pragma once

#include <utility>

#include "formats.h"
#include "rules/adamw.h"
#include "rules/sgd.h"

namespace warpstep {
namespace {

// A rule, and the formats of its operands as types. Numbers are in `Compute` between load and
// store.
template <class RuleType, class ParamFormat, class GradFormat, class... MomentFormats>
struct Recipe {
  using Rule = RuleType;
  using Param = ParamFormat;
  using Grad = GradFormat;
  using Compute = typename Param::Compute;
  static_assert(sizeof...(MomentFormats) == Rule::kMoments, "a format for each moment");

  // Averages are of the parameter's format or float32: a kernel tells them apart at run time.
  static constexpr bool averages_are_of(Format ema) {
    return ema == Format::none || ema == Param::format ||
           (ema == Format::float32 && Param::format != Format::float64);
  }
  static bool is_for(const RecipeKey& key) {
    constexpr Format moments[] = {MomentFormats::format..., Format::none, Format::none,
                                  Format::none};
    bool same = key.rule == Rule::id && key.formats[kParam] == Param::format &&
                key.formats[kGrad] == Grad::format && key.formats[kResidual] == Format::none &&
                key.formats[kCopy] == Format::none && averages_are_of(key.formats[kEma]);
    for (std::uint32_t i = kMoment; i < kMomentEnd; ++i) {
      same = same && key.formats[i] == moments[i - kMoment];
    }
    return same;
  }
};

template <class... Types>
struct List {};

// The parameter's format, the gradient's, and that of all moments.
template <class Param, class Grad, class Moment>
struct Formats {};
using UniformFormats = List<Formats<float64, float64, float64>,     //
                            Formats<float32, float32, float32>,     //
                            Formats<bfloat16, bfloat16, bfloat16>,  //
                            Formats<float16, float16, float16>>;
using MixedFormats = List<Formats<bfloat16, bfloat16, float32>,  //
                          Formats<float16, float16, float32>,    //
                          Formats<bfloat16, float32, bfloat16>,  //
                          Formats<bfloat16, float32, float32>,   //
                          Formats<float16, float32, float16>,    //
                          Formats<float16, float32, float32>,    //
                          Formats<float32, float32, bfloat16>>;

// A rule, and the formats for which it has kernels of its own. To add a rule, or such a
// combination, add a line. Half of the build's time is theirs: what few ask for goes through tiles.
template <class Rule, class AnyFormats>
struct Built {};
using AllBuilt = List<Built<AdamW<false>, UniformFormats>,  //
                      Built<AdamW<false>, MixedFormats>,    //
                      Built<AdamW<true>, UniformFormats>,   //
                      Built<Sgd<false>, UniformFormats>,    //
                      Built<Sgd<true>, UniformFormats>>;
using AllRules = List<AdamW<false>, AdamW<true>, Sgd<false>, Sgd<true>>;

template <class Visit, class Rule, class Param, class Grad, class Moment, std::size_t... kMoments>
bool visit_recipe(Rule, Formats<Param, Grad, Moment>, std::index_sequence<kMoments...>,
                  const RecipeKey& key, Visit&& visit) {
  using Found = Recipe<Rule, Param, Grad, std::enable_if_t<kMoments + 1 != 0, Moment>...>;
  return Found::is_for(key) && (visit(Found{}), true);
}
template <class Visit, class Rule, class... AnyFormats>
bool visit_recipe(Built<Rule, List<AnyFormats...>>, const RecipeKey& key, Visit&& visit) {
  constexpr auto kMoments = std::make_index_sequence<Rule::kMoments>{};
  return (visit_recipe(Rule{}, AnyFormats{}, kMoments, key, visit) || ...);
}
template <class Visit, class... AnyBuilt>
bool visit_recipe(List<AnyBuilt...>, const RecipeKey& key, Visit&& visit) {
  return (visit_recipe(AnyBuilt{}, key, visit) || ...);
}

// Calls visit(Recipe{}) for the recipe that a key names; false if none is built.
template <class Visit>
bool visit_recipe(const RecipeKey& key, Visit&& visit) {
  return visit_recipe(AllBuilt{}, key, visit);
}

WARPSTEP_FN constexpr bool is_narrow(Format format) {
  return format == Format::bfloat16 || format == Format::float16;
}

// The formats that an operand may have in a recipe that goes through tiles. A rule's first moment
// has signs, its others have none.
WARPSTEP_FN constexpr bool may_have(std::uint32_t operand, Format format) {
  const bool is_plain = format == Format::float32 || is_narrow(format);
  const bool is_stochastic = format == Format::bfloat16_stochastic;
  if (operand == kParam) return is_plain || is_stochastic;
  if (operand == kGrad) return is_plain;
  if (format == Format::none) return true;
  if (operand == kResidual) return format == Format::int16;
  if (operand == kEma) return is_plain;
  if (operand == kCopy) return is_narrow(format);
  if (operand >= kScale && operand < kScaleEnd) return format == Format::uint8;
  const Format in_blocks = operand == kMoment ? Format::e4m3 : Format::ue5m3;
  return is_plain || is_stochastic || format == in_blocks;
}

// Whether a recipe goes through tiles, by a rule of so many moments.
inline bool goes_through_tiles(const RecipeKey& key, std::uint32_t moments) {
  bool takes = true;
  for (std::uint32_t k = 0; k < kOperands; ++k) takes = takes && may_have(k, key.formats[k]);
  if (key.formats[kResidual] != Format::none) {
    takes = takes && key.formats[kParam] == Format::bfloat16;
  }
  for (std::uint32_t i = 0; i < kMomentEnd - kMoment; ++i) {
    const Format moment = key.formats[kMoment + i], scale = key.formats[kScale + i];
    takes = takes && (moment != Format::none) == (i < moments) &&
            (scale != Format::none) == is_in_blocks(moment);
  }
  return takes;
}

template <class Visit, class... Rules>
bool visit_tiled(List<Rules...>, const RecipeKey& key, Visit&& visit) {
  const auto takes = [&](auto rule) {
    using Rule = decltype(rule);
    return key.rule == Rule::id && goes_through_tiles(key, Rule::kMoments);
  };
  return ((takes(Rules{}) && (visit(Rules{}), true)) || ...);
}

// Calls visit(Rule{}) for a recipe that goes through tiles; false for one that is built, or none.
template <class Visit>
bool visit_tiled(const RecipeKey& key, Visit&& visit) {
  return !visit_recipe(key, [](auto) {}) && visit_tiled(AllRules{}, key, visit);
}

}  // namespace
}  // namespace warpstep
