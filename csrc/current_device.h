// The device that is current for CUDA's runtime: the one that launches go to.
#pragma once

#include <pybind11/pybind11.h>

namespace warpstep {

// Makes a GPU the current one, and the previous one again at its end. For callers with the GIL.
//
// By torch.cuda.device where it is another: to make one current again by CUDA's runtime would make
// a context on it, some hundred MB on a GPU that the program may not use. torch keeps from that.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  pybind11::object entered_;  // none where the GPU was the current one
};

}  // namespace warpstep
