// Declares the bindings of ListStepper, for bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace warpstep {

void bind_lists(pybind11::module_& m);

}  // namespace warpstep
