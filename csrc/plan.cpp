// Binding, checking and launching: see plan.h.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "adamw_cpu.h"
#ifdef WARPSTEP_CUDA
#include "adamw_cuda.h"
#endif

namespace warpstep {
namespace {

std::optional<TensorReader> reader;

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

constexpr std::size_t kPrefetchDistance = 4;
constexpr const char* kMomentNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

// Asks for a tensor's Python object and, around an address within it, its C++ object, which lie all
// over the heap: with 10,000 parameters most of the check's time is waiting for them. A hint only.
void prefetch(const PyObject* object, const void* inside) {
  const char* address = static_cast<const char*>(inside);
  __builtin_prefetch(object);
  __builtin_prefetch(address - 64);
  __builtin_prefetch(address);
  __builtin_prefetch(address + 64);
}

bool same_layout(const TensorView& view, const std::int64_t* shape, const std::int64_t* strides) {
  for (std::int32_t i = 0; i < view.ndim; ++i) {
    if (view.strides[i] != strides[i] && shape[i] != 1) return false;
  }
  return true;
}

// Elements before the first 16-byte boundary that most of the addresses share; gradients, whose
// addresses change from step to step, have no vote.
std::uint32_t head_of(const TensorRow& row, const RecipeKey& recipe) {
  const struct {
    const void* address;
    std::uint32_t element;
  } streams[] = {{row.param, bytes_of(recipe.param)},
                 {row.exp_avg, bytes_of(recipe.moment)},
                 {row.exp_avg_sq, bytes_of(recipe.moment)}};
  std::uint32_t best = 0, best_votes = 0;
  for (std::uint32_t head = 0; head < 8; ++head) {
    std::uint32_t votes = 0;
    for (const auto& stream : streams) {
      votes += (reinterpret_cast<std::uintptr_t>(stream.address) + head * stream.element) % 16 == 0;
    }
    if (votes > best_votes) {
      best = head;
      best_votes = votes;
    }
  }
  return best;
}

template <class T>
py::bytes bytes_of_table(const std::vector<T>& table) {
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T));
}

}  // namespace

void set_tensor_reader(TensorReader value) { reader = value; }

const TensorReader& tensor_reader() {
  if (!reader) throw std::logic_error("set_exchange_api() has not been called");
  return *reader;
}

LaunchCounts& launch_counts() {
  static LaunchCounts counts;
  return counts;
}

Plan::Plan(py::dict state, py::list param_groups, const std::vector<int>& assignments,
           const std::vector<BucketSpec>& buckets, py::object match_layout)
    : state_(state.ptr()), match_layout_(std::move(match_layout)) {
  for (const BucketSpec& spec : buckets) buckets_.emplace_back().spec = spec;
  kept_.append(state);

  std::size_t next = 0;
  for (std::uint32_t g = 0; g < param_groups.size(); ++g) {
    py::dict group = param_groups[g];
    py::list params = group["params"];
    const auto identity = [&](const char* key) {
      py::object value = group[key];
      kept_.append(value);
      return value.ptr();
    };
    kept_.append(params);
    groups_.push_back({params.ptr(), params.size(), py::bool_(group["amsgrad"]), identity("fused"),
                       identity("capturable"), identity("differentiable")});
    for (py::handle param : params) {
      BoundParam bound;
      bound.param = param.ptr();
      bound.assignment = assignments.at(next++);
      kept_.append(param);
      if (bound.assignment >= 0) bind_param(state[param], bound, g);
      params_.push_back(bound);
    }
  }
  for (Bucket& bucket : buckets_) {
    bucket.grads.resize(bucket.rows.size());
    cut_chunks(bucket);
  }

  for (auto [key, value] : state) {
    state_order_.insert(state_order_.end(), {key.ptr(), value.ptr()});
    kept_.append(key);
    kept_.append(value);
    if (!PyDict_Check(value.ptr())) continue;
    for (auto [name, tensor] : py::reinterpret_borrow<py::dict>(value)) {
      state_order_.push_back(tensor.ptr());
      kept_.append(tensor);
    }
  }
}

void Plan::bind_param(py::handle state, BoundParam& bound, std::uint32_t group) {
  Bucket& bucket = buckets_.at(bound.assignment);
  const RecipeKey& recipe = bucket.spec.recipe;
  TensorView param;
  if (!tensor_reader().read(bound.param, param)) throw py::type_error("a parameter has no memory");
  bound.data = param.data;
  bound.inside[0] = param.shape;
  bound.format = param.format;
  bound.is_complex = param.is_complex;
  bound.ndim = param.ndim;
  bound.dims = dims_.size();
  dims_.insert(dims_.end(), param.shape, param.shape + param.ndim);
  dims_.insert(dims_.end(), param.strides, param.strides + param.ndim);

  TensorRow row{};
  row.param = param.data;
  row.numel = param.numel();
  row.group = group;
  const auto bind = [&](const char* name, Format format, std::int64_t numel) {
    py::object tensor = state[name];
    TensorView view;
    if (!tensor_reader().read(tensor.ptr(), view) || !view.known_format || view.format != format ||
        view.numel() != numel || view.device.type != param.device.type ||
        view.device.index != param.device.index) {
      throw py::type_error(std::string("the state's ") + name + " does not fit its recipe");
    }
    return std::pair(tensor.ptr(), view);
  };
  void** const slots[] = {&row.exp_avg, &row.exp_avg_sq, &row.max_exp_avg_sq};
  for (int i = 0; i < (recipe.amsgrad ? 3 : 2); ++i) {
    const auto [tensor, view] = bind(kMomentNames[i], recipe.moment, row.numel);
    bound.moments[i] = tensor;
    bound.moment_data[i] = *slots[i] = view.data;
    if (i < 2) bound.inside[i + 1] = view.shape;
  }
  row.step = static_cast<float*>(bind("step", Format::float32, 1).second.data);
  row.head = head_of(row, recipe);

  bound.row = static_cast<std::uint32_t>(bucket.rows.size());
  if (bucket.rows.empty()) bucket.device = param.device;
  bucket.rows.push_back(row);
  versioned_.append(py::handle(bound.param));
}

void Plan::cut_chunks(Bucket& bucket) {
  std::int64_t chunk_size = kCpuChunk;
#ifdef WARPSTEP_CUDA
  if (bucket.spec.backend == Backend::cuda) chunk_size = kCudaChunk;
#endif
  if (bucket.spec.backend == Backend::external) return;  // Triton cuts its own
  std::int64_t in_batch = kCpuBatch;
  for (std::uint32_t tensor = 0; tensor < bucket.rows.size(); ++tensor) {
    TensorRow& row = bucket.rows[tensor];
    row.chunks = count_chunks(row.numel, row.head, chunk_size);
    for (std::uint32_t index = 0; index < row.chunks; ++index) {
      if (in_batch >= kCpuBatch) {
        bucket.batches.push_back(static_cast<std::uint32_t>(bucket.chunks.size()));
        in_batch = 0;
      }
      in_batch += std::min(row.numel, chunk_size);
      bucket.chunks.push_back({tensor, index});
    }
  }
  bucket.batches.push_back(static_cast<std::uint32_t>(bucket.chunks.size()));
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

// NOTE [the state is compared by identity, the moments by address too]
// Replacing a state tensor, a parameter's state or the whole state dict changes an identity. Moving
// a state tensor under its name (`t.data = t.data.to(...)`, a widespread idiom) changes its address,
// which costs some 50 ns to read: it is read for the moments, and not for the step counter, which
// that idiom moves with them.
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
  if (static_cast<std::size_t>(PyList_GET_SIZE(bound.params)) != bound.count) {
    return "a group's parameters changed";
  }
  if (!is(names().fused, bound.fused) || !is(names().capturable, bound.capturable) ||
      !is(names().differentiable, bound.differentiable)) {
    return "a group's implementation flags changed";
  }
  if (const char* why = read_hypers(group, index)) return why;

  for (std::size_t i = 0; i < bound.count; ++i, ++next) {
    if (next + kPrefetchDistance < params_.size()) {
      const BoundParam& ahead = params_[next + kPrefetchDistance];
      prefetch(ahead.param, ahead.inside[0]);
      prefetch(ahead.moments[0], ahead.inside[1]);
      prefetch(ahead.moments[1], ahead.inside[2]);
    }
    if (PyList_GET_ITEM(bound.params, i) != params_[next].param) {
      return "a group's parameters changed";
    }
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
  // A tensor's value is read, or pointed to, when the bucket's device is known.
  const auto read_scalar = [&](PyObject* object, Scalar Hyper::* value, std::uint8_t Hyper::* kind,
                               bool below_one) {
    TensorView view;
    if (object != nullptr && !PyFloat_Check(object) && !PyLong_Check(object) &&
        tensor_reader().read(object, view)) {
      if (view.numel() != 1) return false;
      tensor_scalars_.push_back({index, value, kind, object});
      return true;
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
      py::reinterpret_steal<py::object>(PyObject_GetAttr(bound.param, names().grad));
  if (!grad) throw py::error_already_set();
  if (bound.assignment == no_state) {
    return grad.is_none() ? nullptr : "a parameter got its first gradient";
  }

  Bucket& bucket = buckets_[bound.assignment];
  const void*& slot = bucket.grads[bound.row];
  const std::int64_t* shape = dims_.data() + bound.dims;
  const std::int64_t* strides = shape + bound.ndim;
  const TensorReader& read_tensor = tensor_reader();
  const auto same_shape = [&](const TensorView& view) {
    return view.ndim == bound.ndim && std::equal(shape, shape + bound.ndim, view.shape);
  };
  const auto same_device = [&](const TensorView& view) {
    return view.device.type == bucket.device.type && view.device.index == bucket.device.index;
  };
  const auto same_kind = [&](const TensorView& view, Format format) {
    return view.known_format && view.format == format && view.is_complex == bound.is_complex;
  };

  TensorView view;
  if (!read_tensor.read(bound.param, view) || view.data != bound.data || !same_device(view) ||
      !same_kind(view, bound.format) || !same_shape(view) || !same_layout(view, shape, strides)) {
    return "a parameter's memory changed";
  }
  for (int i = 0; i < 3 && bound.moments[i] != nullptr; ++i) {
    if (!read_tensor.read(bound.moments[i], view) || view.data != bound.moment_data[i]) {
      return "a moment's memory changed";
    }
  }

  if (grad.is_none()) {
    slot = nullptr;
    every_grad_ = false;
    return nullptr;
  }
  if (!read_tensor.read(grad.ptr(), view) || !same_device(view) ||
      !same_kind(view, bucket.spec.recipe.grad) || !same_shape(view)) {
    return "a gradient's kind changed";
  }
  if (!same_layout(view, shape, strides) || view.is_complex) {
    bucket.copied_grads.push_back(match_layout_(py::handle(bound.param), grad));
    read_tensor.read(bucket.copied_grads.back().ptr(), view);
  }
  // An empty tensor has a gradient all the same: its step counter advances.
  static constexpr std::uint64_t kEmpty = 0;
  const bool empty = bucket.rows[bound.row].numel == 0;
  if (view.data == nullptr && !empty) return "a gradient's memory was freed";
  slot = empty ? &kEmpty : view.data;
  return nullptr;
}

std::vector<Hyper>& Plan::hypers_for(Bucket& bucket) {
  bucket.hypers = hypers_;
  for (const TensorScalar& scalar : tensor_scalars_) {
    Hyper& hyper = bucket.hypers[scalar.group];
    TensorView view;
    tensor_reader().read(scalar.tensor, view);
    const bool addressable = bucket.device.type != dlpack::cpu &&
                             view.device.type == bucket.device.type &&
                             view.device.index == bucket.device.index && view.known_format &&
                             bytes_of(view.format) >= 4;
    if (addressable) {
      (hyper.*scalar.value).address = view.data;
      hyper.*scalar.kind = view.format == Format::float64 ? Scalar::float64_address
                                                          : Scalar::float32_address;
    } else {
      (hyper.*scalar.value).value =
          py::float_(py::reinterpret_borrow<py::object>(scalar.tensor)).cast<double>();
    }
  }
  return bucket.hypers;
}

void Plan::launch(int threads, py::object scales) {
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    Bucket& bucket = buckets_[i];
    if (bucket.spec.backend == Backend::external) continue;

    LossScale loss_scale{};
    if (!scales.is_none()) {
      const py::tuple pair = scales[py::int_(i)];
      const auto address = [](py::handle tensor) -> const float* {
        TensorView view;
        if (tensor.is_none()) return nullptr;
        if (!tensor_reader().read(tensor.ptr(), view)) throw py::type_error("a scale has no memory");
        return static_cast<const float*>(view.data);
      };
      loss_scale = {address(pair[0]), address(pair[1])};
    }
    const std::vector<Hyper>& hypers = hypers_for(bucket);
    const Launch launch{bucket.spec.recipe,
                        loss_scale,
                        bucket.rows.data(),
                        bucket.grads.data(),
                        static_cast<std::uint32_t>(bucket.rows.size()),
                        hypers.data(),
                        static_cast<std::uint32_t>(hypers.size()),
                        bucket.chunks.data(),
                        static_cast<std::uint32_t>(bucket.chunks.size())};
    if (bucket.spec.backend == Backend::cpu) {
      launch_cpu(bucket, launch, threads);
    } else {
      launch_cuda(bucket, launch);
    }
  }
}

void Plan::launch_cpu(Bucket& bucket, const Launch& launch, int threads) {
  const auto batches = static_cast<std::uint32_t>(bucket.batches.size() - 1);
  py::gil_scoped_release release;
  adamw_cpu(launch, bucket.batches.data(), batches, threads);
  ++launch_counts().cpu;
}

#ifdef WARPSTEP_CUDA
void Plan::launch_cuda(Bucket& bucket, const Launch& launch) {
  const auto check = [](int error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_text(error));
  };
  const dlpack::Device device = bucket.device;
  void* stream = tensor_reader().current_stream(device);
  const DeviceTables& at = bucket.device_tables;
  const CudaTables tables{reinterpret_cast<const void*>(at.rows),
                          reinterpret_cast<const void*>(at.chunks),
                          reinterpret_cast<void*>(at.arrivals),
                          reinterpret_cast<const void*>(at.hypers)};
  const std::size_t bytes = launch.groups * sizeof(Hyper);
  if (cuda_needs_hyper_table(launch.tensors, launch.groups) &&
      (bucket.uploaded_hypers.size() != launch.groups ||
       std::memcmp(bucket.uploaded_hypers.data(), launch.hypers, bytes) != 0)) {
    // A captured copy would read the host's memory again at every replay.
    if (cuda_is_capturing(stream)) {
      throw std::runtime_error(
          "so many parameter groups need a table on the device, which a graph capture cannot fill: "
          "take a step with these hyper-parameters before capturing");
    }
    bucket.uploaded_hypers.assign(launch.hypers, launch.hypers + launch.groups);
    check(cuda_copy_to_device(reinterpret_cast<void*>(at.hypers), bucket.uploaded_hypers.data(),
                              bytes, device.index, stream));
  }
  const CudaResult result = adamw_cuda(launch, tables, device.index, stream);
  launch_counts().cuda += result.launches;
  check(result.error);
}
#else
void Plan::launch_cuda(Bucket&, const Launch&) {
  throw std::logic_error("this module was built without CUDA");
}
#endif

void Plan::increment_versions() {
  static py::handle increment =
      py::object(py::module_::import("torch.autograd.graph").attr("increment_version")).release();
  if (every_grad_) {
    increment(versioned_);
    return;
  }
  py::list with_grad;
  for (const BoundParam& bound : params_) {
    if (bound.assignment >= 0 && buckets_[bound.assignment].grads[bound.row] != nullptr) {
      with_grad.append(py::handle(bound.param));
    }
  }
  increment(with_grad);
}

py::dict Plan::host_tables(std::size_t index) const {
  const Bucket& bucket = buckets_.at(index);
  py::dict tables;
  tables["rows"] = bytes_of_table(bucket.rows);
  tables["chunks"] = bytes_of_table(bucket.chunks);
  tables["arrivals"] = py::bytes(std::string(bucket.rows.size() * sizeof(std::uint32_t), '\0'));
  std::size_t hypers = 0;
#ifdef WARPSTEP_CUDA
  if (cuda_needs_hyper_table(static_cast<std::uint32_t>(bucket.rows.size()),
                             static_cast<std::uint32_t>(groups_.size()))) {
    hypers = groups_.size() * sizeof(Hyper);
  }
#endif
  tables["hypers"] = py::bytes(std::string(hypers, '\0'));
  return tables;
}

void Plan::set_device_tables(std::size_t index, const DeviceTables& tables) {
  buckets_.at(index).device_tables = tables;
}

py::bytes Plan::grad_table(std::size_t index) const {
  return bytes_of_table(buckets_.at(index).grads);
}

py::bytes Plan::hyper_table(std::size_t index) {
  return bytes_of_table(hypers_for(buckets_.at(index)));
}

}  // namespace warpstep
