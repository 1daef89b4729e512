// Reading parameter groups: see hypers.h.
#include "hypers.h"

#include "errors.h"
#include "tensor_reader.h"

namespace warpstep {
namespace {

// Names of every rule, interned once.
struct Names {
  PyObject* params = interned("params");
  PyObject* maximize = interned("maximize");
  PyObject* decay_form = interned("decay_form");
  PyObject* base_lr = interned("base_lr");
  PyObject* ema_decay = interned("ema_decay");
  PyObject* step = interned("step");
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
                                                             {"cautious", Decay::cautious},
                                                             {"l1l2", Decay::l1l2},
                                                             {"min", Decay::min}};
  for (const auto& [form, decay] : kForms) {
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, form) == 0) return decay;
  }
  return std::nullopt;
}

// Reads values of a group; `settled` stays true while the same objects will mean the same values.
struct Values {
  PyObject* group;
  bool settled = true;

  PyObject* get(PyObject* key) const { return PyDict_GetItem(group, key); }

  bool read_number(PyObject* object, double& number) {
    if (object == nullptr) return false;
    settled &= PyFloat_Check(object) || PyLong_Check(object);
    number = PyFloat_Check(object) ? PyFloat_AS_DOUBLE(object) : PyFloat_AsDouble(object);
    if (PyErr_Occurred() == nullptr) return true;
    clear_expected_error();
    return false;
  }

  bool read_flag(PyObject* key, bool& flag) {
    PyObject* const object = get(key);
    if (object == nullptr) return false;
    settled &=
        PyBool_Check(object) || PyFloat_Check(object) || PyLong_Check(object) || object == Py_None;
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) clear_expected_error();
    flag = truth > 0;
    return truth >= 0;
  }

  // A value, or one of the pair that it is; null where there is no such thing.
  py::object value_of(const std::pair<py::str, int>& place) {
    PyObject* const value = get(place.first.ptr());
    if (value == nullptr || place.second < 0) return py::reinterpret_borrow<py::object>(value);
    const bool two = PyObject_Size(value) == 2;
    // Of a tuple or list the very same; of an array or a tensor a list of what it holds.
    const auto pair =
        py::reinterpret_steal<py::object>(two ? PySequence_Fast(value, "no pair") : nullptr);
    if (!pair || PySequence_Fast_GET_SIZE(pair.ptr()) != 2) {
      clear_expected_error();
      return {};
    }
    if (!PyTuple_Check(value)) settled = false;
    return py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(pair.ptr(), place.second));
  }
};

// Whether a value is a tensor on an accelerator; `one` becomes false if it is a tensor of another
// number of elements.
bool is_on_accelerator(PyObject* object, bool& one) {
  TensorView view;
  if (object == nullptr || PyFloat_Check(object) || PyLong_Check(object) ||
      !tensor_reader().read(object, view)) {
    return false;
  }
  one = view.numel() == 1;
  return view.device.type != dlpack::cpu;
}

}  // namespace

bool point_to(Hyper& hyper, std::uint32_t number, const TensorView& view, dlpack::Device device) {
  const bool is_number = view.known_format && !view.is_complex && view.numel() == 1 &&
                         (view.format == Format::float32 || view.format == Format::float64);
  if (device.type == dlpack::cpu || view.device != device || !is_number || view.data == nullptr) {
    return false;
  }
  hyper.numbers[number].address = view.data;
  hyper.kinds[number] =
      view.format == Format::float64 ? Scalar::float64_address : Scalar::float32_address;
  return true;
}

void set_number(Hyper& hyper, const TensorNumber& number, dlpack::Device device) {
  TensorView view;
  if (tensor_reader().read(number.tensor.ptr(), view) &&
      point_to(hyper, number.number, view, device)) {
    return;
  }
  hyper.numbers[number.number].value = py::float_(number.tensor).cast<double>();
}

BoundGroup::BoundGroup(const py::dict& group, const GroupKeys& keys) {
  const py::object params = group["params"];
  params_ = params.ptr();
  count_ = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(params.ptr()));
  for (const py::str& key : keys.switches) switches_.push_back(py::bool_(group[key]));
  has_ema_ = group.contains("ema_decay") && !group["ema_decay"].is_none();
  is_min_ = group.contains("decay_form") &&
            decay_named(py::object(group["decay_form"]).ptr()) == Decay::min;
  for (const py::str& key : keys.flags) flags_.push_back(group[key]);
}

bool BoundGroup::has_params(PyObject* group) const {
  return PyDict_GetItem(group, names().params) == params_;
}

bool BoundGroup::has_same_items(PyObject* group) const {
  std::size_t seen = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value);) {
    if (key == names().step) continue;  // a count, which is no hyper-parameter
    if (seen == items_.size() || items_[seen] != key || items_[seen + 1] != value) return false;
    seen += 2;
  }
  return seen != 0 && seen == items_.size();
}

void BoundGroup::remember_items(PyObject* group) {
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value);) {
    if (key == names().step) continue;
    // Numbers, flags, words and pairs; what else a group holds is not the plan's to keep alive.
    if (PyFloat_Check(value) || PyLong_Check(value) || PyUnicode_Check(value) ||
        PyTuple_Check(value)) {
      kept_.push_back(py::reinterpret_borrow<py::object>(value));  // first: either may throw
    }
    items_.insert(items_.end(), {key, value});
  }
}

const char* BoundGroup::read(PyObject* group, std::uint32_t index, const GroupKeys& keys,
                             Hyper& hyper, std::vector<TensorNumber>& tensors) {
  static constexpr const char* kInvalid = "a hyper-parameter is invalid";
  if (has_same_items(group)) return nullptr;
  if (!has_params(group)) return "a group was replaced";
  for (std::size_t i = 0; i < flags_.size(); ++i) {
    if (PyDict_GetItem(group, keys.flags[i].ptr()) != flags_[i].ptr()) {
      return "a group's implementation flags changed";
    }
  }

  items_.clear();  // of `hyper` as it was: from here on it is half read
  kept_.clear();
  hyper = Hyper{};
  Values values{group};
  for (std::uint32_t i = 0; i < keys.numbers.size(); ++i) {
    const py::object value = values.value_of(keys.numbers[i]);
    bool one = true;
    if (i != kWeightDecay && is_on_accelerator(value.ptr(), one) && one) {
      tensors.push_back({index, i, value});
      values.settled = false;
    } else if (!one || !values.read_number(value.ptr(), hyper.numbers[i].value)) {
      return kInvalid;
    }
  }
  for (std::size_t i = 0; i < switches_.size(); ++i) {
    bool on = false;
    if (!values.read_flag(keys.switches[i].ptr(), on)) return kInvalid;
    if (on != switches_[i]) return "what a group's parameters have in their state changed";
  }
  bool maximize = false, decoupled = false;
  if (!values.read_flag(names().maximize, maximize)) return kInvalid;
  if (!keys.decoupled.is_none() && !values.read_flag(keys.decoupled.ptr(), decoupled)) {
    return kInvalid;
  }
  hyper.maximize = maximize;
  hyper.decay = decoupled ? Decay::decoupled : Decay::coupled;
  if (PyObject* form = values.get(names().decay_form)) {
    const std::optional<Decay> decay = decay_named(form);
    if (!decay) return kInvalid;
    hyper.decay = *decay;
  }
  if ((hyper.decay == Decay::min) != is_min_) return "a group's decay_form became 'min', or was it";
  if (hyper.decay == Decay::independent) {
    double base_lr = 0;
    if (!values.read_number(values.get(names().base_lr), base_lr) || !(base_lr > 0)) {
      return kInvalid;
    }
    hyper.numbers[kWeightDecay].value /= base_lr;
  }
  PyObject* const ema_decay = values.get(names().ema_decay);
  const bool has_ema = ema_decay != nullptr && ema_decay != Py_None;
  if (has_ema && (!values.read_number(ema_decay, hyper.ema_decay) ||
                  !(hyper.ema_decay >= 0 && hyper.ema_decay <= 1))) {
    return kInvalid;
  }
  if (has_ema != has_ema_) return "a group's ema_decay came or went";

  if (values.settled) remember_items(group);
  return nullptr;
}

int BoundGroup::traverse(visitproc visit, void* arg) const {
  for (const auto* objects : {&flags_, &kept_}) {
    for (const py::object& object : *objects) Py_VISIT(object.ptr());
  }
  return 0;
}

}  // namespace warpstep
