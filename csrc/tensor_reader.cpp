// DLPack's C exchange API and Python attributes, for what torch's functions do not take.
#include "tensor_reader.h"

#include <stdexcept>

#include "errors.h"

namespace warpstep {

// DLPack 1.3's ABI (https://dmlc.github.io/dlpack), as far as it is used.
namespace dlpack {

enum TypeCode : std::uint8_t { integer = 0, natural = 1, real = 2, brain_float = 4, complex = 5 };

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  struct {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
  } dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous_api;
  void* allocate;
  void* managed_from_py_object;
  void* managed_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t index, void** stream);
};

}  // namespace dlpack

namespace {

std::optional<TensorReader> reader;
TorchObjects objects;

bool format_of(std::uint8_t code, int bits, Format& format) {
  if (code == dlpack::brain_float) {
    format = Format::bfloat16;
    return bits == 16;
  }
  if (code == dlpack::integer || code == dlpack::natural) {
    format = code == dlpack::integer ? Format::int16 : Format::uint8;
    return bits == (code == dlpack::integer ? 16 : 8);
  }
  format = bits == 64 ? Format::float64 : bits == 32 ? Format::float32 : Format::float16;
  return (code == dlpack::real || code == dlpack::complex) && bits >= 16 && bits <= 64;
}

std::size_t storage_bytes(PyObject* tensor) {
  try {
    return py::handle(tensor).attr("untyped_storage")().attr("nbytes")().cast<std::size_t>();
  } catch (const py::error_already_set& error) {
    if (!is_expected(error)) throw;
    return 0;  // it has none
  } catch (const py::cast_error&) {
    return 0;
  }
}

}  // namespace

TensorReader::TensorReader(PyObject* capsule, std::optional<TorchHandles> handles)
    : handles_(handles) {
  api_ =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api_ == nullptr) {
    PyErr_Clear();
    throw std::runtime_error(
        "this torch's __dlpack_c_exchange_api__ is not what DLPack defines: update warpstep");
  }
  if (api_->version.major != 1 || api_->tensor_from_py_object == nullptr) {
    throw std::runtime_error(
        "this torch's DLPack exchange API is not of version 1: update warpstep");
  }
}

bool TensorReader::read_exchanged(PyObject* object, TensorView& view) const {
  dlpack::Tensor tensor;
  if (api_->tensor_from_py_object(object, &tensor) != 0) {
    clear_expected_error();
    return false;
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.device = tensor.device;
  view.is_complex = tensor.dtype.code == dlpack::complex;
  view.known_format =
      format_of(tensor.dtype.code, tensor.dtype.bits / (view.is_complex ? 2 : 1), view.format);
  view.ndim = tensor.ndim;
  view.shape = tensor.shape;
  view.strides = tensor.strides;
  // What is freed has its offset for an address.
  if (is_low(view.data) && storage_bytes(object) == 0) view.data = nullptr;
  return true;
}

TensorReader::Grad TensorReader::read_python_grad(PyObject* param, TensorView& view,
                                                  py::object& held) const {
  held = gradient_of(param);
  if (held.is_none()) return Grad::none;
  return read_exchanged(held.ptr(), view) ? Grad::readable : Grad::unreadable;
}

bool TensorReader::is_grad(PyObject* grad, PyObject* param) const {
  const TorchHandles::Handle handle = handle_of(param), expected = handle_of(grad);
  if (handle == nullptr || expected == nullptr) return gradient_of(param).ptr() == grad;
  const TorchHandles::Handle found = handles_->grad_of(handle);
  return found != nullptr && *found == *expected;
}

std::int64_t TensorReader::version_of(PyObject* tensor) const {
  try {
    if (const TorchHandles::Handle handle = handle_of(tensor)) return handles_->version_of(handle);
    return py::handle(tensor).attr("_version").cast<std::int64_t>();
  } catch (const py::error_already_set& error) {
    if (!is_expected(error)) throw;  // no version, where a residual may hang on it
    return 0;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception&) {  // an inference tensor has no counter
    return 0;
  }
}

void TensorReader::increment_version(PyObject* tensor) const {
  if (const TorchHandles::Handle handle = handle_of(tensor)) {
    try {
      return handles_->bump_version(handle);
    } catch (const std::exception&) {  // an inference tensor has no counter, which is no error
    }
  }
  objects.increment_version(py::handle(tensor));
}

void TensorReader::increment_grad_version(PyObject* param) const {
  const TorchHandles::Handle handle = handle_of(param);
  const TorchHandles::Handle grad = handle != nullptr ? handles_->grad_of(handle) : nullptr;
  if (grad == nullptr) return increment_version(gradient_of(param).ptr());
  try {
    handles_->bump_version(grad);
  } catch (const std::exception&) {  // an inference tensor has no counter, which is no error
  }
}

void* TensorReader::current_stream(dlpack::Device device) const {
  void* stream = nullptr;
  if (device.type != dlpack::cpu &&
      api_->current_work_stream(device.type, device.index, &stream) != 0) {
    PyErr_Clear();
    throw std::runtime_error("torch gave no current stream for the device");
  }
  return stream;
}

py::object gradient_of(PyObject* param) {
  static PyObject* const name = interned("grad");
  PyObject* const grad = PyObject_GetAttr(param, name);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

py::object gradient_named(PyObject* name, PyObject* param) {
  PyObject* const grad = PyObject_GetAttr(param, name);
  if (grad != nullptr) return py::reinterpret_steal<py::object>(grad);
  if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw py::error_already_set();
  PyErr_Clear();
  return py::none();
}

const TorchObjects& torch_objects() { return objects; }

void set_tensor_reader(TensorReader value) {
  const auto found = [](const char* module, const char* name) {
    return py::object(py::module_::import(module).attr(name)).release();
  };
  objects = {found("torch", "_C"), found("torch", "Tensor"), found("torch.nn", "Parameter"),
             found("torch.autograd.graph", "increment_version")};
  reader = value;
}

const TensorReader& tensor_reader() {
  if (!reader) throw std::logic_error("connect_to_torch() has not been called");
  return *reader;
}

}  // namespace warpstep
