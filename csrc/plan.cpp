// Binding, checking and launching: see plan.h.
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "cpu/launch.h"

namespace warpstep {
namespace {

void* address_of(py::handle tensor) {
  TensorView view;
  if (tensor.is_none()) return nullptr;
  if (!tensor_reader().read(tensor.ptr(), view)) throw py::type_error("a tensor has no memory");
  return view.data;
}

}  // namespace

Plan::Plan(py::dict state, py::list param_groups, GroupKeys keys,
           const std::vector<int>& assignments, const std::vector<BucketSpec>& buckets,
           py::object match_layout, const PlanOptions& options)
    : keys_(std::move(keys)),
      as_fused_(options.as_fused),
      match_layout_(std::move(match_layout)),
      grad_name_(options.grad_name),
      watches_masters_(options.watches_masters) {
  for (const BucketSpec& spec : buckets) {
    PlanBucket& bucket = buckets_.emplace_back();
    bucket.backend = spec.backend;
    bucket.recipe = spec.recipe;
    bucket.seed = options.seed;
  }

  std::size_t next = 0;
  for (std::uint32_t g = 0; g < param_groups.size(); ++g) {
    py::dict group = param_groups[g];
    groups_.emplace_back(group, keys_);
    const py::object params = group["params"];
    for (py::handle param : params) {
      BoundParam bound;
      bound.param = param.ptr();
      bound.assignment = assignments.at(next++);
      if (bound.assignment >= 0) {
        TensorRow row{};
        row.group = g;
        row.number = static_cast<std::uint32_t>(next - 1);
        bind_param(state.contains(param) ? py::object(state[param]) : py::dict(),
                   buckets.at(bound.assignment), bound, row, options);
      }
      params_.push_back(bound);
    }
  }
  hypers_.resize(groups_.size());
  for (PlanBucket& bucket : buckets_) {
    // Python cuts external buckets, and its rows name the optimizer's groups.
    if (bucket.backend == Backend::external) {
      bucket.groups.resize(groups_.size());
      std::iota(bucket.groups.begin(), bucket.groups.end(), 0u);
    } else {
      bucket.cut(bucket.backend == Backend::cuda);
    }
  }

  for (auto [param, tensors] : state) {
    const std::size_t first = bound_items_.size();
    if (PyDict_Check(tensors.ptr())) {
      for (auto [name, tensor] : py::reinterpret_borrow<py::dict>(tensors)) {
        kept_.append(name);
        bound_items_.push_back({name.ptr(), tensor.ptr()});
      }
    }
    states_.push_back({param.ptr(), first, bound_items_.size() - first});
  }
}

void Plan::bind_param(py::handle state, const BucketSpec& spec, BoundParam& bound, TensorRow row,
                      const PlanOptions& options) {
  PlanBucket& bucket = buckets_.at(bound.assignment);
  const RecipeKey& recipe = bucket.recipe;
  bound.layout = layout_of(bound.param);
  const auto read = [&](PyObject* tensor, TensorView& view) {
    return tensor != nullptr && tensor_reader().read(tensor, view);
  };
  TensorView param;
  if (!read(own_part_of(bound.param, bound.layout), param)) {
    throw py::type_error("a parameter has no memory");
  }
  bound.is_complex = param.is_complex;
  bound.ndim = param.ndim;
  bound.dims = dims_.size();
  dims_.insert(dims_.end(), param.shape, param.shape + param.ndim);
  dims_.insert(dims_.end(), param.strides, param.strides + param.ndim);

  const auto bind = [&](PyObject* tensor, Format format, std::int64_t numel) {
    TensorView view;
    if (!read(tensor, view) || !view.known_format || view.format != lies_as(format) ||
        view.numel() != numel || view.device != param.device) {
      throw py::type_error("a parameter or its state does not fit its recipe");
    }
    return view.data;
  };
  const std::int64_t numel = param.numel();
  const py::object& master = spec.keys.at(kParam);
  if (!master.is_none()) bound.operands[kParam] = py::object(state[master]).ptr();
  row.operands[kParam] =
      bind(own_part_of(bound.stepped(), bound.layout), recipe.formats[kParam], numel);
  const py::handle object(bound.param);
  for (std::uint32_t i = kMoment; i < kStable; ++i) {
    if (recipe.formats[i] == Format::none) continue;
    const py::object tensor = i == kCopy ? options.copies[object] : state[spec.keys.at(i)];
    if (i == kCopy) kept_.append(tensor);  // no state has it, so nothing compares it
    bound.operands[i] = tensor.ptr();
    row.operands[i] =
        bind(own_part_of(tensor.ptr(), bound.layout), recipe.formats[i], elements_of(i, numel));
  }
  if (options.firsts.contains(object)) row.first = options.firsts[object].cast<std::int64_t>();
  if (bound.operands[kResidual] != nullptr) {
    bound.version = tensor_reader().version_of(bound.param);
  }
  if (!spec.counter.is_none()) {
    const bool is_apart = options.counters.contains(object);
    const py::object counter = is_apart ? options.counters[object] : state[spec.counter];
    if (is_apart) kept_.append(counter);
    bound.counter = counter.ptr();
    row.step = static_cast<float*>(bind(counter.ptr(), Format::float32, 1));
  }
  row.numel = numel;
  if (bucket.groups.empty() || bucket.groups.back() != row.group) {
    bucket.groups.push_back(row.group);
  }
  row.group = static_cast<std::uint32_t>(bucket.groups.size() - 1);
  if (bucket.rows.empty()) bucket.device = param.device;
  bound.row = static_cast<std::uint32_t>(bucket.rows.size());
  bucket.add(row, nullptr);
}

std::vector<Hyper>& Plan::hypers_for(PlanBucket& bucket) {
  bucket.hypers.clear();
  for (const std::uint32_t group : bucket.groups) bucket.hypers.push_back(hypers_[group]);
  for (const TensorNumber& number : tensor_numbers_) {
    const auto found = std::lower_bound(bucket.groups.begin(), bucket.groups.end(), number.group);
    if (found == bucket.groups.end() || *found != number.group) continue;
    set_number(bucket.hypers[found - bucket.groups.begin()], number, bucket.device);
  }
  return bucket.hypers;
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

void Plan::keep_seen_alive(Scope scope) {
  // Of each: the parameter, two moments and a counter, and two more (a residual, an average).
  keeper_.reserve(6 * params_.size(), params_.size());
  for (const BoundParam& bound : params_) {
    if (bound.assignment < 0) continue;
    keeper_.keep(bound.param);
    if (scope == Scope::everything) {
      for (PyObject* tensor : bound.operands) keeper_.keep(tensor);
      keeper_.keep(bound.counter);
    }
    if (bound.seen == looks_ && has_grad(bound)) keeper_.keep_grad_of(bound.param);
  }
}

void Plan::let_go_of_grads() {
  std::vector<py::object> let_go_last;
  for (PlanBucket& bucket : buckets_) {
    for (auto* grads : {&bucket.held_grads, &bucket.copied_grads, &bucket.copied_from}) {
      let_go_last.insert(let_go_last.end(), std::make_move_iterator(grads->begin()),
                         std::make_move_iterator(grads->end()));
      grads->clear();
    }
  }
}

void Plan::let_go() {
  keeper_.clear();
  let_go_of_grads();
  const auto let_go_last = std::move(named_grads_);
  named_grads_.clear();
}

bool Plan::is_brief() const {
  std::int64_t elements = 0;
  for (const PlanBucket& bucket : buckets_) {
    if (bucket.backend == Backend::cpu) elements += bucket.elements;
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
  const bool runs_others = !brief || !tensor_reader().uses_handles() || !tensor_numbers_.empty();
  if (runs_others && keeper_.is_empty()) keep_alive();
  // What is zeroed after all gradients have been read, and those that were only read as copies.
  std::vector<py::object> zeroed_after;
  const bool zeroes_after = step_tail.zero_grads && has_shared_grads();
  if (step_tail.zero_grads) {
    for (const PlanBucket& bucket : buckets_) {
      zeroed_after.insert(zeroed_after.end(), bucket.copied_from.begin(), bucket.copied_from.end());
    }
  }
  for (const BoundParam& bound : params_) {
    if (zeroes_after && has_grad(bound)) zeroed_after.push_back(grad_of(bound));
  }
  GradsAfter grads_after = GradsAfter::kept;
  if (step_tail.zero_grads) {
    if (!zeroes_after) grads_after = GradsAfter::zeroed;
  } else if (step_tail.unscale_grads) {
    grads_after = as_fused_ ? GradsAfter::unscaled_if_taken : GradsAfter::unscaled;
  }
  // What can fail comes before the first write of any bucket; design.md has what is left.
  std::vector<BucketLaunch> launches;
  launches.reserve(buckets_.size());
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    if (buckets_[i].backend == Backend::external) continue;
    launches.push_back(prepare_launch(i, tensors, grads_after));
  }
  increment_versions(step_tail.zero_grads || step_tail.unscale_grads);

  for (const auto& [bucket, launch, stream] : launches) {
    std::optional<py::gil_scoped_release> release;
    if (bucket->backend == Backend::cpu && !brief) release.emplace();
    if (bucket->least != nullptr && !bucket->is_least_shared) {
      launch_least(*bucket, launch, threads, stream);
    }
    if (bucket->backend == Backend::cpu) {
      step_on_cpu(*bucket, launch, threads);
    } else {
      step_on_cuda(*bucket, launch, bucket->tables, stream);
    }
  }
  for (const py::object& grad : zeroed_after) grad.attr("detach")().attr("zero_")();
}

Plan::BucketLaunch Plan::prepare_launch(std::size_t index, const py::object& tensors,
                                        GradsAfter grads_after) {
  PlanBucket& bucket = buckets_[index];
  Tail tail{};
  tail.grads_after = grads_after;
  if (!tensors.is_none()) {
    const py::tuple of_bucket = tensors[py::int_(index)];
    tail.grad_scale = static_cast<const float*>(address_of(of_bucket[0]));
    tail.found_inf = static_cast<const float*>(address_of(of_bucket[1]));
    tail.clip_coef = static_cast<const double*>(address_of(of_bucket[2]));
    tail.statistics = static_cast<double*>(address_of(of_bucket[3]));
  }
  const std::vector<Hyper>& hypers = hypers_for(bucket);
  return {&bucket, bucket.launch_of(tail, hypers.data(), hypers.size()),
          tensor_reader().current_stream(bucket.device)};
}

void Plan::launch_least(const PlanBucket& bucket, const Launch& launch, int threads, void* stream) {
  if (bucket.backend == Backend::cpu) {
    least_magnitudes_cpu(launch, threads);
  } else {
    least_magnitudes_on_cuda(bucket, launch, bucket.tables, stream);
  }
}

void Plan::find_least(std::size_t index, int threads) {
  PlanBucket& bucket = buckets_.at(index);
  const std::vector<Hyper>& hypers = hypers_for(bucket);
  const Launch launch = bucket.launch_of({}, hypers.data(), hypers.size());
  void* const stream = tensor_reader().current_stream(bucket.device);
  std::optional<py::gil_scoped_release> release;
  if (bucket.backend == Backend::cpu) release.emplace();
  launch_least(bucket, launch, threads, stream);
}

void Plan::set_least(std::size_t index, std::uintptr_t least, bool shared) {
  PlanBucket& bucket = buckets_.at(index);
  bucket.least = reinterpret_cast<double*>(least);
  bucket.is_least_shared = shared;
}

void Plan::grad_norm(std::size_t index, Norm kind, int threads, py::handle out) {
  const PlanBucket& bucket = buckets_.at(index);
  double* const norm = static_cast<double*>(address_of(out));
  if (bucket.backend == Backend::cpu) {
    const Launch launch = bucket.launch_of({}, nullptr, 0);  // the rule takes no part in it
    py::gil_scoped_release release;
    norm[0] = grad_norm_cpu(kind, launch, norm + 2, threads);
  } else {
    void* const stream = tensor_reader().current_stream(bucket.device);
    grad_norm_on_cuda(bucket, kind, bucket.tables, norm, stream);
  }
}

std::vector<std::uint32_t> Plan::chunk_counts(std::size_t index) const {
  std::vector<std::uint32_t> counts;
  for (const TensorRow& row : buckets_.at(index).rows) counts.push_back(row.chunks);
  return counts;
}

bool Plan::has_grad(const BoundParam& bound) const {
  return bound.assignment >= 0 && buckets_[bound.assignment].grads[bound.row] != nullptr;
}

py::list Plan::copied_grads() const {
  py::list pairs;
  for (const PlanBucket& bucket : buckets_) {
    for (std::size_t i = 0; i < bucket.copied_grads.size(); ++i) {
      pairs.append(py::make_tuple(bucket.copied_from[i], bucket.copied_grads[i]));
    }
  }
  return pairs;
}

void Plan::increment_versions(bool grads_too) {
  const TensorReader& reader = tensor_reader();
  for (BoundParam& bound : params_) {
    if (!has_grad(bound)) continue;
    if (as_fused_) {
      if (bound.counter != nullptr) reader.increment_version(bound.counter);
      continue;
    }
    reader.increment_version(bound.param);
    if (grads_too && grad_name_.is_none()) reader.increment_grad_version(bound.param);
    if (grads_too && !grad_name_.is_none()) reader.increment_version(grad_of(bound).ptr());
    if (bound.operands[kResidual] != nullptr) bound.version = reader.version_of(bound.param);
  }
}

py::dict Plan::host_tables(std::size_t index) const {
  const HostTables host = warpstep::host_tables(buckets_.at(index));
  py::dict tables;
  tables["rows"] = host.rows;
  tables["chunks"] = host.chunks;
  tables["arrivals"] = host.arrivals;
  return tables;
}

void Plan::set_device_tables(std::size_t index, const CudaTables& tables) {
  buckets_.at(index).tables = tables;
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
  Py_VISIT(kept_.ptr());
  Py_VISIT(match_layout_.ptr());
  for (const BoundGroup& group : groups_) {
    if (const int stop = group.traverse(visit, arg)) return stop;
  }
  for (const BoundParam& bound : params_) {
    Py_VISIT(bound.layout.mesh.ptr());
    Py_VISIT(bound.layout.placements.ptr());
  }
  for (const PlanBucket& bucket : buckets_) {
    for (const auto* grads : {&bucket.held_grads, &bucket.copied_grads, &bucket.copied_from}) {
      if (const int stop = visit_all(*grads)) return stop;
    }
  }
  if (const int stop = visit_all(named_grads_)) return stop;
  for (const TensorNumber& number : tensor_numbers_) Py_VISIT(number.tensor.ptr());
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
  const auto named_grads = std::move(named_grads_);
  const auto numbers = std::move(tensor_numbers_);
  groups_.clear();
  params_.clear();
  buckets_.clear();
  gathered_.clear();
  remembered_.clear();
  named_grads_.clear();
  tensor_numbers_.clear();
  states_.clear();
  kept_ = py::list();
  match_layout_ = py::none();
  keeper_.clear();
}

}  // namespace warpstep
