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

  std::int64_t numel() const {  // real numbers
    std::int64_t count = is_complex ? 2 : 1;
    for (std::int32_t i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

}  // namespace warpstep
