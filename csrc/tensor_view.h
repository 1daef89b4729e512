// What a torch tensor is at one moment, as far as the kernels' tables need it.
#pragma once

#include <cstdint>

#include "layout.h"

namespace warpstep {

namespace dlpack {

enum DeviceType : std::int32_t { cpu = 1, cuda = 2, rocm = 10 };

struct Device {
  std::int32_t type;
  std::int32_t index;

  bool operator==(Device other) const { return type == other.type && index == other.index; }
  bool operator!=(Device other) const { return !(*this == other); }
};

}  // namespace dlpack

// Whether an address may be a mere offset into a storage that was freed: then the storage is asked.
inline bool is_low(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) < std::uintptr_t{1} << 40;
}

// Shape and strides belong to the tensor.
struct TensorView {
  void* data;
  dlpack::Device device;
  bool known_format;  // else `format` means nothing
  Format format;      // of the real numbers, for a complex tensor
  bool is_complex;
  std::int32_t ndim;
  const std::int64_t* shape;
  const std::int64_t* strides;

  bool has_shape(const std::int64_t* sizes) const {  // so many as it has dimensions
    for (std::int32_t i = 0; i < ndim; ++i) {        // a few numbers: no call is worth it
      if (shape[i] != sizes[i]) return false;
    }
    return true;
  }
  // Whether these strides are its own; unless `exact`, as far as elements lie by them.
  bool has_strides(const std::int64_t* others, bool exact = false) const {
    for (std::int32_t i = 0; i < ndim; ++i) {
      if (strides[i] != others[i] && (shape[i] != 1 || exact)) return !exact && numel() == 0;
    }
    return true;
  }
  bool has_shape_and_strides_of(const TensorView& other) const {
    return ndim == other.ndim && has_shape(other.shape) && has_strides(other.strides);
  }
  // Whether the elements are a run of memory, in the order of their indices.
  bool is_contiguous() const {
    std::int64_t stride = 1;
    for (std::int32_t i = ndim - 1; i >= 0; --i) {
      if (strides[i] != stride && shape[i] != 1) return numel() == 0;
      stride *= shape[i];
    }
    return true;
  }

  std::int64_t numel() const {  // real numbers
    std::int64_t count = is_complex ? 2 : 1;
    for (std::int32_t i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

}  // namespace warpstep
