// Sharded tensors (torch.distributed's DTensor): each process steps the shard that it has.
#pragma once

#include <pybind11/pybind11.h>

namespace warpstep {

namespace py = pybind11;

// How a sharded tensor is laid out over processes; null for other tensors.
struct ShardLayout {
  py::object mesh, placements;

  explicit operator bool() const { return static_cast<bool>(mesh); }
};

ShardLayout layout_of(PyObject* tensor);

// The shard of a tensor that is laid out like this, null if it is not; without a layout the tensor
// itself. Lives as long as the tensor does.
PyObject* own_part_of(PyObject* tensor, const ShardLayout& layout);

}  // namespace warpstep
