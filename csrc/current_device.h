// The device that is current for CUDA's runtime: the one that launches go to.
#pragma once

namespace warpstep {

// Makes a GPU the current one, and the previous one again at its end. For callers with the GIL,
// which is kept: no other thread of Python, and no Python, comes in between.
//
// By what torch.cuda.device calls: cudaSetDevice (as CUDA 12 documents it), going back, would make
// a context on the previous GPU, which the program may not use. torch keeps from that.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  static constexpr int kSame = -1;
  int previous_ = kSame;
};

}  // namespace warpstep
