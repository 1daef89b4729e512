// Comparing a plan with what is there now: the host's share of every step. See plan.h.
#include <algorithm>
#include <atomic>
#include <unordered_map>

#include "cpu/threads.h"
#include "plan.h"

namespace warpstep {
namespace {

// Whether a tensor is so many elements in a run of memory.
bool is_run(const TensorView& view, Format format, std::int64_t numel, dlpack::Device device) {
  return view.known_format && view.format == format && view.numel() == numel &&
         view.device == device && view.is_contiguous();
}

// Calls check(0) to check(count - 1): see NOTE [checking on several threads].
template <class Function>
void check_on_threads(int threads, std::size_t count, const Function& check) {
  constexpr std::size_t kPiece = 64, kWorthThreads = 128;
  const auto pieces = static_cast<std::uint32_t>((count + kPiece - 1) / kPiece);
  static Sharing sharing;
  run_on_threads(count < kWorthThreads ? 1 : threads, pieces, sharing, [&](std::uint32_t piece) {
    for (std::size_t i = piece * kPiece; i < std::min(count, (piece + 1) * kPiece); ++i) check(i);
  });
}

}  // namespace

const char* Plan::check(py::handle state, py::handle param_groups, int threads) {
  tensor_numbers_.clear();
  keeper_.clear();
  threads = checking_threads(threads);
  // The groups first: reading them can run Python, which could change what is looked at then.
  if (const char* why = check_groups(param_groups.ptr(), Scope::everything)) return why;
  if (const char* why = check_state(state.ptr(), threads)) return why;
  return check_tensors(Scope::everything, threads);
}

std::size_t Plan::count_grads() const {
  std::size_t count = 0;
  for (const PlanBucket& bucket : buckets_) {
    for (const void* grad : bucket.grads) count += grad != nullptr;
  }
  return count;
}

bool Plan::has_shared_grads() const {
  std::vector<std::pair<const char*, const char*>> all;  // begin and end of each
  for (const PlanBucket& bucket : buckets_) {
    const std::uint32_t element = bytes_of(bucket.recipe.formats[kGrad]);
    for (std::size_t i = 0; i < bucket.rows.size(); ++i) {
      const auto* const begin = static_cast<const char*>(bucket.grads[i]);
      const std::int64_t numel = bucket.rows[i].numel;
      if (begin != nullptr && numel > 0) all.emplace_back(begin, begin + numel * element);
    }
  }
  std::sort(all.begin(), all.end());
  const auto overlap = [](const auto& a, const auto& b) { return b.first < a.second; };
  return std::adjacent_find(all.begin(), all.end(), overlap) != all.end();
}

// NOTE [what of the state is compared]
// Here: that each parameter's state holds the very objects that were bound, under their names. An
// object that died may have left its address to another, which does not matter: with the parameter
// it is compared where the object now at that address has its memory, of which shape and format.
// (Moving state under its name, `t.data = t.data.to(...)`, is a widespread idiom besides.)
const char* Plan::check_state(PyObject* state, int threads) {
  std::size_t next = 0;
  PyObject *param, *tensors;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &tensors); ++next) {
    if (next == states_.size() || states_[next].param != param) {
      return "a parameter's state came or went";
    }
    states_[next].found = tensors;
  }
  if (next != states_.size()) return "a parameter's state was removed";

  std::atomic<bool> same{true};
  check_on_threads(threads, states_.size(), [&](std::size_t i) {
    prefetch_states_after(i);
    if (!holds_bound_items(states_[i])) same = false;
  });
  return same ? nullptr : "a state tensor was replaced";
}

bool Plan::holds_bound_items(const BoundState& bound) const {
  auto expected = bound_items_.begin() + static_cast<std::ptrdiff_t>(bound.first);
  const auto end = expected + static_cast<std::ptrdiff_t>(bound.count);
  if (!PyDict_Check(bound.found)) return expected == end;
  PyObject *name, *tensor;
  for (Py_ssize_t at = 0; PyDict_Next(bound.found, &at, &name, &tensor); ++expected) {
    if (expected == end || expected->first != name || expected->second != tensor) return false;
  }
  return expected == end;
}

const char* Plan::check_groups(PyObject* param_groups, Scope scope) {
  let_go_of_grads();
  if (!PyList_Check(param_groups) ||
      static_cast<std::size_t>(PyList_GET_SIZE(param_groups)) != groups_.size()) {
    return "the number of parameter groups changed";
  }
  std::size_t next = 0;
  for (std::uint32_t g = 0; g < groups_.size(); ++g) {
    PyObject* const group = PyList_GET_ITEM(param_groups, g);
    if (const char* why = check_group(group, g, scope, next)) return why;
  }
  return nullptr;
}

const char* Plan::check_group(PyObject* group, std::uint32_t index, Scope scope,
                              std::size_t& next) {
  BoundGroup& bound = groups_[index];
  if (!PyDict_Check(group)) return "a group was replaced";
  if (scope == Scope::grads) {
    if (!bound.has_params(group)) return "a group was replaced";
  } else if (const char* why = bound.read(group, index, keys_, hypers_[index], tensor_numbers_)) {
    return why;
  }
  if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(bound.params())) != bound.count()) {
    return "a group's parameters changed";
  }
  PyObject* const* params = PySequence_Fast_ITEMS(bound.params());
  for (std::size_t i = 0; i < bound.count(); ++i, ++next) {
    if (params[i] != params_[next].param) return "a group's parameters changed";
  }
  return nullptr;
}

// NOTE [checking on several threads]
// The objects that are checked lie all over memory, some thirty cache lines a parameter; with many
// parameters the step waits for memory, and each thread has cache misses of its own under way. So
// on the CPU, whose threads the step will use anyway, they share the parameters out. They read
// tensors in place, which takes no Python: this thread holds the GIL for all of them. What cannot
// be read that way, or is not as it was, is left to this thread, which can tell why.
int Plan::checking_threads(int threads) const {
  for (const PlanBucket& bucket : buckets_) {
    if (bucket.backend == Backend::cpu) return threads;
  }
  return 1;
}

// Gradients under a name of Python's: asked for one by one, and then looked at like all others.
void Plan::ask_for_grads() {
  named_grads_.clear();
  named_grads_.reserve(params_.size());
  for (const BoundParam& bound : params_) {
    py::object grad = gradient_named(grad_name_.ptr(), bound.param);
    named_grads_.push_back(grad.is_none() ? py::object() : std::move(grad));
  }
}

py::object Plan::grad_of(const BoundParam& bound) const {
  if (grad_name_.is_none()) return gradient_of(bound.param);
  const auto index = static_cast<std::size_t>(&bound - params_.data());
  return index < named_grads_.size() && named_grads_[index] ? named_grads_[index] : py::none();
}

const char* Plan::check_tensors(Scope scope, int threads) {
  ++looks_;
  if (!grad_name_.is_none()) {
    if (scope == Scope::everything) keep_seen_alive(scope);  // Python may run now
    ask_for_grads();
  }
  check_on_threads(threads, params_.size(), [&](std::size_t i) {
    prefetch_params_after(i, scope);
    if (look_at(params_[i], scope, Look::in_place) == nullptr) params_[i].seen = looks_;
  });
  for (const BoundParam& bound : params_) {
    if (bound.seen == looks_) continue;
    if (keeper_.is_empty()) keep_seen_alive(scope);  // Python may run now
    if (const char* why = look_at(bound, scope, Look::thorough)) return why;
  }
  return nullptr;
}

const char* Plan::look_at(const BoundParam& bound, Scope scope, Look look) {
  if (bound.assignment == python_only) return nullptr;
  if (bound.layout && look == Look::in_place) return "a shard is found through Python";
  if (scope == Scope::everything) {
    if (const char* why = check_param(bound, look)) return why;
  }
  return gather_grad(bound, look);
}

// NOTE [asking ahead]
// The objects that are checked lie all over memory; one after the other they would be waited for.
// So they are asked for in good time, a stage a parameter: an object, what it points to, and so on.
// (10,000 parameters took 2.9 ms so, and 3.3 and 3.4 with two and six parameters from stage to
// stage: more is then under way than a core keeps track of.)
void Plan::prefetch_states_after(std::size_t at) const {
  if (at + 2 < states_.size()) fetch_object(states_[at + 2].found);
  if (at + 1 >= states_.size()) return;
  PyObject* const found = states_[at + 1].found;
  if (!PyDict_Check(found)) return;
  const auto* const keys =
      reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(found)->ma_keys);
  for (int line = 0; line < 2; ++line) __builtin_prefetch(keys + 64 * line);
}

void Plan::prefetch_params_after(std::size_t at, Scope scope) const {
  const TensorReader& reader = tensor_reader();
  for (int stage = 0; stage < TensorReader::kFetchStages; ++stage) {
    const std::size_t ahead = at + TensorReader::kFetchStages - stage;
    if (ahead >= params_.size()) continue;
    const BoundParam& bound = params_[ahead];
    reader.fetch(stage, bound.param, true);
    if (scope == Scope::grads || stage > 2) continue;
    for (PyObject* tensor : bound.operands) {
      if (tensor != nullptr) reader.fetch(stage, tensor, false);
    }
    if (bound.counter != nullptr) reader.fetch(stage, bound.counter, false);
  }
}

bool Plan::is_like_param(const BoundParam& bound, const TensorView& view, Format format) const {
  const dlpack::Device device = buckets_[bound.assignment].device;
  return view.known_format && view.format == lies_as(format) &&
         view.is_complex == bound.is_complex && view.device == device && view.ndim == bound.ndim &&
         view.has_shape(dims_.data() + bound.dims);
}

const char* Plan::check_param(const BoundParam& bound, Look look) const {
  if (bound.assignment == no_state) return nullptr;
  const PlanBucket& bucket = buckets_[bound.assignment];
  const TensorRow& row = bucket.rows[bound.row];
  const std::int64_t* strides = dims_.data() + bound.dims + bound.ndim;
  const TensorReader& reader = tensor_reader();
  TensorView view;
  const auto is_at = [&](PyObject* tensor, const void* address) {
    return tensor != nullptr &&
           (look == Look::in_place ? reader.read_in_place(tensor, view)
                                   : reader.read(tensor, view)) &&
           view.data == address;
  };
  const auto is_operand_at = [&](PyObject* tensor, const void* address, Format format) {
    return is_at(own_part_of(tensor, bound.layout), address) &&
           is_like_param(bound, view, format) && view.has_strides(strides);
  };
  if (!is_operand_at(bound.stepped(), row.operands[kParam], bucket.recipe.formats[kParam])) {
    return "a parameter's memory changed";
  }
  if (bound.operands[kResidual] != nullptr && watches_masters_ &&
      reader.version_of(bound.param) != bound.version) {
    return "a parameter with a residual was written to";
  }
  static constexpr const char* kMoved = "a state tensor's memory changed";
  for (std::uint32_t i = kMoment; i < kStable; ++i) {
    if (bound.operands[i] == nullptr) continue;
    if (i >= kScale && i < kScaleEnd) {
      if (!is_at(own_part_of(bound.operands[i], bound.layout), row.operands[i]) ||
          !is_run(view, Format::uint8, elements_of(i, row.numel), bucket.device)) {
        return kMoved;
      }
    } else if (!is_operand_at(bound.operands[i], row.operands[i], bucket.recipe.formats[i])) {
      return kMoved;
    }
  }
  if (bound.counter == nullptr) return nullptr;
  const bool is_counter =
      is_at(bound.counter, row.step) && is_run(view, Format::float32, 1, bucket.device);
  return is_counter ? nullptr : kMoved;
}

template <class Visit>
void Plan::visit_with_residual(py::handle param_groups, Visit&& visit) {
  std::unordered_map<PyObject*, BoundParam*> bound;
  for (BoundParam& one : params_) {
    if (one.operands[kResidual] != nullptr) bound.emplace(one.param, &one);
  }
  if (bound.empty()) return;
  for (py::handle group : param_groups) {
    for (py::handle param : group["params"]) {
      const auto found = bound.find(param.ptr());
      if (found != bound.end()) {
        visit(param, found->second->version, tensor_reader().version_of(param.ptr()));
      }
    }
  }
}

py::list Plan::written_params(py::handle param_groups) {
  py::list written;
  visit_with_residual(param_groups, [&](py::handle param, std::int64_t then, std::int64_t now) {
    if (now != then) written.append(param);
  });
  return written;
}

void Plan::note_versions(py::handle param_groups) {
  visit_with_residual(param_groups,
                      [](py::handle, std::int64_t& then, std::int64_t now) { then = now; });
}

TensorReader::Grad Plan::read_grad(const BoundParam& bound, Look look, TensorView& view,
                                   py::object& held) const {
  const TensorReader& reader = tensor_reader();
  if (bound.layout) return read_shard_of_grad(bound, view, held);
  if (!grad_name_.is_none()) {
    const py::object& grad = named_grads_[static_cast<std::size_t>(&bound - params_.data())];
    if (!grad) return TensorReader::Grad::none;
    const bool readable = look == Look::in_place ? reader.read_in_place(grad.ptr(), view)
                                                 : reader.read(grad.ptr(), view);
    return readable ? TensorReader::Grad::readable : TensorReader::Grad::unreadable;
  }
  return look == Look::in_place ? reader.read_grad_in_place(bound.param, view)
                                : reader.read_grad(bound.param, view, held);
}

TensorReader::Grad Plan::read_shard_of_grad(const BoundParam& bound, TensorView& view,
                                            py::object& held) const {
  held = grad_of(bound);
  if (held.is_none()) return TensorReader::Grad::none;
  PyObject* const own = own_part_of(held.ptr(), bound.layout);
  return own != nullptr && tensor_reader().read(own, view) ? TensorReader::Grad::readable
                                                           : TensorReader::Grad::unreadable;
}

const char* Plan::gather_grad(const BoundParam& bound, Look look) {
  const TensorReader& reader = tensor_reader();
  TensorView view;
  py::object held;
  const TensorReader::Grad grad = read_grad(bound, look, view, held);
  if (bound.assignment == no_state) {
    return grad == TensorReader::Grad::none ? nullptr : "a parameter got its first gradient";
  }
  PlanBucket& bucket = buckets_[bound.assignment];
  const std::int64_t numel = bucket.rows[bound.row].numel;
  const std::int64_t* strides = dims_.data() + bound.dims + bound.ndim;
  void*& slot = bucket.grads[bound.row];
  if (grad == TensorReader::Grad::none) {
    slot = nullptr;
    return nullptr;
  }
  // Others were kept alive by keep_seen_alive(); what was read through Python is kept here.
  if (look == Look::thorough && !held) held = grad_of(bound);
  if (held) bucket.held_grads.push_back(held);
  if (grad == TensorReader::Grad::unreadable ||
      !is_like_param(bound, view, bucket.recipe.formats[kGrad])) {
    return "a gradient's kind changed";
  }
  // What torch makes lazily negated or conjugated is a view of complex numbers: complex itself, or
  // with strides of its own, which a scalar does not have.
  const bool one = numel == 1;
  if (view.is_complex || (one && view.ndim == 0) || !view.has_strides(strides, one)) {
    if (look == Look::in_place) return "a copy is needed";
    bucket.copied_from.push_back(grad_of(bound));
    bucket.copied_grads.push_back(
        match_layout_(py::handle(own_part_of(bound.param, bound.layout)),
                      py::handle(own_part_of(bucket.copied_from.back().ptr(), bound.layout))));
    PyObject* const copy = bucket.copied_grads.back().ptr();
    if (!reader.read(copy, view) || !view.has_strides(strides)) {
      return "a parameter's memory changed";  // the copy has the strides that it has now
    }
  }
  // An empty tensor has a gradient all the same: its step counter advances.
  static std::uint64_t nothing;
  if (view.data == nullptr && numel != 0) return "a gradient's memory was freed";
  slot = numel == 0 ? &nothing : view.data;
  return nullptr;
}

}  // namespace warpstep
