// Binding, checking and launching: see plan.h.
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "adamw_cpu.h"
#include "adamw_cuda.h"
#include "chunks.h"

namespace warpstep {
namespace {

void* address_of(py::handle tensor) {
  TensorView view;
  if (tensor.is_none()) return nullptr;
  if (!tensor_reader().read(tensor.ptr(), view)) throw py::type_error("a tensor has no memory");
  return view.data;
}

template <class T>
py::bytes bytes_of_table(const std::vector<T>& table) {
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T));
}

}  // namespace

LaunchCounts& launch_counts() {
  static LaunchCounts counts;
  return counts;
}

Plan::Plan(py::dict state, py::list param_groups, const std::vector<int>& assignments,
           const std::vector<BucketSpec>& buckets, py::object match_layout)
    : match_layout_(std::move(match_layout)) {
  for (const BucketSpec& spec : buckets) buckets_.emplace_back().spec = spec;

  std::size_t next = 0;
  for (std::uint32_t g = 0; g < param_groups.size(); ++g) {
    py::dict group = param_groups[g];
    const py::object params = group["params"];
    groups_.push_back({params.ptr(),
                       static_cast<std::size_t>(PySequence_Fast_GET_SIZE(params.ptr())),
                       py::bool_(group["amsgrad"]),
                       group.contains("ema_decay") && !group["ema_decay"].is_none(),
                       {group["fused"], group["capturable"], group["differentiable"]},
                       {},
                       {}});
    for (py::handle param : params) {
      BoundParam bound;
      bound.param = param.ptr();
      bound.assignment = assignments.at(next++);
      if (bound.assignment >= 0) bind_param(state[param], bound, g);
      params_.push_back(bound);
    }
  }
  hypers_.resize(groups_.size());
  for (Bucket& bucket : buckets_) {
    bucket.grads.resize(bucket.rows.size());
    if (bucket.spec.backend == Backend::external) {  // whose own rows name the optimizer's groups
      bucket.groups.resize(groups_.size());
      std::iota(bucket.groups.begin(), bucket.groups.end(), 0u);
    }
    cut_chunks(bucket);
  }

  for (auto [param, tensors] : state) {
    const std::size_t first = bound_items_.size();
    if (PyDict_Check(tensors.ptr())) {
      for (auto [name, tensor] : py::reinterpret_borrow<py::dict>(tensors)) {
        names_.append(name);
        bound_items_.push_back({name.ptr(), tensor.ptr()});
      }
    }
    states_.push_back({param.ptr(), first, bound_items_.size() - first});
  }
}

void Plan::bind_param(py::handle state, BoundParam& bound, std::uint32_t group) {
  Bucket& bucket = buckets_.at(bound.assignment);
  const RecipeKey& recipe = bucket.spec.recipe;
  bound.layout = layout_of(bound.param);
  const auto read = [&](PyObject* tensor, TensorView& view) {
    return tensor != nullptr && tensor_reader().read(tensor, view);
  };
  TensorView param;
  if (!read(own_part_of(bound.param, bound.layout), param)) {
    throw py::type_error("a parameter has no memory");
  }
  bound.format = param.format;
  bound.is_complex = param.is_complex;
  bound.ndim = param.ndim;
  bound.dims = dims_.size();
  dims_.insert(dims_.end(), param.shape, param.shape + param.ndim);
  dims_.insert(dims_.end(), param.strides, param.strides + param.ndim);

  const auto bind = [&](PyObject* tensor, Format format, std::int64_t numel) {
    TensorView view;
    if (!read(tensor, view) || !view.known_format || view.format != format ||
        view.numel() != numel || view.device.type != param.device.type ||
        view.device.index != param.device.index) {
      throw py::type_error("a parameter or its state does not fit its recipe");
    }
    return view.data;
  };
  const std::int64_t numel = param.numel();
  TensorRow row{};
  row.param = bind(own_part_of(bound.param, bound.layout), recipe.param, numel);
  // Kernels take an average that is not of the parameter's format for float32.
  if (bucket.spec.ema && *bucket.spec.ema != recipe.param &&
      (*bucket.spec.ema != Format::float32 || recipe.param == Format::float64)) {
    throw py::type_error("an average has a format that no kernel takes");
  }
  void* step = nullptr;
  const struct {
    const char* name;
    bool present;
    Format format;
    std::int64_t numel;
    void** address;
  } streams[] = {
      {"exp_avg", true, recipe.moment, numel, &row.exp_avg},
      {"exp_avg_sq", true, recipe.moment, numel, &row.exp_avg_sq},
      {"max_exp_avg_sq", recipe.amsgrad, recipe.moment, numel, &row.max_exp_avg_sq},
      {"ema", bucket.spec.ema.has_value(), bucket.spec.ema.value_or(Format{}), numel, &row.ema},
      {"step", true, Format::float32, 1, &step}};
  for (std::size_t i = 0; i < std::size(streams); ++i) {
    if (!streams[i].present) continue;
    const py::object tensor = state[streams[i].name];
    bound.state[i] = tensor.ptr();
    PyObject* const own = i < 4 ? own_part_of(tensor.ptr(), bound.layout) : tensor.ptr();
    *streams[i].address = bind(own, streams[i].format, streams[i].numel);
  }
  row.step = static_cast<float*>(step);
  row.numel = numel;
  if (bucket.groups.empty() || bucket.groups.back() != group) bucket.groups.push_back(group);
  row.group = static_cast<std::uint32_t>(bucket.groups.size() - 1);
  row.head = head_of(row, recipe);

  if (bucket.rows.empty()) bucket.device = param.device;
  bound.row = static_cast<std::uint32_t>(bucket.rows.size());
  bucket.elements += numel;
  bucket.rows.push_back(row);
}

void Plan::cut_chunks(Bucket& bucket) {
  if (bucket.spec.backend == Backend::external) return;  // Triton cuts its own
  const bool for_cuda = bucket.spec.backend == Backend::cuda;
  bucket.chunk_size = warpstep::cut_chunks(bucket.rows, for_cuda, bucket.chunks, bucket.batches);
}

std::vector<Hyper>& Plan::hypers_for(Bucket& bucket) {
  bucket.hypers.clear();
  for (const std::uint32_t group : bucket.groups) bucket.hypers.push_back(hypers_[group]);
  for (const TensorScalar& scalar : tensor_scalars_) {
    const auto found = std::lower_bound(bucket.groups.begin(), bucket.groups.end(), scalar.group);
    if (found == bucket.groups.end() || *found != scalar.group) continue;
    Hyper& hyper = bucket.hypers[found - bucket.groups.begin()];
    TensorView view;
    tensor_reader().read(scalar.tensor.ptr(), view);
    const bool addressable =
        bucket.device.type != dlpack::cpu && view.device.type == bucket.device.type &&
        view.device.index == bucket.device.index && view.known_format && bytes_of(view.format) >= 4;
    if (addressable) {
      (hyper.*scalar.value).address = view.data;
      hyper.*scalar.kind =
          view.format == Format::float64 ? Scalar::float64_address : Scalar::float32_address;
    } else {
      (hyper.*scalar.value).value = py::float_(scalar.tensor).cast<double>();
    }
  }
  return bucket.hypers;
}

Launch Plan::launch_of(Bucket& bucket, const Tail& tail, const std::vector<Hyper>& hypers) {
  return {bucket.spec.recipe,
          tail,
          bucket.rows.data(),
          bucket.grads.data(),
          static_cast<std::uint32_t>(bucket.rows.size()),
          hypers.data(),
          static_cast<std::uint32_t>(hypers.size()),
          bucket.chunks.data(),
          static_cast<std::uint32_t>(bucket.chunks.size()),
          bucket.chunk_size};
}

const char* Plan::step(py::handle state, py::handle param_groups, int threads, py::object tensors,
                       const StepTail& tail) {
  if (const char* why = check(state, param_groups, threads)) return why;
  const auto expected = static_cast<std::size_t>(tail.expected_grads);
  if (tail.expected_grads >= 0 && count_grads() != expected) {
    return "gradients came or went after their norm was taken";
  }
  launch(threads, std::move(tensors), tail);
  if (tail.expected_grads >= 0) forget_grads();  // a clipping is applied once
  return nullptr;
}

void Plan::keep_alive() {
  keeper_.reserve(6 * params_.size(), params_.size());
  for (const BoundParam& bound : params_) {
    if (bound.assignment < 0) continue;
    keeper_.keep(bound.param);
    for (PyObject* tensor : bound.state) keeper_.keep(tensor);
    if (bound.seen == looks_ && has_grad(bound)) keeper_.keep_grad_of(bound.param);
  }
}

void Plan::let_go() {
  keeper_.clear();
  for (Bucket& bucket : buckets_) bucket.held_grads.clear();
}

bool Plan::is_brief() const {
  std::int64_t elements = 0;
  for (const Bucket& bucket : buckets_) {
    if (bucket.spec.backend == Backend::cpu) elements += bucket.elements;
  }
  return elements <= kBriefElements;
}

void Plan::launch(int threads, py::object tensors, const StepTail& step_tail) {
  struct LetGo {
    Plan& plan;
    ~LetGo() { plan.let_go(); }
  } const at_the_end{*this};
  const bool brief = is_brief();
  // Without handles, incrementing a version counter runs Python; so does reading a tensor's number.
  const bool runs_others = !brief || !tensor_reader().uses_handles() || !tensor_scalars_.empty();
  if (runs_others && keeper_.is_empty()) keep_alive();
  // What is zeroed after all gradients have been read, and those that were only read as copies.
  std::vector<py::object> zeroed_after;
  const bool zeroes_after = step_tail.zero_grads && has_shared_grads();
  if (step_tail.zero_grads) {
    for (const Bucket& bucket : buckets_) {
      zeroed_after.insert(zeroed_after.end(), bucket.copied_from.begin(), bucket.copied_from.end());
    }
  }
  for (const BoundParam& bound : params_) {
    if (zeroes_after && has_grad(bound)) zeroed_after.push_back(gradient_of(bound.param));
  }
  increment_versions(step_tail.zero_grads || step_tail.unscale_grads);

  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    Bucket& bucket = buckets_[i];
    if (bucket.spec.backend == Backend::external) continue;

    Tail tail{};
    tail.has_ema = bucket.spec.ema.has_value();
    tail.ema = bucket.spec.ema.value_or(Format{});
    tail.grads_after = step_tail.zero_grads && !zeroes_after              ? GradsAfter::zeroed
                       : step_tail.unscale_grads && !step_tail.zero_grads ? GradsAfter::unscaled
                                                                          : GradsAfter::kept;
    if (!tensors.is_none()) {
      const py::tuple of_bucket = tensors[py::int_(i)];
      tail.grad_scale = static_cast<const float*>(address_of(of_bucket[0]));
      tail.found_inf = static_cast<const float*>(address_of(of_bucket[1]));
      tail.clip_coef = static_cast<const double*>(address_of(of_bucket[2]));
      tail.statistics = static_cast<double*>(address_of(of_bucket[3]));
    }
    const Launch launch = launch_of(bucket, tail, hypers_for(bucket));
    if (bucket.spec.backend == Backend::cpu) {
      launch_cpu(bucket, launch, threads, brief);
    } else {
      launch_cuda(bucket, launch);
    }
  }
  for (const py::object& grad : zeroed_after) grad.attr("detach")().attr("zero_")();
}

void Plan::launch_cpu(Bucket& bucket, const Launch& launch, int threads, bool is_brief) {
  const auto batches = static_cast<std::uint32_t>(bucket.batches.size() - 1);
  std::optional<py::gil_scoped_release> release;
  if (!is_brief) release.emplace();
  adamw_cpu(launch, bucket.batches.data(), batches, threads);
  ++launch_counts().cpu;
}

void Plan::grad_norm(std::size_t index, Norm kind, int threads, py::handle out) {
  Bucket& bucket = buckets_.at(index);
  double* const norm = static_cast<double*>(address_of(out));
  const Launch launch = launch_of(bucket, {}, {});  // the rule takes no part in it
  if (bucket.spec.backend == Backend::cpu) {
    py::gil_scoped_release release;
    norm[0] = grad_norm_cpu(kind, launch, norm + 2, threads);
  } else {
    grad_norm_cuda(bucket, launch, kind, norm);
  }
}

std::vector<std::uint32_t> Plan::chunk_counts(std::size_t index) const {
  std::vector<std::uint32_t> counts;
  for (const TensorRow& row : buckets_.at(index).rows) counts.push_back(row.chunks);
  return counts;
}

namespace {

void check_cuda(int error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + cuda_error_text(error));
}

CudaTables tables_at(const DeviceTables& at) {
  return {reinterpret_cast<const void*>(at.rows), reinterpret_cast<const void*>(at.chunks),
          reinterpret_cast<void*>(at.arrivals)};
}

}  // namespace

void Plan::launch_cuda(Bucket& bucket, const Launch& launch) {
  const dlpack::Device device = bucket.device;
  void* stream = tensor_reader().current_stream(device);
  const CudaTables tables = tables_at(bucket.device_tables);
  const CudaResult result = adamw_cuda(launch, tables, device.index, stream);
  launch_counts().cuda += result.launches;
  check_cuda(result.error);
}

void Plan::grad_norm_cuda(Bucket& bucket, const Launch& launch, Norm kind, double* out) {
  void* stream = tensor_reader().current_stream(bucket.device);
  const CudaResult result = warpstep::grad_norm_cuda(kind, launch, tables_at(bucket.device_tables),
                                                     out, bucket.device.index, stream);
  launch_counts().cuda += result.launches;
  check_cuda(result.error);
}

bool Plan::has_grad(const BoundParam& bound) const {
  return bound.assignment >= 0 && buckets_[bound.assignment].grads[bound.row] != nullptr;
}

py::list Plan::copied_grads() const {
  py::list pairs;
  for (const Bucket& bucket : buckets_) {
    for (std::size_t i = 0; i < bucket.copied_grads.size(); ++i) {
      pairs.append(py::make_tuple(bucket.copied_from[i], bucket.copied_grads[i]));
    }
  }
  return pairs;
}

void Plan::increment_versions(bool grads_too) {
  const TensorReader& reader = tensor_reader();
  for (const BoundParam& bound : params_) {
    if (!has_grad(bound)) continue;
    reader.increment_version(bound.param);
    if (grads_too) reader.increment_grad_version(bound.param);
  }
}

py::dict Plan::host_tables(std::size_t index) const {
  const Bucket& bucket = buckets_.at(index);
  py::dict tables;
  tables["rows"] = bytes_of_table(bucket.rows);
  tables["chunks"] = bytes_of_table(bucket.chunks);
  tables["arrivals"] = py::bytes(std::string(bucket.rows.size() * sizeof(std::uint32_t), '\0'));
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

int Plan::traverse(visitproc visit, void* arg) const {
  const auto visit_all = [&](const std::vector<py::object>& objects) {
    for (const py::object& object : objects) Py_VISIT(object.ptr());
    return 0;
  };
  Py_VISIT(names_.ptr());
  Py_VISIT(match_layout_.ptr());
  for (const BoundGroup& group : groups_) {
    for (const py::object& flag : group.flags) Py_VISIT(flag.ptr());
    if (const int stop = visit_all(group.kept)) return stop;
  }
  for (const BoundParam& bound : params_) {
    Py_VISIT(bound.layout.mesh.ptr());
    Py_VISIT(bound.layout.placements.ptr());
  }
  for (const Bucket& bucket : buckets_) {
    for (const auto* grads : {&bucket.held_grads, &bucket.copied_grads, &bucket.copied_from}) {
      if (const int stop = visit_all(*grads)) return stop;
    }
  }
  for (const auto* grads : {&gathered_, &remembered_}) {
    for (const RememberedGrad& remembered : *grads) {
      Py_VISIT(remembered.param.ptr());
      Py_VISIT(remembered.grad.ptr());
    }
  }
  return 0;
}

// Objects are let go of last: what that sets off finds a plan that is stale.
void Plan::clear() {
  const auto groups = std::move(groups_);
  const auto params = std::move(params_);
  const auto buckets = std::move(buckets_);
  const auto gathered = std::move(gathered_);
  const auto remembered = std::move(remembered_);
  groups_.clear();
  params_.clear();
  buckets_.clear();
  gathered_.clear();
  remembered_.clear();
  states_.clear();
  names_ = py::list();
  match_layout_ = py::none();
  keeper_.clear();
}

}  // namespace warpstep
