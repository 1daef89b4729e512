// A plan: every tensor of an optimizer bound and checked once, compared with what is there at each
// step, and launched. See docs/design.md, NOTE [what the check compares].
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "device_tables.h"
#include "hypers.h"
#include "keeper.h"
#include "shards.h"
#include "tensor_reader.h"

namespace warpstep {

namespace py = pybind11;

// Who runs a bucket. `external` ones are checked here and launched by Python (Triton).
enum class Backend { cpu, cuda, external };

// Where a parameter goes; non-negative numbers are buckets.
enum Assignment : int {
  no_state = -1,     // has had no gradient yet: the plan is stale once it has one
  python_only = -2,  // the reference backend's: Python looks after it
};

struct BucketSpec {
  Backend backend;
  RecipeKey recipe;
  // What a parameter's state calls its operands; None for what is not there or not in the state.
  std::vector<py::object> keys;
  py::object counter;  // and its step counter; or None
};

// What a plan is made with beside tensors and groups.
struct PlanOptions {
  std::uint64_t seed = 0;  // of random bits
  py::dict firsts;    // of shards, by parameter: where its first element is in the whole tensor
  py::dict copies;    // by parameter: what gets its value after each step
  py::dict counters;  // by parameter: step counters that are in no state
  // What parameters call their gradients: None for torch's own, else an attribute in Python.
  py::object grad_name = py::none();
  // Whether a write to a parameter with a residual makes the plan stale.
  bool watches_masters = true;
  // As torch's fused optimizers have it: the writes to step counters are counted, and no others;
  // where a step is skipped, gradients are left as they are.
  bool as_fused = false;
};

// The tail's share that is the same for all buckets of a step. `zero_grads` goes first.
struct StepTail {
  bool zero_grads = false;
  bool unscale_grads = false;  // and leave them clipped; where none is shared or copied
  // How many gradients there must be, where their norm was taken before; else -1.
  std::ptrdiff_t expected_grads = -1;
};

// NOTE [what is kept alive]
// A plan keeps neither parameters nor state alive: what a program lets go of is freed at once, and
// what is at its address then is compared like everything else. Gradients are known by address,
// good until Python runs: `step` checks and launches with none of it between, holding the GIL.
// Where it lets go of the GIL (a launch that takes long), or Python runs between `check` and
// `launch`, `keeper_` owns what was found until the launch has ended. So do `held_grads` (of which
// Python was asked, or that were read through it), `named_grads_`, `copied_grads` (laid out as
// their parameters) and `copied_from` (what they are copies of). Copies of low precision and
// counters that are in no state are the caller's, and owned for good (`kept_`). `gathered_` are
// gradients whose norm is being taken, `remembered_` those that a clipping has measured: the
// gradients themselves, until a step has used it or forget_grads() is called.
class Plan {
 public:
  // `state` and `param_groups` are the optimizer's own, `keys` those of its rule; `assignments` has
  // one entry a parameter, in their order. `match_layout(param, grad)` copies a gradient to its
  // parameter's strides.
  Plan(py::dict state, py::list param_groups, GroupKeys keys, const std::vector<int>& assignments,
       const std::vector<BucketSpec>& buckets, py::object match_layout, const PlanOptions& options);

  // Takes the step of the C++ backends' buckets: check, then launch. Returns null, or why nothing
  // was done. No signal handler and no other Python thread comes between.
  const char* step(py::handle state, py::handle param_groups, int threads, py::object tensors,
                   const StepTail& tail);

  // Compares everything with what was bound and gathers gradients and hyper-parameters. Returns
  // null, or why the plan is stale. Writes no tensor. Up to `threads` threads look.
  const char* check(py::handle state, py::handle param_groups, int threads);
  // Parameters of the groups that have a residual and were written to since the last step: the
  // residual is another value's.
  py::list written_params(py::handle param_groups);
  // They are as they should be: what was written is not to be noticed.
  void note_versions(py::handle param_groups);
  // Owns what a check has found until the next launch, for callers that run Python in between.
  void keep_alive() { keep_seen_alive(Scope::everything); }
  void let_go();

  // Gathers gradients only, for their norm, as they are: each object (which lives until
  // forget_grads), its version counter and its address. Returns as `check` does.
  const char* gather_grads(py::handle param_groups, int threads);
  // Remembers the gradients gathered last in place of those remembered before; how many.
  std::size_t remember_grads();
  // Of the gradients remembered, how many are still the parameters' gradients, and how many of
  // those were not written to.
  struct Unchanged {
    std::size_t kept, unwritten;
  };
  Unchanged compare_grads() const;
  void forget_grads();
  // How many gradients were gathered last.
  std::size_t count_grads() const;
  // Whether gradients share memory, so that one must not be zeroed before the other is read.
  bool has_shared_grads() const;
  // Gradients that had to be laid out as their parameters, each with what a launch sees of it (its
  // own memory, where that was laid out so already).
  py::list copied_grads() const;

  // Runs the buckets of the C++ backends, after a successful check. `tensors` has an entry
  // (grad_scale, found_inf, clip_coef, statistics) a bucket, each None or a tensor on its device,
  // the first two float32, the others float64; or is None. Version counters of what is written are
  // incremented first, for external buckets too.
  void launch(int threads, py::object tensors, const StepTail& tail);

  // Writes the norm of a bucket's gradients to `out`, float64[2 + chunks] on its device: the sum of
  // squares or the largest magnitude comes first, and the rest is scratch (zeros on entry).
  void grad_norm(std::size_t bucket, Norm kind, int threads, py::handle out);
  std::size_t chunk_count(std::size_t bucket) const { return buckets_.at(bucket).chunks.size(); }
  std::vector<std::uint32_t> chunk_counts(std::size_t bucket) const;

  // For the backends that keep tables in device memory: the bytes of a bucket's tables, and where
  // Python has put them.
  py::dict host_tables(std::size_t bucket) const;
  void set_device_tables(std::size_t bucket, const CudaTables& tables);
  // Where Launch::least of a bucket is: float64[tensors + chunks]. `shared`: the tensors are parts,
  // and Python has each least magnitude found (below) and made that of the whole before a launch.
  void set_least(std::size_t bucket, std::uintptr_t least, bool shared);
  void find_least(std::size_t bucket, int threads);
  // For external buckets: what changed with this step.
  py::bytes grad_table(std::size_t bucket) const;
  py::bytes hyper_table(std::size_t bucket);

  // For Python's garbage collector: everything that a plan owns; and letting go of it for good.
  int traverse(visitproc visit, void* argument) const;
  void clear();

 private:
  struct PlanBucket : Bucket {
    Backend backend{};
    std::vector<py::object> held_grads;  // that Python was asked for, alive until they are used
    // Of match_layout, alive until they are used; and what they were copied from.
    std::vector<py::object> copied_grads, copied_from;
    std::vector<std::uint32_t> groups;  // the optimizer's that it has rows of: theirs index this
    std::vector<Hyper> hypers;          // of this step, one for each of them
    CudaTables tables{};
    bool is_least_shared = false;  // see set_least
  };

  struct BoundParam {
    PyObject* param = nullptr;  // alive once check_groups() has found it in its place
    int assignment = no_state;
    std::uint32_t row = 0;
    bool is_complex = false;
    std::int32_t ndim = 0;
    std::size_t dims = 0;  // where in dims_ its shape and then its strides are
    // Of the state; null for what is not there. Alive while check_state() finds them in their
    // place. operands[kParam] is null, unless the rule steps a master of another dtype that is in
    // the state: then it is that master, and the parameter is its copy.
    PyObject* operands[kStable] = {};
    PyObject* counter = nullptr;
    std::int64_t version = 0;  // of one with a residual: after the last step
    ShardLayout layout;        // its gradient and state have the same; not its step
    std::uint64_t seen = 0;    // the number of the last look in place that found it as bound

    // What the rule works on.
    PyObject* stepped() const { return operands[kParam] != nullptr ? operands[kParam] : param; }
  };

  // One entry of the optimizer's state.
  struct BoundState {
    PyObject* param;            // alive once it is found among the state's keys
    std::size_t first, count;   // its items, in bound_items_
    PyObject* found = nullptr;  // what holds them: of the last check
  };

  void bind_param(py::handle state, const BucketSpec& spec, BoundParam& bound, TensorRow row,
                  const PlanOptions& options);
  // What is compared, and how: in place is without Python, as other threads can (TensorReader).
  enum class Scope { everything, grads };
  enum class Look { in_place, thorough };
  int checking_threads(int threads) const;
  const char* check_state(PyObject* state, int threads);
  bool holds_bound_items(const BoundState& bound) const;
  // What is not in scope was not compared, and may be gone.
  void keep_seen_alive(Scope scope);
  void let_go_of_grads();
  const char* check_groups(PyObject* param_groups, Scope scope);
  const char* check_group(PyObject* group, std::uint32_t index, Scope scope, std::size_t& next);
  const char* check_tensors(Scope scope, int threads);
  void ask_for_grads();
  py::object grad_of(const BoundParam& bound) const;
  TensorReader::Grad read_grad(const BoundParam& bound, Look look, TensorView& view,
                               py::object& held) const;
  const char* look_at(const BoundParam& bound, Scope scope, Look look);
  const char* check_param(const BoundParam& bound, Look look) const;
  const char* gather_grad(const BoundParam& bound, Look look);
  template <class Visit>
  void visit_with_residual(py::handle param_groups, Visit&& visit);
  TensorReader::Grad read_shard_of_grad(const BoundParam& bound, TensorView& view,
                                        py::object& held) const;
  void prefetch_states_after(std::size_t at) const;
  void prefetch_params_after(std::size_t at, Scope scope) const;
  bool is_like_param(const BoundParam& bound, const TensorView& view, Format format) const;
  std::vector<Hyper>& hypers_for(PlanBucket& bucket);
  bool is_brief() const;  // see kBriefElements
  struct BucketLaunch {
    const PlanBucket* bucket;
    Launch launch;
    void* stream;  // null on a CPU
  };
  BucketLaunch prepare_launch(std::size_t bucket, const py::object& tensors,
                              GradsAfter grads_after);
  static void launch_least(const PlanBucket& bucket, const Launch& launch, int threads,
                           void* stream);
  void increment_versions(bool grads_too);
  bool has_grad(const BoundParam& bound) const;
  bool is_grad(PyObject* grad, PyObject* param) const;
  static const void* address_of_grad(PyObject* grad, const BoundParam& bound);

  GroupKeys keys_;
  bool as_fused_;
  std::vector<PlanBucket> buckets_;
  std::vector<BoundGroup> groups_;
  std::vector<BoundParam> params_;
  std::vector<std::int64_t> dims_;
  std::vector<Hyper> hypers_;                 // of this step, one a group
  std::vector<TensorNumber> tensor_numbers_;  // of this step
  // The state dict in its own order. Its tensors are not kept alive: state that is moved away is
  // freed at once.
  std::vector<BoundState> states_;
  std::vector<std::pair<PyObject*, PyObject*>> bound_items_;  // names and tensors
  struct RememberedGrad {
    py::object param;
    py::object grad;
    const BoundParam* bound;
    std::int64_t version;
    const void* address;  // `grad.data = other` counts no write
  };

  std::vector<RememberedGrad> gathered_, remembered_;
  Keeper keeper_;
  std::uint64_t looks_ = 0;
  py::object match_layout_;
  py::object grad_name_;                 // or None: see PlanOptions
  std::vector<py::object> named_grads_;  // what has that name: one a parameter; null for none
  bool watches_masters_;
  py::list kept_;  // the names in bound_items_, and counters that are in no state
};

}  // namespace warpstep
