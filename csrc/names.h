// Formats, rules and recipes by the names that Python has for them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "layout.h"

namespace warpstep {

namespace py = pybind11;

// Throw ValueError for names that are not known.
Format format_named(const std::string& name);
py::object name_of(Format format);  // None for none
RuleId rule_named(const std::string& name);
// `formats` has the name of one for each operand, in the order of Operand, or None.
RecipeKey recipe_named(const std::string& rule, const py::tuple& formats);

}  // namespace warpstep
