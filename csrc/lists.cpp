// Gathering, checking and launching lists of tensors: see lists.h.
#include "lists.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "cpu/launch.h"
#include "current_device.h"
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

// Reads the tensors of lists into the rows of buckets, one after the other. Each function returns
// null, or why kernels cannot take the lists as they are.
class Gathering {
 public:
  Gathering(const TensorLists& lists, const ListOptions& options, std::vector<Bucket>& buckets)
      : lists_(lists),
        options_(options),
        buckets_(buckets),
        count_(size_of(lists.of[kParam])),
        // SGD, whose steps are alike but for a first one with dampening, does without counters.
        counts_(size_of(lists.state_steps) != 0 || options.rule != RuleId::sgd) {}

  const char* run() {
    if (!are_of_one_length()) return "lists of different lengths";
    static std::uint64_t nothing;  // what a tensor without elements has as its gradient
    for (std::size_t i = 0; i < count_; ++i) {
      Entry entry{{}, nullptr, {options_.rule, {}}, false, false};
      if (const char* why = read_operands(i, entry)) return why;
      if (const char* why = counts_ ? read_counter(i, entry.row) : nullptr) return why;
      if (entry.draws && !counts_) {
        return "random bits, which are a function of the step, without steps";
      }
      const auto& numbers = options_.param_indices;
      entry.row.number = numbers.empty() ? static_cast<std::uint32_t>(i) : numbers[i];
      entry.row.first = options_.first_elements.empty() ? 0 : options_.first_elements[i];
      if (entry.in_blocks && entry.row.first % kBlock != 0) return "a range that begins in a block";
      Bucket* const bucket = bucket_for(entry.recipe, count_ - i);
      if (bucket == nullptr) return "no kernel for the dtypes";
      bucket->add(entry.row, entry.row.numel == 0 ? &nothing : entry.grad);
    }
    return has_same(counters_) ? "a step that several tensors share" : nullptr;
  }

 private:
  // What one tensor has.
  struct Entry {
    TensorRow row;
    void* grad;
    RecipeKey recipe;
    bool draws, in_blocks;  // whether any operand does, or is
  };

  bool are_of_one_length() const {
    bool same = !counts_ || size_of(lists_.state_steps) == count_;
    for (PyObject* list : lists_.of) same &= list == nullptr || size_of(list) == count_;
    same &= options_.param_indices.empty() || options_.param_indices.size() == count_;
    return same && (options_.first_elements.empty() || options_.first_elements.size() == count_);
  }

  const char* read(PyObject* object, TensorView& view) const {
    const bool readable =
        (options_.dispatched || is_torchs_own(object)) && tensor_reader().read(object, view);
    return readable ? nullptr : "a tensor of a subclass, or without strides";
  }

  const char* read_operands(std::size_t i, Entry& entry) {
    TensorView param;
    if (const char* why = read(PyList_GET_ITEM(lists_.of[kParam], i), param)) return why;
    if (i == 0) device_ = param.device;
    if (!is_dense(param)) return "gaps in memory";
    entry.row.numel = param.numel();
    for (std::uint32_t k = 0; k < kOperands; ++k) {
      if (lists_.of[k] == nullptr) continue;
      PyObject* const object = PyList_GET_ITEM(lists_.of[k], i);
      TensorView view = param;
      if (const char* why = k == kParam ? nullptr : read(object, view)) return why;
      if (const char* why = take_operand(k, object, view, param, entry)) return why;
    }
    return nullptr;
  }

  const char* take_operand(std::uint32_t k, PyObject* object, const TensorView& view,
                           const TensorView& param, Entry& entry) const {
    if (!view.known_format) return "no kernel for the dtypes";
    const bool is_scale = k >= kScale && k < kScaleEnd;
    if (is_scale && !is_in_blocks(entry.recipe.formats[k - kScale + kMoment])) {
      return view.numel() != 0 ? "scales of a moment that has none" : nullptr;
    }
    if (view.device != device_) return "several devices";
    const std::int64_t numel = entry.row.numel;
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
    if (!options_.dispatched && is_lazy(object, view, numel)) return "a lazy tensor";
    if (view.data == nullptr && numel != 0) return "memory that was freed";
    if (k == kCopy && param.format != Format::float32) return "no kernel for the dtypes";
    const Format format = stored_as(k, view.format, lists_, options_);
    if (format != view.format) {
      entry.draws |= is_stochastic(format);
      entry.in_blocks |= is_in_blocks(format);
    }
    entry.recipe.formats[k] = format;
    (k == kGrad ? entry.grad : entry.row.operands[k]) = view.data;
    return nullptr;
  }

  const char* read_counter(std::size_t i, TensorRow& row) {
    TensorView step;
    if (const char* why = read(PyList_GET_ITEM(lists_.state_steps, i), step)) return why;
    if (!step.known_format || step.is_complex || step.format != Format::float32 ||
        step.numel() != 1 || step.device != device_ || step.data == nullptr) {
      return "a step that is not one float32 on the device";
    }
    row.step = static_cast<float*>(step.data);
    if (options_.advance_steps) counters_.push_back(row.step);
    return nullptr;
  }

  // The bucket of a recipe, with room for `room` tensors where it is new; null without a kernel.
  Bucket* bucket_for(const RecipeKey& recipe, std::size_t room) {
    const auto is_it = [&](const Bucket& bucket) { return bucket.recipe == recipe; };
    if (last_ < buckets_.size() && is_it(buckets_[last_])) return &buckets_[last_];
    const auto found = std::find_if(buckets_.begin(), buckets_.end(), is_it);
    last_ = static_cast<std::size_t>(found - buckets_.begin());
    if (found != buckets_.end()) return &*found;
    if (!has_cpu_recipe(recipe)) return nullptr;
    Bucket& bucket = buckets_.emplace_back();
    bucket.recipe = recipe;
    bucket.device = device_;
    bucket.seed = options_.seed;
    bucket.rows.reserve(room);
    bucket.grads.reserve(room);
    return &bucket;
  }

  const TensorLists& lists_;
  const ListOptions& options_;
  std::vector<Bucket>& buckets_;
  const std::size_t count_;
  const bool counts_;
  std::size_t last_ = 0;     // the bucket of the tensor before
  dlpack::Device device_{};  // the first tensor's
  std::vector<const float*> counters_;
};

}  // namespace

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
  if (const char* why = Gathering(lists, options, buckets).run()) return why;
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
  const OnDevice on(buckets.front().device.index);  // whose capture is asked about, too
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
