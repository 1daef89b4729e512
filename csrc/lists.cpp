// Gathering, checking and launching lists of tensors: see lists.h.
#include "lists.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "cpu/launch.h"
#include "walkable.h"

namespace warpstep {
namespace {

// The address of a float32 tensor of one element on `device`; null for None, or false.
bool read_float(py::handle object, dlpack::Device device, const float*& address) {
  address = nullptr;
  if (object.is_none()) return true;
  TensorView view;
  if (!tensor_reader().read(object.ptr(), view) || !view.known_format || view.is_complex ||
      view.format != Format::float32 || view.numel() != 1 || view.device != device) {
    return false;
  }
  address = static_cast<const float*>(view.data);
  return address != nullptr;
}

// A number, or where on `device` it stands; or why not.
const char* read_lr(py::handle lr, dlpack::Device device, Hyper& hyper) {
  TensorView view;
  if (!PyFloat_Check(lr.ptr()) && !PyLong_Check(lr.ptr()) && tensor_reader().read(lr.ptr(), view) &&
      view.device.type != dlpack::cpu) {
    if (view.device != device) return "lr is on another device";
    if (!point_to(hyper, kLr, view, device)) return "lr on a device is not one float32 or float64";
    return nullptr;
  }
  hyper.numbers[kLr].value = py::float_(py::reinterpret_borrow<py::object>(lr)).cast<double>();
  return nullptr;
}

// NOTE [letting go of the GIL]
// A brief launch keeps the GIL, because owning its tensors costs as much as it does; but not where
// it has few of them: a chunk of an offloaded optimizer's, say, that one thread steps while another
// runs the backward pass. From so many elements a tensor on, owning is a hundredth of the step; and
// of fewer in all, taking the GIL again may cost more than was won.
constexpr std::int64_t kElementsOfTensor = std::int64_t{1} << 15;
constexpr std::int64_t kElementsOfAll = std::int64_t{1} << 17;
bool is_worth_letting_go(std::int64_t elements, const std::vector<Bucket>& buckets) {
  std::int64_t tensors = 0;
  for (const Bucket& bucket : buckets) tensors += static_cast<std::int64_t>(bucket.rows.size());
  return elements >= std::max(kElementsOfAll, tensors * kElementsOfTensor);
}

std::size_t size_of(PyObject* list) { return static_cast<std::size_t>(PyList_GET_SIZE(list)); }

// Whether one address is there twice. Those of tensors that were made in turn ascend.
bool has_same(std::vector<const float*>& addresses) {
  const std::less_equal<const float*> not_after;
  const auto ascend = [&] {
    return std::adjacent_find(addresses.begin(), addresses.end(),
                              [&](auto a, auto b) { return not_after(b, a); }) == addresses.end();
  };
  if (ascend()) return false;
  std::sort(addresses.begin(), addresses.end());
  return !ascend();
}

// How an operand is stored whose memory has a format.
Format stored_as(std::uint32_t operand, Format format, const TensorLists& lists,
                 const ListOptions& options) {
  if (format != Format::uint8 && format != Format::bfloat16) return format;
  const bool is_moment = operand >= kMoment && operand < kMomentEnd;
  // AdamW's moments after the first: never negative, and slow to decay.
  const bool is_square = is_moment && operand != kMoment && options.rule == RuleId::adamw;
  if (format == Format::uint8) {
    return is_square ? Format::ue5m3 : is_moment ? Format::e4m3 : format;
  }
  const bool has_master = lists.of[kResidual] != nullptr;
  const bool at_random = (operand == kParam && options.stochastic_params && !has_master) ||
                         (is_square && options.stochastic_squares);
  return at_random ? Format::bfloat16_stochastic : format;
}

}  // namespace

const char* ListStepper::gather(const TensorLists& lists, const ListOptions& options,
                                std::vector<Bucket>& buckets) const {
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(lists.of[kParam]));
  bool same = true;
  for (PyObject* list : lists.of) same &= list == nullptr || size_of(list) == count;
  same &= options.param_indices.empty() || options.param_indices.size() == count;
  same &= options.first_elements.empty() || options.first_elements.size() == count;
  // SGD, whose steps are alike but for a first one with dampening, does without counters.
  const bool counts = size_of(lists.state_steps) != 0 || options.rule != RuleId::sgd;
  if (!same || (counts && size_of(lists.state_steps) != count)) return "lists of different lengths";
  const TensorReader& reader = tensor_reader();
  const auto readable = [&](PyObject* object, TensorView& view) {
    return (options.dispatched || is_torchs_own(object)) && reader.read(object, view);
  };
  static std::uint64_t nothing;  // what a tensor without elements has as its gradient
  std::size_t last = 0;          // the bucket of the tensor before
  std::vector<const float*> counters;
  dlpack::Device device{};  // the first tensor's
  for (std::size_t i = 0; i < count; ++i) {
    TensorView param;
    if (!readable(PyList_GET_ITEM(lists.of[kParam], i), param))
      return "a tensor of a subclass, or without strides";
    if (i == 0) device = param.device;
    const std::int64_t numel = param.numel();
    if (!is_dense(param)) return "gaps in memory";

    TensorRow row{};
    void* grad = nullptr;
    RecipeKey recipe{options.rule, {}};
    bool draws = false, in_blocks = false;
    for (std::uint32_t k = 0; k < kOperands; ++k) {
      if (lists.of[k] == nullptr) continue;
      PyObject* const object = PyList_GET_ITEM(lists.of[k], i);
      TensorView view = param;
      if (k != kParam && !readable(object, view)) {
        return "a tensor of a subclass, or without strides";
      }
      if (!view.known_format) return "no kernel for the dtypes";
      const bool is_scale = k >= kScale && k < kScaleEnd;
      if (is_scale && !is_in_blocks(recipe.formats[k - kScale + kMoment])) {
        if (view.numel() != 0) return "scales of a moment that has none";
        continue;
      }
      if (view.device != device) return "several devices";
      if (is_scale) {
        if (view.is_complex || view.numel() != elements_of(k, numel) || !view.is_contiguous()) {
          return "scales that do not fit";
        }
      } else if (view.ndim != param.ndim || view.is_complex != param.is_complex ||
                 !view.has_shape(param.shape)) {
        return "shapes that differ";
      } else if (!view.has_strides(param.strides)) {
        return "strides that differ";
      }
      if (!options.dispatched && is_lazy(object, view, numel)) return "a lazy tensor";
      if (view.data == nullptr && numel != 0) return "memory that was freed";
      const Format format = stored_as(k, view.format, lists, options);
      if (k == kCopy && param.format != Format::float32) return "no kernel for the dtypes";
      if (format != view.format) {
        draws |= is_stochastic(format);
        in_blocks |= is_in_blocks(format);
      }
      recipe.formats[k] = format;
      (k == kGrad ? grad : row.operands[k]) = view.data;
    }
    if (counts) {
      TensorView step;
      if (!readable(PyList_GET_ITEM(lists.state_steps, i), step))
        return "a tensor of a subclass, or without strides";
      if (!step.known_format || step.is_complex || step.format != Format::float32 ||
          step.numel() != 1 || step.device != device || step.data == nullptr) {
        return "a step that is not one float32 on the device";
      }
      row.step = static_cast<float*>(step.data);
      if (options.advance_steps) counters.push_back(row.step);
    }
    if (draws && !counts) return "random bits, which are a function of the step, without steps";
    row.numel = numel;
    row.number =
        options.param_indices.empty() ? static_cast<std::uint32_t>(i) : options.param_indices[i];
    row.first = options.first_elements.empty() ? 0 : options.first_elements[i];
    if (in_blocks && row.first % kBlock != 0) return "a range that begins within a block";

    while (last < buckets.size() && !(buckets[last].recipe == recipe)) ++last;
    if (last == buckets.size()) {
      last = 0;
      while (last < buckets.size() && !(buckets[last].recipe == recipe)) ++last;
    }
    if (last == buckets.size()) {
      if (!has_cpu_recipe(recipe)) return "no kernel for the dtypes";
      buckets.emplace_back().recipe = recipe;
      buckets.back().device = device;
      buckets.back().seed = options.seed;
      buckets.back().rows.reserve(count - i);
      buckets.back().grads.reserve(count - i);
    }
    buckets[last].add(row, numel == 0 ? &nothing : grad);
  }
  return has_same(counters) ? "a step that several tensors share" : nullptr;
}

// Tells autograd what will be written.
void ListStepper::count_writes(const TensorLists& lists, const ListOptions& options,
                               const Tail& tail) {
  const auto count = [](PyObject* list) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      tensor_reader().increment_version(PyList_GET_ITEM(list, i));
    }
  };
  for (std::uint32_t k = 0; k < kOperands; ++k) {
    const bool is_written = k != kGrad || tail.grads_after != GradsAfter::kept;
    if (lists.of[k] != nullptr && is_written) count(lists.of[k]);
  }
  if (options.advance_steps) count(lists.state_steps);
}

const char* ListStepper::step(const TensorLists& lists, py::handle lr, py::handle grad_scale,
                              py::handle found_inf, ListOptions& options) {
  std::vector<Bucket> buckets;
  if (const char* why = gather(lists, options, buckets)) return why;
  if (buckets.empty()) return nullptr;
  const dlpack::Device device = buckets.front().device;
  // The tests' build runs the CUDA source on the CPU.
  if (!options.cuda && device.type != dlpack::cpu) return "no kernel for the device";
  if (const char* why = read_lr(lr, device, options.hyper)) return why;
  Tail tail{};
  if (!read_float(grad_scale, device, tail.grad_scale))
    return "a grad_scale that is not one float32 on the device";
  if (!read_float(found_inf, device, tail.found_inf))
    return "a found_inf that is not one float32 on the device";
  tail.steps_advanced = !options.advance_steps;
  if (options.unscale_grads && tail.grad_scale != nullptr)
    tail.grads_after = GradsAfter::unscaled_if_taken;

  for (Bucket& bucket : buckets) bucket.cut(options.cuda);
  if (options.cuda) return launch_cuda(lists, buckets, options, tail);
  std::int64_t elements = 0;
  for (const Bucket& bucket : buckets) elements += bucket.elements;
  const bool keeps_gil = elements <= kBriefElements && !is_worth_letting_go(elements, buckets);
  Keeper keeper;  // other threads may change the lists
  if (!keeps_gil || !tensor_reader().uses_handles()) {
    const auto keep = [&](PyObject* list) {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) keeper.keep(PyList_GET_ITEM(list, i));
    };
    for (PyObject* list : lists.of) {
      if (list != nullptr) keep(list);
    }
    keep(lists.state_steps);
  }
  if (options.count_writes) count_writes(lists, options, tail);
  std::optional<py::gil_scoped_release> release;
  if (!keeps_gil) release.emplace();
  for (const Bucket& bucket : buckets) {
    step_on_cpu(bucket, bucket.launch_of(tail, &options.hyper, 1), options.threads);
  }
  return nullptr;
}

const char* ListStepper::launch_cuda(const TensorLists& lists, const std::vector<Bucket>& buckets,
                                     const ListOptions& options, const Tail& tail) {
  using Upload = ResidentTables::Upload;
  void* const stream = tensor_reader().current_stream(buckets.front().device);
  const bool capturing = cuda_is_capturing(stream);
  const Upload upload = capturing        ? Upload::never
                        : options.always ? Upload::always
                                         : Upload::worthwhile;
  std::vector<std::shared_ptr<ResidentTables::Resident>> residents;
  for (const Bucket& bucket : buckets) {
    residents.push_back(tables_.get(bucket, stream, upload));
    if (residents.back() == nullptr) {
      return capturing ? "a graph capture before such a step was taken eagerly"
                       : "tensors that lie elsewhere at each step";
    }
  }
  if (options.count_writes) count_writes(lists, options, tail);
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    tables_.use(*residents[i], stream, capturing);
    const Launch launch = buckets[i].launch_of(tail, &options.hyper, 1);
    step_on_cuda(buckets[i], launch, residents[i]->at, stream);
  }
  return nullptr;
}

}  // namespace warpstep
