// Formats, rules and recipes by name: see names.h.
#include "names.h"

#include <vector>

#include "errors.h"

namespace warpstep {
namespace {

template <class Value, std::size_t kCount>
Value value_named(const std::pair<const char*, Value> (&values)[kCount], const std::string& name,
                  const char* kind) {
  for (const auto& [known, value] : values) {
    if (name == known) return value;
  }
  throw py::value_error(std::string("no such ") + kind + ": " + name);
}

}  // namespace

constexpr std::pair<const char*, Format> kFormats[] = {
    {"float64", Format::float64},
    {"float32", Format::float32},
    {"bfloat16", Format::bfloat16},
    {"float16", Format::float16},
    {"int16", Format::int16},
    {"uint8", Format::uint8},
    {"bfloat16_stochastic", Format::bfloat16_stochastic},
    {"e4m3", Format::e4m3},
    {"ue5m3", Format::ue5m3}};

Format format_named(const std::string& name) { return value_named(kFormats, name, "format"); }

py::object name_of(Format format) {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> all{Py_NewRef(Py_None)};  // in the order of Format, which begins so
    for (const auto& [name, _] : kFormats) all.push_back(interned(name));
    return all;
  }();
  return py::reinterpret_borrow<py::object>(names.at(static_cast<std::uint32_t>(format)));
}

RuleId rule_named(const std::string& name) {
  static constexpr std::pair<const char*, RuleId> kRules[] = {{"adamw", RuleId::adamw},
                                                              {"sgd", RuleId::sgd}};
  return value_named(kRules, name, "rule");
}

RecipeKey recipe_named(const std::string& rule, const py::tuple& formats) {
  if (formats.size() != kOperands) throw py::value_error("a format for each operand is needed");
  RecipeKey recipe{rule_named(rule), {}};
  for (std::uint32_t i = 0; i < kOperands; ++i) {
    const py::object name = formats[i];
    if (!name.is_none()) recipe.formats[i] = format_named(name.cast<std::string>());
  }
  return recipe;
}

}  // namespace warpstep
