// Python's view of a DTensor: its spec, and the shard that it wraps.
#include "shards.h"

#include "errors.h"

namespace warpstep {
namespace {

struct ShardNames {
  PyObject* spec = interned("_spec");
  PyObject* mesh = interned("mesh");
  PyObject* placements = interned("placements");
  PyObject* local_tensor = interned("_local_tensor");
};
const ShardNames& shard_names() {
  static const ShardNames all;
  return all;
}

// Null where there is no such attribute, or `object` is null.
py::object attribute(PyObject* object, PyObject* name) {
  if (object == nullptr) return {};
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) clear_expected_error();
  return py::reinterpret_steal<py::object>(value);
}

// torch.distributed's class, once someone has imported it; null before: there is no DTensor then.
PyTypeObject* dtensor_type() {
  static PyTypeObject* type = nullptr;  // kept for good, as Python keeps the module
  if (type != nullptr) return type;
  static PyObject* const name = interned("torch.distributed.tensor");
  static PyObject* const of_class = interned("DTensor");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name));
  if (!module) clear_expected_error();
  py::object found = attribute(module.ptr(), of_class);
  if (found && PyType_Check(found.ptr())) {
    type = reinterpret_cast<PyTypeObject*>(found.release().ptr());
  }
  return type;
}

bool equal(const py::object& a, const py::object& b) {
  const int result = a && b ? PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ) : 0;
  if (result < 0) clear_expected_error();
  return result > 0;
}

}  // namespace

ShardLayout layout_of(PyObject* tensor) {
  PyTypeObject* const type = dtensor_type();
  if (type == nullptr || tensor == nullptr || !PyType_IsSubtype(Py_TYPE(tensor), type)) return {};
  const py::object spec = attribute(tensor, shard_names().spec);
  ShardLayout layout{attribute(spec.ptr(), shard_names().mesh),
                     attribute(spec.ptr(), shard_names().placements)};
  return layout.mesh && layout.placements ? layout : ShardLayout{};
}

PyObject* own_part_of(PyObject* tensor, const ShardLayout& layout) {
  if (!layout) return tensor;
  const ShardLayout found = layout_of(tensor);
  if (!equal(found.placements, layout.placements) || !equal(found.mesh, layout.mesh)) {
    return nullptr;
  }
  return attribute(tensor, shard_names().local_tensor).ptr();
}

}  // namespace warpstep
