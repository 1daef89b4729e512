// Lists of tensors stepped in one launch a recipe, without an optimizer or a plan: what
// warpstep.functional, torch.ops.warpstep and warpstep.enable() call.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <vector>

#include "device_tables.h"
#include "keeper.h"
#include "layout.h"
#include "tensor_reader.h"

namespace warpstep {

namespace py = pybind11;

// Python lists with one entry a tensor, which the caller keeps alive.
struct TensorLists {
  std::array<PyObject*, kOperands> of{};  // by operand; null where there is none
  PyObject* state_steps;                  // empty where steps are not counted
};

struct ListOptions {
  RuleId rule;
  Hyper hyper;
  bool cuda;                                   // else the CPU's kernel
  bool advance_steps;                          // else the caller has done it
  bool unscale_grads;                          // write the gradients back, divided by grad_scale
  bool stochastic_params, stochastic_squares;  // in bfloat16: rounded at random
  std::uint64_t seed;                          // of random bits
  // Of each tensor: its parameter's number, and where in that it begins. Empty: 0, 1, ...; and 0.
  std::vector<std::uint32_t> param_indices;
  std::vector<std::int64_t> first_elements;
  bool dispatched;    // through torch's dispatcher, which leaves no subclass and nothing lazy
  bool always;        // even where uploading tables costs more than the launch saves
  bool count_writes;  // increment the version counters of what is written
  int threads;
};

class ListStepper {
 public:
  // As ResidentTables.
  ListStepper(py::object upload, py::object use, std::size_t resident_bytes)
      : tables_(std::move(upload), std::move(use), resident_bytes) {}

  // Checks everything, then launches. Returns null, or why nothing was done.
  const char* step(const TensorLists& lists, py::handle lr, py::handle grad_scale,
                   py::handle found_inf, ListOptions& options);

 private:
  static void count_writes(const TensorLists& lists, const ListOptions& options, const Tail& tail);
  const char* launch_cuda(const TensorLists& lists, const std::vector<Bucket>& buckets,
                          const ListOptions& options, const Tail& tail);

  ResidentTables tables_;
};

}  // namespace warpstep
