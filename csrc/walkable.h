// Which tensors kernels can walk as they lie in memory; and a parameter that is as it usually is.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_view.h"

namespace warpstep {

namespace py = pybind11;

// A torch.Tensor or Parameter, of no derived class.
bool is_torchs_own(PyObject* object);
// Lazily negated or conjugated: its memory holds other numbers. Strides betray such views of more
// than one real number; the others are asked.
bool is_lazy(PyObject* object, const TensorView& view, std::int64_t numel);
// Whether the elements fill a run of memory, in any order of dimensions, none twice.
bool is_dense(const TensorView& view);

// The names of the formats of a parameter's operands (None for what is not there), in the order of
// Operand, if kernels can take all as they are: none lazy, of a derived class, elsewhere, of
// another shape or freed. `keys` is what `state` calls them, `counter` its step counter or None; an
// empty state has none of them. Else None: then Python looks, and can tell what is wrong.
py::object survey(py::handle param, const py::dict& state, const py::tuple& keys,
                  py::handle counter);

}  // namespace warpstep
