// Making a device the current one: see current_device.h.
#include "current_device.h"

#include "cuda/launch.h"

namespace py = pybind11;

namespace warpstep {

OnDevice::OnDevice(int index) {
  if (cuda_current_device() == index) return;
  py::object device = py::module_::import("torch").attr("cuda").attr("device")(index);
  device.attr("__enter__")();
  entered_ = std::move(device);
}

OnDevice::~OnDevice() {
  if (!entered_) return;
  const py::error_scope kept;  // of what ends the scope, if anything is raised
  try {
    entered_.attr("__exit__")(py::none(), py::none(), py::none());
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("warpstep: making the previous GPU the current one again");
  }
}

}  // namespace warpstep
