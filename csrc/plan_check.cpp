// Comparing a plan with what is there now: the host's share of every step. See plan.h.
#include <algorithm>
#include <atomic>

#include "plan.h"
#include "threads.h"

namespace warpstep {
namespace {

// Names looked up at every step, interned once.
struct Names {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* betas = PyUnicode_InternFromString("betas");
  PyObject* eps = PyUnicode_InternFromString("eps");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* amsgrad = PyUnicode_InternFromString("amsgrad");
  PyObject* decoupled = PyUnicode_InternFromString("decoupled_weight_decay");
  PyObject* decay_form = PyUnicode_InternFromString("decay_form");
  PyObject* base_lr = PyUnicode_InternFromString("base_lr");
  PyObject* ema_decay = PyUnicode_InternFromString("ema_decay");
  PyObject* fused = PyUnicode_InternFromString("fused");
  PyObject* capturable = PyUnicode_InternFromString("capturable");
  PyObject* differentiable = PyUnicode_InternFromString("differentiable");
};
const Names& names() {
  static const Names all;
  return all;
}

// By the word that groups hold; warpstep/hypers.py has the same.
std::optional<Decay> decay_named(PyObject* name) {
  static constexpr std::pair<const char*, Decay> kForms[] = {{"coupled", Decay::coupled},
                                                             {"decoupled", Decay::decoupled},
                                                             {"independent", Decay::independent},
                                                             {"l1", Decay::l1},
                                                             {"cautious", Decay::cautious}};
  for (const auto& [form, decay] : kForms) {
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, form) == 0) return decay;
  }
  return std::nullopt;
}

bool same_shape(const TensorView& view, const std::int64_t* shape) {
  for (std::int32_t i = 0; i < view.ndim; ++i) {  // a few numbers: no call is worth it
    if (view.shape[i] != shape[i]) return false;
  }
  return true;
}

// With `exact`, the strides of dimensions of size one count too.
bool same_layout(const TensorView& view, const std::int64_t* shape, const std::int64_t* strides,
                 bool exact = false) {
  for (std::int32_t i = 0; i < view.ndim; ++i) {
    if (view.strides[i] != strides[i] && (shape[i] != 1 || exact)) return false;
  }
  return true;
}

// Calls look(0) to look(count - 1): see NOTE [looking on several threads].
template <class Function>
void look_on_threads(int threads, std::size_t count, const Function& look) {
  constexpr std::size_t kRun = 128, kWorthThreads = 512;
  const auto runs = static_cast<std::uint32_t>((count + kRun - 1) / kRun);
  static Sharing sharing;
  run_on_threads(count < kWorthThreads ? 1 : threads, runs, sharing, [&](std::uint32_t run) {
    for (std::size_t i = run * kRun; i < std::min(count, (run + 1) * kRun); ++i) look(i);
  });
}

}  // namespace

const char* Plan::check(py::handle state, py::handle param_groups, int threads) {
  tensor_scalars_.clear();
  keeper_.clear();
  threads = looking_threads(threads);
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
    const std::uint32_t element = bytes_of(bucket.recipe.grad);
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
  look_on_threads(threads, states_.size(), [&](std::size_t i) {
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
  for (PlanBucket& bucket : buckets_) {
    bucket.held_grads.clear();
    bucket.copied_grads.clear();
    bucket.copied_from.clear();
  }
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
  const BoundGroup& bound = groups_[index];
  if (!PyDict_Check(group)) return "a group was replaced";
  if (scope == Scope::grads) {
    if (PyDict_GetItem(group, names().params) != bound.params) return "a group was replaced";
  } else if (const char* why = check_items(group, index)) {
    return why;
  }
  if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(bound.params)) != bound.count) {
    return "a group's parameters changed";
  }
  PyObject* const* params = PySequence_Fast_ITEMS(bound.params);
  for (std::size_t i = 0; i < bound.count; ++i, ++next) {
    if (params[i] != params_[next].param) return "a group's parameters changed";
  }
  return nullptr;
}

// NOTE [looking on several threads]
// What is looked at lies all over memory, some thirty cache lines a parameter; with thousands of
// them the step waits for memory, and each thread that looks has its own misses under way. So on
// the CPU, whose threads the step will use anyway, they share the looking. They do it in place,
// which takes no Python: this thread holds the GIL for all of them. What cannot be seen that way,
// or is not as it was, is left to this thread, which looks thoroughly and can tell why.
int Plan::looking_threads(int threads) const {
  for (const PlanBucket& bucket : buckets_) {
    if (bucket.backend == Backend::cpu) return threads;
  }
  return 1;
}

const char* Plan::check_tensors(Scope scope, int threads) {
  ++looks_;
  look_on_threads(threads, params_.size(), [&](std::size_t i) {
    prefetch_params_after(i, scope);
    if (look_at(params_[i], scope, Look::in_place) == nullptr) params_[i].seen = looks_;
  });
  for (const BoundParam& bound : params_) {
    if (bound.seen == looks_) continue;
    if (keeper_.is_empty()) keep_alive();  // Python may run now
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
// The objects that are looked at lie all over memory; one after the other they would be waited for.
// So they are asked for in good time, a stage every few parameters: an object, what it points to,
// and so on.
constexpr std::size_t kApart = 3;

void Plan::prefetch_states_after(std::size_t at) const {
  if (at + 2 * kApart < states_.size()) fetch_object(states_[at + 2 * kApart].found);
  if (at + kApart >= states_.size()) return;
  PyObject* const found = states_[at + kApart].found;
  if (!PyDict_Check(found)) return;
  const auto* const keys =
      reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(found)->ma_keys);
  for (int line = 0; line < 2; ++line) __builtin_prefetch(keys + 64 * line);
}

void Plan::prefetch_params_after(std::size_t at, Scope scope) const {
  const TensorReader& reader = tensor_reader();
  for (int stage = 0; stage < TensorReader::kFetchStages; ++stage) {
    const std::size_t ahead = at + kApart * (TensorReader::kFetchStages - stage);
    if (ahead >= params_.size()) continue;
    const BoundParam& bound = params_[ahead];
    reader.fetch(stage, bound.param, true);
    if (scope == Scope::grads || stage > 2) continue;
    for (PyObject* tensor : bound.state) {
      if (tensor != nullptr) reader.fetch(stage, tensor, false);
    }
  }
}

const char* Plan::check_items(PyObject* group, std::uint32_t index) {
  const BoundGroup& bound = groups_[index];
  std::size_t seen = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value); seen += 2) {
    if (seen == bound.items.size() || bound.items[seen] != key || bound.items[seen + 1] != value) {
      break;
    }
  }
  const bool same = seen != 0 && seen == bound.items.size() &&
                    seen == 2 * static_cast<std::size_t>(PyDict_GET_SIZE(group));
  return same ? nullptr : read_group(group, index);
}

// What is invalid makes the plan stale: making the next one says what is wrong with it.
const char* Plan::read_group(PyObject* group, std::uint32_t index) {
  static constexpr const char* kInvalid = "a hyper-parameter is invalid";
  BoundGroup& bound = groups_[index];
  Hyper& hyper = hypers_[index];
  hyper = Hyper{};
  bool settled = true;  // the same objects will mean the same values

  const auto read_number = [&](PyObject* object, double& number) {
    if (object == nullptr) return false;
    settled &= PyFloat_Check(object) || PyLong_Check(object);
    number = PyFloat_Check(object) ? PyFloat_AS_DOUBLE(object) : PyFloat_AsDouble(object);
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  };
  // An accelerator's tensor is read, or pointed to, when the bucket's device is known.
  const auto read_scalar = [&](PyObject* object, Scalar Hyper::* value,
                               std::uint8_t Hyper::* kind) {
    TensorView view;
    if (object != nullptr && !PyFloat_Check(object) && !PyLong_Check(object) &&
        tensor_reader().read(object, view)) {
      if (view.numel() != 1) return false;
      if (view.device.type != dlpack::cpu) {
        tensor_scalars_.push_back({index, value, kind, py::reinterpret_borrow<py::object>(object)});
        settled = false;
        return true;
      }
    }
    return read_number(object, (hyper.*value).value);
  };
  if (PyDict_GetItem(group, names().params) != bound.params) return "a group was replaced";
  PyObject* const planned_for[] = {names().fused, names().capturable, names().differentiable};
  for (int i = 0; i < 3; ++i) {
    if (PyDict_GetItem(group, planned_for[i]) != bound.flags[i].ptr()) {
      return "a group's implementation flags changed";
    }
  }
  const auto read_flag = [&](PyObject* name, bool& flag) {
    PyObject* const object = PyDict_GetItem(group, name);
    if (object == nullptr) return false;
    settled &= PyBool_Check(object) || PyLong_Check(object) || object == Py_None;
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) PyErr_Clear();
    flag = truth > 0;
    return truth >= 0;
  };

  PyObject* const betas = PyDict_GetItem(group, names().betas);
  const bool two = betas != nullptr && PyObject_Size(betas) == 2;
  // Of a tuple or list the very same; of an array or a tensor a list of what it holds.
  const auto pair =
      py::reinterpret_steal<py::object>(two ? PySequence_Fast(betas, "no pair") : nullptr);
  if (!pair || PySequence_Fast_GET_SIZE(pair.ptr()) != 2) {
    PyErr_Clear();
    return kInvalid;
  }
  if (!PyTuple_Check(betas)) settled = false;
  PyObject* const* const beta = PySequence_Fast_ITEMS(pair.ptr());
  if (!read_scalar(PyDict_GetItem(group, names().lr), &Hyper::lr, &Hyper::lr_kind) ||
      !read_scalar(beta[0], &Hyper::beta1, &Hyper::beta1_kind) ||
      !read_scalar(beta[1], &Hyper::beta2, &Hyper::beta2_kind) ||
      !read_number(PyDict_GetItem(group, names().eps), hyper.eps) ||
      !read_number(PyDict_GetItem(group, names().weight_decay), hyper.weight_decay)) {
    return kInvalid;
  }
  bool amsgrad = false, maximize = false, decoupled = false;
  if (!read_flag(names().amsgrad, amsgrad) || !read_flag(names().maximize, maximize) ||
      !read_flag(names().decoupled, decoupled)) {
    return kInvalid;
  }
  if (amsgrad != groups_[index].amsgrad) return "a group's amsgrad changed";
  hyper.maximize = maximize;
  hyper.decay = decoupled ? Decay::decoupled : Decay::coupled;
  if (PyObject* form = PyDict_GetItem(group, names().decay_form)) {
    const std::optional<Decay> decay = decay_named(form);
    if (!decay) return kInvalid;
    hyper.decay = *decay;
  }
  if (hyper.decay == Decay::independent) {
    double base_lr = 0;
    if (!read_number(PyDict_GetItem(group, names().base_lr), base_lr) || !(base_lr > 0)) {
      return kInvalid;
    }
    hyper.weight_decay /= base_lr;
  }
  PyObject* ema_decay = PyDict_GetItem(group, names().ema_decay);
  const bool has_ema = ema_decay != nullptr && ema_decay != Py_None;
  if (has_ema && (!read_number(ema_decay, hyper.ema_decay) ||
                  !(hyper.ema_decay >= 0 && hyper.ema_decay <= 1))) {
    return kInvalid;
  }
  if (has_ema != bound.has_ema) return "a group's ema_decay came or went";

  bound.items.clear();
  bound.kept.clear();
  PyObject *key, *value;
  for (Py_ssize_t i = 0; settled && PyDict_Next(group, &i, &key, &value);) {
    bound.items.insert(bound.items.end(), {key, value});
    // Numbers, flags, words and betas; what else a group holds is not the plan's to keep alive.
    if (PyFloat_Check(value) || PyLong_Check(value) || PyUnicode_Check(value) ||
        PyTuple_Check(value)) {
      bound.kept.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
  return nullptr;
}

bool Plan::is_like_param(const BoundParam& bound, const TensorView& view, Format format) const {
  const dlpack::Device device = buckets_[bound.assignment].device;
  return view.known_format && view.format == format && view.is_complex == bound.is_complex &&
         view.device.type == device.type && view.device.index == device.index &&
         view.ndim == bound.ndim && same_shape(view, dims_.data() + bound.dims);
}

const char* Plan::check_param(const BoundParam& bound, Look look) const {
  if (bound.assignment == no_state) return nullptr;
  const PlanBucket& bucket = buckets_[bound.assignment];
  const TensorRow& row = bucket.rows[bound.row];
  const std::int64_t* shape = dims_.data() + bound.dims;
  const std::int64_t* strides = shape + bound.ndim;
  const TensorReader& reader = tensor_reader();
  TensorView view;
  const auto is_at = [&](PyObject* tensor, const void* address) {
    return tensor != nullptr &&
           (look == Look::in_place ? reader.read_in_place(tensor, view)
                                   : reader.read(tensor, view)) &&
           view.data == address;
  };
  const auto is_stream_at = [&](PyObject* tensor, const void* address, Format format) {
    return is_at(own_part_of(tensor, bound.layout), address) &&
           is_like_param(bound, view, format) && same_layout(view, shape, strides);
  };
  if (!is_stream_at(bound.param, row.param, bound.format)) return "a parameter's memory changed";
  static constexpr const char* kMoved = "a state tensor's memory changed";
  const void* const streams[] = {row.exp_avg, row.exp_avg_sq, row.max_exp_avg_sq, row.ema};
  for (int i = 0; i < 4; ++i) {
    if (bound.state[i] == nullptr) continue;
    const Format format = i < 3 ? bucket.recipe.moment : *bucket.ema;
    if (!is_stream_at(bound.state[i], streams[i], format)) return kMoved;
  }
  const bool is_counter = is_at(bound.state[4], row.step) && view.known_format &&
                          view.format == Format::float32 && view.numel() == 1 &&
                          view.device.type == bucket.device.type &&
                          view.device.index == bucket.device.index;
  return is_counter ? nullptr : kMoved;
}

TensorReader::Grad Plan::read_shard_of_grad(const BoundParam& bound, TensorView& view,
                                            py::object& held) {
  held = gradient_of(bound.param);
  if (held.is_none()) return TensorReader::Grad::none;
  PyObject* const own = own_part_of(held.ptr(), bound.layout);
  return own != nullptr && tensor_reader().read(own, view) ? TensorReader::Grad::readable
                                                           : TensorReader::Grad::unreadable;
}

const char* Plan::gather_grad(const BoundParam& bound, Look look) {
  const TensorReader& reader = tensor_reader();
  TensorView view;
  py::object held;
  const TensorReader::Grad grad = bound.layout ? read_shard_of_grad(bound, view, held)
                                  : look == Look::in_place
                                      ? reader.read_grad_in_place(bound.param, view)
                                      : reader.read_grad(bound.param, view, held);
  if (bound.assignment == no_state) {
    return grad == TensorReader::Grad::none ? nullptr : "a parameter got its first gradient";
  }
  PlanBucket& bucket = buckets_[bound.assignment];
  const std::int64_t numel = bucket.rows[bound.row].numel;
  const std::int64_t* shape = dims_.data() + bound.dims;
  const std::int64_t* strides = shape + bound.ndim;
  void*& slot = bucket.grads[bound.row];
  if (grad == TensorReader::Grad::none) {
    slot = nullptr;
    return nullptr;
  }
  if (held) bucket.held_grads.push_back(held);
  if (grad == TensorReader::Grad::unreadable || !is_like_param(bound, view, bucket.recipe.grad)) {
    return "a gradient's kind changed";
  }
  // What torch makes lazily negated or conjugated is a view of complex numbers: complex itself, or
  // with strides of its own, which a scalar does not have.
  const bool one = numel == 1;
  if (view.is_complex || (one && view.ndim == 0) || !same_layout(view, shape, strides, one)) {
    if (look == Look::in_place) return "a copy is needed";
    bucket.copied_from.push_back(gradient_of(bound.param));
    bucket.copied_grads.push_back(
        match_layout_(py::handle(own_part_of(bound.param, bound.layout)),
                      py::handle(own_part_of(bucket.copied_from.back().ptr(), bound.layout))));
    PyObject* const copy = bucket.copied_grads.back().ptr();
    if (!reader.read(copy, view) || !same_layout(view, shape, strides)) {
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
