// The recipes that kernels are built for: rules, and combinations of formats for their operands.
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

  // Averages can be of any format that there is: a kernel tells them apart at run time.
  static bool is_for(const RecipeKey& key) {
    constexpr Format moments[] = {MomentFormats::format..., Format::none, Format::none,
                                  Format::none};
    bool same = key.rule == Rule::id && key.formats[kParam] == Param::format &&
                key.formats[kGrad] == Grad::format;
    for (std::uint32_t i = kMoment; i < kMomentEnd; ++i) {
      same = same && key.formats[i] == moments[i - kMoment];
    }
    return same;
  }
};

template <class... Types>
struct List {};

// The parameter's format, the gradient's, and that of all moments. To add a combination, add a
// line.
template <class Param, class Grad, class Moment>
struct Formats {};
using AllFormats = List<Formats<float64, float64, float64>,     //
                        Formats<float32, float32, float32>,     //
                        Formats<bfloat16, bfloat16, bfloat16>,  //
                        Formats<float16, float16, float16>,     //
                        Formats<bfloat16, bfloat16, float32>,   //
                        Formats<float16, float16, float32>,     //
                        Formats<bfloat16, float32, bfloat16>,   //
                        Formats<bfloat16, float32, float32>,    //
                        Formats<float16, float32, float16>,     //
                        Formats<float16, float32, float32>,     //
                        Formats<float32, float32, bfloat16>>;
// To add a rule, add it here.
using AllRules = List<AdamW<false>, AdamW<true>, Sgd<false>, Sgd<true>>;

template <class Visit, class Rule, class Param, class Grad, class Moment, std::size_t... kMoments>
bool visit_recipe(Rule, Formats<Param, Grad, Moment>, std::index_sequence<kMoments...>,
                  const RecipeKey& key, Visit&& visit) {
  using Found = Recipe<Rule, Param, Grad, std::enable_if_t<kMoments + 1 != 0, Moment>...>;
  return Found::is_for(key) && (visit(Found{}), true);
}
template <class Visit, class Rule, class... AnyFormats>
bool visit_recipe(Rule rule, List<AnyFormats...>, const RecipeKey& key, Visit&& visit) {
  return (
      visit_recipe(rule, AnyFormats{}, std::make_index_sequence<Rule::kMoments>{}, key, visit) ||
      ...);
}
template <class Visit, class... Rules>
bool visit_recipe(List<Rules...>, const RecipeKey& key, Visit&& visit) {
  return (visit_recipe(Rules{}, AllFormats{}, key, visit) || ...);
}

// Calls visit(Recipe{}) for the recipe that a key names; false if none is built.
template <class Visit>
bool visit_recipe(const RecipeKey& key, Visit&& visit) {
  return visit_recipe(AllRules{}, key, visit);
}

}  // namespace
}  // namespace warpstep
