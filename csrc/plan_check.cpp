// Comparing a plan with what is there now: the host's share of every step. See plan.h.
#include <algorithm>

#include "plan.h"

namespace warpstep {
namespace {

// Names looked up at every step, interned once.
struct Names {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* betas = PyUnicode_InternFromString("betas");
  PyObject* eps = PyUnicode_InternFromString("eps");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* amsgrad = PyUnicode_InternFromString("amsgrad");
  PyObject* decoupled = PyUnicode_InternFromString("decoupled_weight_decay");
  PyObject* fused = PyUnicode_InternFromString("fused");
  PyObject* capturable = PyUnicode_InternFromString("capturable");
  PyObject* differentiable = PyUnicode_InternFromString("differentiable");
};
const Names& names() {
  static const Names all;
  return all;
}

constexpr std::size_t kPrefetchDistance = 3;

// With `exact`, the strides of dimensions of size one count too.
bool same_layout(const TensorView& view, const std::int64_t* shape, const std::int64_t* strides,
                 bool exact = false) {
  for (std::int32_t i = 0; i < view.ndim; ++i) {
    if (view.strides[i] != strides[i] && (shape[i] != 1 || exact)) return false;
  }
  return true;
}

}  // namespace

// A tensor's Python object, C++ object and grown data lie all over the heap: with 10,000 parameters
// most of the check's time is waiting for them. Hints only: the addresses may be of the past.
void Plan::BoundParam::prefetch() const {
  const auto ask_for = [](const BoundTensor& tensor) {
    const char* inside = static_cast<const char*>(tensor.inside);
    __builtin_prefetch(tensor.object);
    for (int line = -1; line <= 2; ++line) __builtin_prefetch(inside + line * 64);
  };
  for (std::uint32_t i = 0; i < count; ++i) ask_for(tensors[i]);
  ask_for(last_grad);
}

const char* Plan::check(py::handle state, py::handle param_groups) {
  every_grad_ = true;
  tensor_scalars_.clear();
  hypers_.resize(groups_.size());
  for (Bucket& bucket : buckets_) bucket.copied_grads.clear();

  if (const char* why = check_state(state.ptr())) return why;
  if (!PyList_Check(param_groups.ptr()) ||
      static_cast<std::size_t>(PyList_GET_SIZE(param_groups.ptr())) != groups_.size()) {
    return "the number of parameter groups changed";
  }
  std::size_t next = 0;
  for (std::uint32_t g = 0; g < groups_.size(); ++g) {
    if (const char* why = check_group(PyList_GET_ITEM(param_groups.ptr(), g), g, next)) return why;
  }
  return nullptr;
}

// By identity: their memory is looked at with their parameter.
const char* Plan::check_state(PyObject* state) const {
  if (state != state_) return "the state was replaced";
  auto bound = state_order_.begin();
  const auto same = [&](PyObject* object) {
    return bound != state_order_.end() && *bound++ == object;
  };
  PyObject *key, *value, *name, *tensor;
  Py_ssize_t i = 0;
  while (PyDict_Next(state, &i, &key, &value)) {
    if (!same(key) || !same(value)) return "a parameter's state was replaced";
    if (!PyDict_Check(value)) continue;
    Py_ssize_t k = 0;
    while (PyDict_Next(value, &k, &name, &tensor)) {
      if (!same(tensor)) return "a state tensor was replaced";
    }
  }
  return bound == state_order_.end() ? nullptr : "a parameter's state was removed";
}

const char* Plan::check_group(PyObject* group, std::uint32_t index, std::size_t& next) {
  const BoundGroup& bound = groups_[index];
  const auto is = [&](PyObject* name, PyObject* value) {
    return PyDict_GetItem(group, name) == value;
  };
  if (!PyDict_Check(group) || !is(names().params, bound.params)) return "a group was replaced";
  if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(bound.params)) != bound.count) {
    return "a group's parameters changed";
  }
  PyObject* const* items = PySequence_Fast_ITEMS(bound.params);
  if (!is(names().fused, bound.fused) || !is(names().capturable, bound.capturable) ||
      !is(names().differentiable, bound.differentiable)) {
    return "a group's implementation flags changed";
  }
  if (const char* why = read_hypers(group, index)) return why;

  for (std::size_t i = 0; i < bound.count; ++i, ++next) {
    if (next + kPrefetchDistance < params_.size()) params_[next + kPrefetchDistance].prefetch();
    if (items[i] != params_[next].param()) return "a group's parameters changed";
    if (const char* why = check_param(params_[next])) return why;
  }
  return nullptr;
}

// What is invalid makes the plan stale: making the next one says what is wrong with it.
const char* Plan::read_hypers(PyObject* group, std::uint32_t index) {
  static constexpr const char* kInvalid = "a hyper-parameter is invalid";
  Hyper& hyper = hypers_[index];
  hyper = Hyper{};

  const auto read_number = [](PyObject* object, double& number) {
    if (object == nullptr) return false;
    number = PyFloat_Check(object) ? PyFloat_AS_DOUBLE(object) : PyFloat_AsDouble(object);
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  };
  // An accelerator's tensor is read, or pointed to, when the bucket's device is known.
  const auto read_scalar = [&](PyObject* object, Scalar Hyper::* value, std::uint8_t Hyper::* kind,
                               bool below_one) {
    TensorView view;
    if (object != nullptr && !PyFloat_Check(object) && !PyLong_Check(object) &&
        tensor_reader().read(object, view)) {
      if (view.numel() != 1) return false;
      if (view.device.type != dlpack::cpu) {
        tensor_scalars_.push_back({index, value, kind, object});
        return true;
      }
    }
    double& number = (hyper.*value).value;
    return read_number(object, number) && number >= 0 && (!below_one || number < 1);
  };
  const auto read_flag = [&](PyObject* name) {
    PyObject* flag = PyDict_GetItem(group, name);
    return flag == nullptr ? -1 : PyObject_IsTrue(flag);
  };

  PyObject* betas = PyDict_GetItem(group, names().betas);
  if (betas == nullptr || (!PyTuple_Check(betas) && !PyList_Check(betas)) ||
      PySequence_Fast_GET_SIZE(betas) != 2) {
    return kInvalid;
  }
  PyObject* const* pair = PySequence_Fast_ITEMS(betas);
  if (!read_scalar(PyDict_GetItem(group, names().lr), &Hyper::lr, &Hyper::lr_kind, false) ||
      !read_scalar(pair[0], &Hyper::beta1, &Hyper::beta1_kind, true) ||
      !read_scalar(pair[1], &Hyper::beta2, &Hyper::beta2_kind, true) ||
      !read_number(PyDict_GetItem(group, names().eps), hyper.eps) || !(hyper.eps >= 0) ||
      !read_number(PyDict_GetItem(group, names().weight_decay), hyper.weight_decay) ||
      !(hyper.weight_decay >= 0)) {
    return kInvalid;
  }
  const int amsgrad = read_flag(names().amsgrad), maximize = read_flag(names().maximize),
            decoupled = read_flag(names().decoupled);
  if (amsgrad < 0 || maximize < 0 || decoupled < 0) return kInvalid;
  if (static_cast<bool>(amsgrad) != groups_[index].amsgrad) return "a group's amsgrad changed";
  if (maximize) hyper.flags |= Hyper::maximize;
  if (decoupled) hyper.flags |= Hyper::decoupled_weight_decay;
  return nullptr;
}

const char* Plan::check_param(BoundParam& bound) {
  if (bound.assignment == python_only) return nullptr;
  const py::object grad =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(bound.param(), names().grad));
  if (!grad) throw py::error_already_set();
  if (bound.assignment == no_state) {
    return grad.is_none() ? nullptr : "a parameter got its first gradient";
  }

  Bucket& bucket = buckets_[bound.assignment];
  const void*& slot = bucket.grads[bound.row];
  const std::int64_t* shape = dims_.data() + bound.dims;
  const std::int64_t* strides = shape + bound.ndim;
  const TensorReader& read_tensor = tensor_reader();
  TensorView view;
  const auto is_like_param = [&](Format format) {
    return view.known_format && view.format == format && view.is_complex == bound.is_complex &&
           view.device.type == bucket.device.type && view.device.index == bucket.device.index &&
           view.ndim == bound.ndim && std::equal(shape, shape + bound.ndim, view.shape);
  };

  for (std::uint32_t i = 0; i < bound.count; ++i) {
    const BoundTensor& tensor = bound.tensors[i];
    const bool is_step = i + 1 == bound.count;
    if (!read_tensor.read(tensor.object, view) || view.data != tensor.data ||
        (is_step ? !view.known_format || view.format != tensor.format
                 : !is_like_param(tensor.format) || !same_layout(view, shape, strides))) {
      return i == 0 ? "a parameter's memory changed" : "a state tensor's memory changed";
    }
  }

  if (grad.is_none()) {
    slot = nullptr;
    every_grad_ = false;
    return nullptr;
  }
  if (!read_tensor.read(grad.ptr(), view) || !is_like_param(bucket.spec.recipe.grad)) {
    return "a gradient's kind changed";
  }
  bound.last_grad = {grad.ptr(), view.data, view.shape, view.format};
  // A lazily negated or conjugated gradient is a view of complex numbers: complex itself, or with
  // strides of its own, which a scalar does not have.
  const bool one = bucket.rows[bound.row].numel == 1;
  if (view.is_complex || (one && view.ndim == 0) || !same_layout(view, shape, strides, one)) {
    bucket.copied_grads.push_back(match_layout_(py::handle(bound.param()), grad));
    read_tensor.read(bucket.copied_grads.back().ptr(), view);
  }
  // An empty tensor has a gradient all the same: its step counter advances.
  static constexpr std::uint64_t kEmpty = 0;
  const bool empty = bucket.rows[bound.row].numel == 0;
  if (view.data == nullptr && !empty) return "a gradient's memory was freed";
  slot = empty ? &kEmpty : view.data;
  return nullptr;
}

}  // namespace warpstep
