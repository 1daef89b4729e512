// In the place of the CUDA kernels where there is no nvcc: says so, and launches nothing.
#include "launch.h"

namespace warpstep {

namespace {
constexpr int kNoKernels = 1;
}

const char* cuda_architectures() { return nullptr; }
const char* cuda_device_type() { return nullptr; }
const char* why_no_cuda() { return WARPSTEP_WHY_NO_CUDA; }
int cuda_device_count() { return 0; }
int cuda_current_device() { return 0; }
std::string cuda_device_reason(int) { return why_no_cuda(); }
bool cuda_is_capturing(void*) { return false; }
const char* cuda_error_text(int) { return "the native module was built without CUDA kernels"; }

CudaResult step_cuda(const Launch&, const CudaTables&, void*) { return {kNoKernels, 0}; }
CudaResult grad_norm_cuda(Norm, const Launch&, const CudaTables&, double*, void*) {
  return {kNoKernels, 0};
}
CudaResult least_magnitudes_cuda(const Launch&, const CudaTables&, void*) {
  return {kNoKernels, 0};
}

}  // namespace warpstep
