// Lists of tensors stepped in one launch a recipe, without an optimizer or a plan: what
// warpstep.functional, torch.ops.warpstep and warpstep.enable() call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

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
  // `upload(device, rows, chunks, arrivals)` puts bytes into a CUDA device's memory and returns
  // what keeps them alive and the three addresses; `use(tables)` is called when they are first
  // launched with on another stream. Tables of up to `resident_bytes` are kept on the devices.
  ListStepper(py::object upload, py::object use, std::size_t resident_bytes)
      : upload_(std::move(upload)), use_(std::move(use)), resident_bytes_(resident_bytes) {}

  // Checks everything, then launches. Returns null, or why nothing was done.
  const char* step(const TensorLists& lists, py::handle lr, py::handle grad_scale,
                   py::handle found_inf, ListOptions options);

 private:
  // Tensors of one recipe.
  struct Bucket {
    RecipeKey recipe;
    std::vector<TensorRow> rows;
    std::vector<void*> grads;
    std::vector<Chunk> chunks;
    std::uint32_t chunk_size = 0;
    std::vector<std::uint32_t> batches;
  };

  // Tables in a device's memory, and the rows that they were made from.
  struct Resident {
    dlpack::Device device;
    RecipeKey recipe;
    std::vector<TensorRow> rows;
    std::size_t bytes;
    py::object tables;
    std::uintptr_t rows_at, chunks_at, arrivals_at;
    void* stream;
    bool captured;  // graphs read the tables: they stay for good
    std::uint64_t used;
  };

  const char* gather(const TensorLists& lists, const ListOptions& options,
                     std::vector<Bucket>& buckets, dlpack::Device& device) const;
  std::shared_ptr<Resident> find(const Bucket& bucket, dlpack::Device device);
  std::shared_ptr<Resident> make_resident(const Bucket& bucket, dlpack::Device device);
  bool is_seen_again(const Bucket& bucket);
  static void count_writes(const TensorLists& lists, const ListOptions& options, const Tail& tail);
  const char* launch_cuda(const TensorLists& lists, std::vector<Bucket>& buckets,
                          const ListOptions& options, const Tail& tail, dlpack::Device device);

  py::object upload_, use_;
  std::size_t resident_bytes_;
  std::vector<std::shared_ptr<Resident>> residents_;
  std::uint64_t clock_ = 0;
  std::uint32_t misses_ = 0;  // since the last hit
  std::vector<TensorRow> missed_;
};

}  // namespace warpstep
