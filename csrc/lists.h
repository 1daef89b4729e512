// Lists of tensors stepped in one launch a recipe, without an optimizer or a plan: what
// warpstep.functional, torch.ops.warpstep and warpstep.enable() call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "device_tables.h"
#include "keeper.h"
#include "layout.h"
#include "tensor_reader.h"

namespace warpstep {

namespace py = pybind11;

// One entry a tensor. `moments` are those that the rule has; `state_steps` is empty where steps are
// not counted.
struct TensorLists {
  py::list params, grads;
  std::vector<py::list> moments;
  py::list state_steps;
};

struct ListOptions {
  RuleId rule;
  Hyper hyper;
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
