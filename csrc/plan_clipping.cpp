// Gradients that a clipping has measured: remembered, and compared with what is there. See plan.h.
#include <utility>

#include "plan.h"

namespace warpstep {

const char* Plan::gather_grads(py::handle param_groups, int threads) {
  keeper_.clear();
  gathered_.clear();
  if (const char* why = check_groups(param_groups.ptr(), Scope::grads)) return why;
  if (const char* why = check_tensors(Scope::grads, checking_threads(threads))) return why;
  // Owned from here on: another thread may replace them while their norm is taken.
  for (const BoundParam& bound : params_) {
    if (!has_grad(bound)) continue;
    py::object grad = grad_of(bound);
    const std::int64_t version = tensor_reader().version_of(grad.ptr());
    const void* const address = address_of_grad(grad.ptr(), bound);
    gathered_.push_back({py::reinterpret_borrow<py::object>(bound.param), std::move(grad), &bound,
                         version, address});
  }
  return nullptr;
}

std::size_t Plan::remember_grads() {
  remembered_ = std::exchange(gathered_, {});
  return remembered_.size();
}

void Plan::forget_grads() {
  remembered_.clear();
  gathered_.clear();
  keeper_.clear();
  let_go_of_grads();
}

Plan::Unchanged Plan::compare_grads() const {
  Unchanged found{0, 0};
  const TensorReader& reader = tensor_reader();
  for (const RememberedGrad& remembered : remembered_) {
    PyObject* const grad = remembered.grad.ptr();
    if (!is_grad(grad, remembered.param.ptr())) continue;
    ++found.kept;
    found.unwritten += reader.version_of(grad) == remembered.version &&
                       address_of_grad(grad, *remembered.bound) == remembered.address;
  }
  return found;
}

bool Plan::is_grad(PyObject* grad, PyObject* param) const {
  if (grad_name_.is_none()) return tensor_reader().is_grad(grad, param);
  return gradient_named(grad_name_.ptr(), param).ptr() == grad;
}

const void* Plan::address_of_grad(PyObject* grad, const BoundParam& bound) {
  PyObject* const own = own_part_of(grad, bound.layout);
  return own == nullptr ? nullptr : tensor_reader().address_of(own);
}

}  // namespace warpstep
