// A torch tensor seen through DLPack's C exchange API: no torch header, no torch library.
//
// The structures restate DLPack 1.3's ABI (https://dmlc.github.io/dlpack), as far as it is used.
#pragma once

#include <Python.h>

#include <cstdint>
#include <stdexcept>

#include "tables.h"

namespace warpstep {

namespace dlpack {

enum DeviceType : std::int32_t { cpu = 1, cuda = 2, rocm = 10 };
enum TypeCode : std::uint8_t { real = 2, brain_float = 4, complex = 5 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

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

// What a tensor is at this moment. Shape and strides belong to the tensor.
struct TensorView {
  void* data;
  dlpack::Device device;
  bool known_format;  // else `format` means nothing
  Format format;      // of the real numbers, for a complex tensor
  bool is_complex;
  std::int32_t ndim;
  const std::int64_t* shape;
  const std::int64_t* strides;

  std::int64_t numel() const {  // real numbers
    std::int64_t count = is_complex ? 2 : 1;
    for (std::int32_t i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

class TensorReader {
 public:
  // From the capsule torch.Tensor.__dlpack_c_exchange_api__.
  explicit TensorReader(PyObject* capsule) {
    api_ = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (api_ == nullptr) {
      PyErr_Clear();
      throw std::runtime_error(
          "torch.Tensor.__dlpack_c_exchange_api__ is not the capsule expected");
    }
    if (api_->version.major != 1 || api_->tensor_from_py_object == nullptr) {
      throw std::runtime_error("this torch's DLPack exchange API is not of version 1");
    }
  }

  // False where the object is no tensor with plain memory (sparse, meta, some subclasses).
  bool read(PyObject* object, TensorView& view) const {
    dlpack::Tensor tensor;
    if (api_->tensor_from_py_object(object, &tensor) != 0) {
      PyErr_Clear();
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
    return true;
  }

  // The stream that torch would launch on now.
  void* current_stream(dlpack::Device device) const {
    void* stream = nullptr;
    if (device.type != dlpack::cpu &&
        api_->current_work_stream(device.type, device.index, &stream) != 0) {
      PyErr_Clear();
      throw std::runtime_error("torch gave no current stream for the device");
    }
    return stream;
  }

 private:
  static bool format_of(std::uint8_t code, int bits, Format& format) {
    if (code == dlpack::brain_float) {
      format = Format::bfloat16;
      return bits == 16;
    }
    format = bits == 64 ? Format::float64 : bits == 32 ? Format::float32 : Format::float16;
    return (code == dlpack::real || code == dlpack::complex) && bits >= 16 && bits <= 64;
  }

  const dlpack::ExchangeApi* api_;
};

}  // namespace warpstep
