// How tensors are looked at: through torch's own functions where that can be done
// (torch_handles.h), else through DLPack's C exchange API and Python. No torch header, no torch
// library.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "tensor_view.h"
#include "torch_handles.h"

namespace warpstep {

namespace py = pybind11;

namespace dlpack {

struct ExchangeApi;

}  // namespace dlpack

// Brings a Python object's first words, which may lie in two cache lines, into the caches.
inline void fetch_object(const PyObject* object) {
  __builtin_prefetch(object);
  __builtin_prefetch(reinterpret_cast<const char*>(object) + 40);
}

class TensorReader {
 public:
  // From the capsule torch.Tensor.__dlpack_c_exchange_api__. Without `handles`, all is read through
  // it and Python.
  TensorReader(PyObject* capsule, std::optional<TorchHandles> handles);

  bool uses_handles() const { return handles_.has_value(); }

  // False where the object is no tensor with plain memory (sparse, meta, some subclasses).
  bool read(PyObject* tensor, TensorView& view) const {
    return read_in_place(tensor, view) || read_exchanged(tensor, view);
  }

  // A parameter's gradient. Where Python is asked for it, `held` is what it gives, which the view
  // needs alive: a property may make a new tensor each time.
  enum class Grad { none, readable, unreadable };
  Grad read_grad(PyObject* param, TensorView& view, py::object& held) const {
    const Grad grad = read_grad_in_place(param, view);
    return grad == Grad::unreadable ? read_python_grad(param, view, held) : grad;
  }

  // The same without Python, and so on any thread while one holds the GIL. Unreadable is also what
  // can be read with Python only.
  bool read_in_place(PyObject* tensor, TensorView& view) const {
    const TorchHandles::Handle handle = handle_of(tensor);
    return handle != nullptr && handles_->read(handle, view);
  }
  Grad read_grad_in_place(PyObject* param, TensorView& view) const {
    const TorchHandles::Handle handle = handle_of(param);
    if (handle == nullptr) return Grad::unreadable;
    const TorchHandles::Handle grad = handles_->grad_of(handle);
    if (grad == nullptr) return Grad::none;
    return handles_->read(grad, view) ? Grad::readable : Grad::unreadable;
  }
  bool is_grad(PyObject* grad, PyObject* param) const;

  // Where the elements begin; null where that cannot be told.
  const void* address_of(PyObject* tensor) const {
    if (const TorchHandles::Handle handle = handle_of(tensor)) return handles_->address_of(handle);
    TensorView view;
    return read_exchanged(tensor, view) ? view.data : nullptr;
  }

  // A handle that keeps a gradient alive that is read in place, until it is dropped; null for
  // others.
  TorchHandles::Handle keep_grad(PyObject* param) const {
    const TorchHandles::Handle handle = handle_of(param);
    const TorchHandles::Handle grad = handle != nullptr ? handles_->grad_of(handle) : nullptr;
    return grad != nullptr ? handles_->keep(grad) : nullptr;
  }
  void drop(TorchHandles::Handle kept) const { handles_->drop(kept); }

  // Counts the writes to a tensor's memory.
  std::int64_t version_of(PyObject* tensor) const;
  void increment_version(PyObject* tensor) const;
  void increment_grad_version(PyObject* param) const;

  // Called for tensors that will be read soon, these bring into the caches what will be looked at:
  // first the object, a while later what it points to, and so on. Hints only.
  static constexpr int kFetchStages = 5;
  void fetch(int stage, PyObject* tensor, bool with_grad) const {
    if (stage == 0) return fetch_object(tensor);
    const TorchHandles::Handle handle = handle_of(tensor);
    if (handle == nullptr) return;
    if (stage == 1) return handles_->fetch(handle);
    if (stage == 2) return handles_->fetch_parts(handle, !with_grad);
    const TorchHandles::Handle grad = with_grad ? handles_->grad_of(handle) : nullptr;
    if (grad == nullptr) return;
    if (stage == 3) return handles_->fetch(grad);
    handles_->fetch_parts(grad, true);
  }

  // The stream that torch would launch on now.
  void* current_stream(dlpack::Device device) const;

 private:
  TorchHandles::Handle handle_of(PyObject* tensor) const {
    return handles_ ? handles_->of(tensor) : nullptr;
  }
  bool read_exchanged(PyObject* tensor, TensorView& view) const;
  Grad read_python_grad(PyObject* param, TensorView& view, py::object& held) const;

  const dlpack::ExchangeApi* api_;
  std::optional<TorchHandles> handles_;
};

// `tensor.grad`, as Python has it.
py::object gradient_of(PyObject* param);
// What a parameter has for a gradient under another name; None where it has no such attribute.
py::object gradient_named(PyObject* name, PyObject* param);

// What steps call of torch's Python, found when the module is connected: an import in the middle of
// a step may run Python, which lets another thread go on.
struct TorchObjects {
  py::handle c, tensor, parameter, increment_version;  // torch._C, torch.Tensor, ...; never freed
};
const TorchObjects& torch_objects();

// Set once, from torch, before any plan is made.
void set_tensor_reader(TensorReader reader);
const TensorReader& tensor_reader();

}  // namespace warpstep
