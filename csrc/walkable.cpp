// Which tensors kernels can walk: see walkable.h.
#include "walkable.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "names.h"
#include "tensor_reader.h"

namespace warpstep {

bool is_torchs_own(PyObject* object) {
  const py::handle type = py::type::handle_of(object);
  return type.is(torch_objects().tensor) || type.is(torch_objects().parameter);
}

bool is_lazy(PyObject* object, const TensorView& view, std::int64_t numel) {
  if (!view.is_complex && numel != 1) return false;
  const py::handle tensor(object);
  return tensor.attr("is_neg")().cast<bool>() || tensor.attr("is_conj")().cast<bool>();
}

bool is_dense(const TensorView& view) {
  std::int64_t expected = 1;
  std::int32_t i = view.ndim - 1;
  for (; i >= 0; --i) {
    if (view.shape[i] == 1) continue;
    if (view.strides[i] != expected) break;
    expected *= view.shape[i];
  }
  if (i < 0) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 0) return true;
    if (view.shape[i] != 1) dims.emplace_back(view.strides[i], view.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

py::object survey(py::handle param, const py::dict& state, const py::tuple& keys,
                  py::handle counter) {
  const TensorReader& reader = tensor_reader();
  TensorView own;
  const auto reads = [&](PyObject* object, TensorView& view) {
    return object != nullptr && is_torchs_own(object) && reader.read_in_place(object, view) &&
           view.known_format && (view.data != nullptr || view.numel() == 0);
  };
  if (keys.size() != kOperands || !reads(param.ptr(), own) || own.is_complex || !is_dense(own) ||
      is_lazy(param.ptr(), own, own.numel())) {
    return py::none();
  }
  Format formats[kOperands] = {own.format};
  if (!state.empty()) {
    for (std::uint32_t i = kMoment; i < kStable; ++i) {
      const py::handle key = PyTuple_GET_ITEM(keys.ptr(), i);
      if (key.is_none()) continue;
      PyObject* const tensor = PyDict_GetItem(state.ptr(), key.ptr());
      TensorView view;
      if (!reads(tensor, view) || view.is_complex || view.device != own.device ||
          !view.has_shape_and_strides_of(own) || is_lazy(tensor, view, view.numel())) {
        return py::none();
      }
      formats[i] = view.format;
    }
    TensorView step;
    if (!counter.is_none() && (!reads(PyDict_GetItem(state.ptr(), counter.ptr()), step) ||
                               step.format != Format::float32 || step.is_complex ||
                               step.numel() != 1 || step.device != own.device)) {
      return py::none();
    }
  }
  TensorView grad;
  switch (reader.read_grad_in_place(param.ptr(), grad)) {
    case TensorReader::Grad::none:
      formats[kGrad] = own.format;
      break;
    case TensorReader::Grad::readable:
      if (!grad.known_format || grad.is_complex || grad.device != own.device ||
          !grad.has_shape_and_strides_of(own) || (grad.data == nullptr && grad.numel() != 0) ||
          (grad.numel() == 1 && is_lazy(gradient_of(param.ptr()).ptr(), grad, 1))) {
        return py::none();
      }
      formats[kGrad] = grad.format;
      break;
    default:
      return py::none();
  }
  py::tuple found(static_cast<std::size_t>(kOperands));
  for (std::uint32_t i = 0; i < kOperands; ++i) found[i] = name_of(formats[i]);
  return found;
}

}  // namespace warpstep
