// Making a device the current one: see current_device.h.
#include "current_device.h"

#include <pybind11/pybind11.h>

#include "cuda/launch.h"
#include "tensor_reader.h"

namespace py = pybind11;

namespace warpstep {
namespace {

// Calls one of torch's functions that take a GPU and return which was the current one.
int call_torchs(const char* name, int index) {
  return torch_objects().c.attr(name)(index).cast<int>();
}

}  // namespace

OnDevice::OnDevice(int index) {
  if (cuda_current_device() != index) previous_ = call_torchs("_cuda_exchangeDevice", index);
}

OnDevice::~OnDevice() {
  if (previous_ == kSame) return;
  const py::error_scope kept;  // what Python knows of an error that ends the scope
  try {
    call_torchs("_cuda_maybeExchangeDevice", previous_);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("warpstep: making the previous GPU the current one again");
  }
}

}  // namespace warpstep
