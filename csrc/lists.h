// Lists of tensors stepped in one launch a recipe, without an optimizer or a plan: what
// warpstep.functional, torch.ops.warpstep and warpstep.enable() call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "device_tables.h"
#include "keeper.h"
#include "tables.h"
#include "tensor_reader.h"

namespace warpstep {

namespace py = pybind11;

// As aten::_fused_adamw_ takes them: one entry a tensor, max_exp_avg_sqs empty without amsgrad.
struct TensorLists {
  py::list params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps;
};

struct ListOptions {
  Hyper hyper;
  bool amsgrad;
  bool cuda;           // else the CPU's kernel
  bool advance_steps;  // else the caller has done it
  bool unscale_grads;  // write the gradients back, divided by grad_scale
  bool dispatched;     // through torch's dispatcher, which leaves no subclass and nothing lazy
  bool always;         // even where uploading tables costs more than the launch saves
  bool count_writes;   // increment the version counters of what is written
  int threads;
};

class ListStepper {
 public:
  // As ResidentTables.
  ListStepper(py::object upload, py::object use, std::size_t resident_bytes)
      : tables_(std::move(upload), std::move(use), resident_bytes) {}

  // Checks everything, then launches. Returns null, or why nothing was done.
  const char* step(const TensorLists& lists, py::handle lr, py::handle grad_scale,
                   py::handle found_inf, ListOptions options);

 private:
  const char* gather(const TensorLists& lists, const ListOptions& options,
                     std::vector<Bucket>& buckets) const;
  static void count_writes(const TensorLists& lists, const ListOptions& options, const Tail& tail);
  const char* launch_cuda(const TensorLists& lists, const std::vector<Bucket>& buckets,
                          const ListOptions& options, const Tail& tail);

  ResidentTables tables_;
};

}  // namespace warpstep
