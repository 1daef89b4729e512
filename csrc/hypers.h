// Hyper-parameters: a parameter group's dict, read into what kernels take. The one place in C++
// that knows their names.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "layout.h"
#include "tensor_view.h"

namespace warpstep {

namespace py = pybind11;

// What an optimizer's rule has in its groups (python/warpstep/rules/rule.py).
struct GroupKeys {
  // In the order of Hyper::numbers: a key, and which number of a pair it is, or -1.
  std::vector<std::pair<py::str, int>> numbers;
  // Keys whose truth decides which operands there are, and keys whose values a plan is made for.
  std::vector<py::str> switches, flags;
  py::object decoupled;  // the key of torch's flag for decoupled decay, or None
};

// A hyper-parameter that is a tensor on an accelerator: read, or pointed to, for each bucket.
struct TensorNumber {
  std::uint32_t group;
  std::uint32_t number;  // of Hyper::numbers
  py::object tensor;
};

// Has `hyper` read a number where a tensor has it, if kernels on `device` can; or returns false.
bool point_to(Hyper& hyper, std::uint32_t number, const TensorView& view, dlpack::Device device);
// The same, or else puts the tensor's value there.
void set_number(Hyper& hyper, const TensorNumber& number, dlpack::Device device);

// One parameter group, as a plan has bound it.
class BoundGroup {
 public:
  BoundGroup(const py::dict& group, const GroupKeys& keys);

  PyObject* params() const { return params_; }  // a list or tuple
  std::size_t count() const { return count_; }  // its length

  // Whether `group` has the list of parameters that was bound.
  bool has_params(PyObject* group) const;
  // Reads `group`, the number `index`, where its items are not those of the last time. Returns
  // null, or why the plan is stale. What is invalid makes it stale, too: making the next one says
  // what is wrong with it.
  const char* read(PyObject* group, std::uint32_t index, const GroupKeys& keys, Hyper& hyper,
                   std::vector<TensorNumber>& tensors);

  int traverse(visitproc visit, void* arg) const;

 private:
  bool has_same_items(PyObject* group) const;
  void remember_items(PyObject* group);

  PyObject* params_;
  std::size_t count_;
  std::vector<bool> switches_;
  bool has_ema_;
  bool is_min_;  // whether its decay is Decay::min, for which a bucket has a table
  std::vector<py::object> flags_;
  // The group's items when it was last read: while the same objects are there, so are their values.
  std::vector<PyObject*> items_;
  std::vector<py::object> kept_;  // keeps those alive that were read
};

}  // namespace warpstep
