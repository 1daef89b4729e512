// Gathering, checking and launching lists of tensors: see lists.h.
#include "lists.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "adamw_cpu.h"
#include "adamw_cuda.h"
#include "chunks.h"
#include "plan.h"

namespace warpstep {
namespace {

PyObject* type_named(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

bool is_torchs_own(PyObject* object) {
  static PyObject* const tensor = type_named("torch", "Tensor");
  static PyObject* const parameter = type_named("torch.nn", "Parameter");
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == tensor || type == parameter;
}

// Lazily negated or conjugated: its memory holds other numbers. Strides betray such views of more
// than one real number; the others are asked.
bool is_lazy(PyObject* object, const TensorView& view, std::int64_t numel) {
  if (!view.is_complex && numel != 1) return false;
  const py::handle tensor(object);
  return tensor.attr("is_neg")().cast<bool>() || tensor.attr("is_conj")().cast<bool>();
}

// Whether the elements fill a run of memory, in any order of dimensions, none twice.
bool is_dense(const TensorView& view) {
  std::int64_t expected = 1;
  std::int32_t i = view.ndim - 1;
  for (; i >= 0; --i) {
    if (view.shape[i] == 1) continue;
    if (view.strides[i] != expected) break;
    expected *= view.shape[i];
  }
  if (i < 0) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 0) return true;
    if (view.shape[i] != 1) dims.emplace_back(view.strides[i], view.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool on_device(const TensorView& view, dlpack::Device device) {
  return view.device.type == device.type && view.device.index == device.index;
}

// The address of a float32 tensor of one element on `device`; null for None, or false.
bool read_float(py::handle object, dlpack::Device device, const float*& address) {
  address = nullptr;
  if (object.is_none()) return true;
  TensorView view;
  if (!tensor_reader().read(object.ptr(), view) || !view.known_format || view.is_complex ||
      view.format != Format::float32 || view.numel() != 1 || !on_device(view, device)) {
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
    if (!on_device(view, device)) return "lr is on another device";
    if (view.numel() != 1 || view.is_complex || !view.known_format || bytes_of(view.format) < 4 ||
        view.data == nullptr) {
      return "lr on a device is not one float32 or float64";
    }
    hyper.lr.address = view.data;
    hyper.lr_kind =
        view.format == Format::float64 ? Scalar::float64_address : Scalar::float32_address;
    return nullptr;
  }
  hyper.lr.value = py::float_(py::reinterpret_borrow<py::object>(lr)).cast<double>();
  return nullptr;
}

}  // namespace

const char* ListStepper::gather(const TensorLists& lists, const ListOptions& options,
                                std::vector<Bucket>& buckets, dlpack::Device& device) const {
  const std::size_t count = lists.params.size();
  if (lists.grads.size() != count || lists.exp_avgs.size() != count ||
      lists.exp_avg_sqs.size() != count || lists.state_steps.size() != count ||
      (options.amsgrad && lists.max_exp_avg_sqs.size() != count)) {
    return "lists of different lengths";
  }
  const TensorReader& reader = tensor_reader();
  const auto readable = [&](PyObject* object, TensorView& view) {
    return (options.dispatched || is_torchs_own(object)) && reader.read(object, view);
  };
  static std::uint64_t nothing;  // what a tensor without elements has as its gradient
  std::size_t last = 0;          // the bucket of the tensor before
  for (std::size_t i = 0; i < count; ++i) {
    TensorView param;
    if (!readable(PyList_GET_ITEM(lists.params.ptr(), i), param))
      return "a tensor of a subclass, or without strides";
    if (i == 0) device = param.device;
    const std::int64_t numel = param.numel();
    if (!is_dense(param)) return "gaps in memory";

    // One loop would do for all streams; the formats that they must have differ.
    PyObject* const objects[] = {
        PyList_GET_ITEM(lists.params.ptr(), i), PyList_GET_ITEM(lists.grads.ptr(), i),
        PyList_GET_ITEM(lists.exp_avgs.ptr(), i), PyList_GET_ITEM(lists.exp_avg_sqs.ptr(), i),
        options.amsgrad ? PyList_GET_ITEM(lists.max_exp_avg_sqs.ptr(), i) : nullptr};
    void* data[5] = {};
    Format formats[5] = {};
    for (int k = 0; k < 5 && objects[k] != nullptr; ++k) {
      TensorView view = param;
      if (k > 0 && !readable(objects[k], view)) return "a tensor of a subclass, or without strides";
      if (!view.known_format) return "no kernel for the dtypes";
      if (!on_device(view, device)) return "several devices";
      if (view.ndim != param.ndim || view.is_complex != param.is_complex)
        return "shapes that differ";
      for (std::int32_t d = 0; d < param.ndim; ++d) {
        if (view.shape[d] != param.shape[d]) return "shapes that differ";
        if (view.strides[d] != param.strides[d] && param.shape[d] != 1 && numel != 0) {
          return "strides that differ";
        }
      }
      if (!options.dispatched && is_lazy(objects[k], view, numel)) return "a lazy tensor";
      if (view.data == nullptr && numel != 0) return "memory that was freed";
      data[k] = view.data;
      formats[k] = view.format;
    }
    if (formats[3] != formats[2] || (options.amsgrad && formats[4] != formats[2])) {
      return "no kernel for the dtypes";
    }

    TensorRow row{};
    row.param = data[0];
    row.exp_avg = data[2];
    row.exp_avg_sq = data[3];
    row.max_exp_avg_sq = data[4];
    TensorView step;
    if (!readable(PyList_GET_ITEM(lists.state_steps.ptr(), i), step))
      return "a tensor of a subclass, or without strides";
    if (!step.known_format || step.is_complex || step.format != Format::float32 ||
        step.numel() != 1 || !on_device(step, device) || step.data == nullptr) {
      return "a step that is not one float32 on the device";
    }
    row.step = static_cast<float*>(step.data);
    row.numel = numel;

    const RecipeKey recipe{formats[0], formats[1], formats[2], options.amsgrad};
    while (last < buckets.size() && !(buckets[last].recipe == recipe)) ++last;
    if (last == buckets.size()) {
      last = 0;
      while (last < buckets.size() && !(buckets[last].recipe == recipe)) ++last;
    }
    if (last == buckets.size()) {
      if (!has_cpu_recipe(recipe)) return "no kernel for the dtypes";
      buckets.emplace_back().recipe = recipe;
      buckets.back().rows.reserve(count - i);
      buckets.back().grads.reserve(count - i);
    }
    Bucket& bucket = buckets[last];
    // Found here where it is found at no cost: several rows would advance one counter.
    if (options.advance_steps && !bucket.rows.empty() && bucket.rows.back().step == row.step) {
      return "a step that several tensors share";
    }
    row.head = head_of(row, recipe);
    bucket.rows.push_back(row);
    bucket.grads.push_back(numel == 0 ? &nothing : data[1]);
  }
  return nullptr;
}

// Tells autograd what will be written.
void ListStepper::count_writes(const TensorLists& lists, const ListOptions& options,
                               const Tail& tail) {
  const auto count = [](const py::list& list) {
    for (py::handle tensor : list) tensor_reader().increment_version(tensor.ptr());
  };
  count(lists.params);
  count(lists.exp_avgs);
  count(lists.exp_avg_sqs);
  if (options.amsgrad) count(lists.max_exp_avg_sqs);
  if (options.advance_steps) count(lists.state_steps);
  if (tail.grads_after != GradsAfter::kept) count(lists.grads);
}

const char* ListStepper::step(const TensorLists& lists, py::handle lr, py::handle grad_scale,
                              py::handle found_inf, ListOptions options) {
  std::vector<Bucket> buckets;
  dlpack::Device device{};
  if (const char* why = gather(lists, options, buckets, device)) return why;
  if (buckets.empty()) return nullptr;
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

  for (Bucket& bucket : buckets) {
    bucket.chunk_size = cut_chunks(bucket.rows, options.cuda, bucket.chunks, bucket.batches);
  }
  if (options.cuda) return launch_cuda(lists, buckets, options, tail, device);
  std::int64_t elements = 0;
  for (const Bucket& bucket : buckets) {
    for (const TensorRow& row : bucket.rows) elements += row.numel;
  }
  const bool is_brief = elements <= kBriefElements;
  Keeper keeper;  // other threads may change the lists
  if (!is_brief || !tensor_reader().uses_handles()) {
    for (const py::list& list : {lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs,
                                 lists.max_exp_avg_sqs, lists.state_steps}) {
      for (py::handle tensor : list) keeper.keep(tensor.ptr());
    }
  }
  if (options.count_writes) count_writes(lists, options, tail);
  std::optional<py::gil_scoped_release> release;
  if (!is_brief) release.emplace();
  for (const Bucket& bucket : buckets) {
    const Launch launch{bucket.recipe,
                        tail,
                        bucket.rows.data(),
                        bucket.grads.data(),
                        static_cast<std::uint32_t>(bucket.rows.size()),
                        &options.hyper,
                        1,
                        bucket.chunks.data(),
                        static_cast<std::uint32_t>(bucket.chunks.size()),
                        bucket.chunk_size};
    adamw_cpu(launch, bucket.batches.data(), static_cast<std::uint32_t>(bucket.batches.size() - 1),
              options.threads);
    ++launch_counts().cpu;
  }
  return nullptr;
}

namespace {

// NOTE [device tables of lists]
// The tables of lists that come again are kept on the device, up to so many bytes; whole tables are
// compared, so an address that is used anew for another tensor cannot be mistaken. Where parameters
// lie elsewhere at each step (gathered anew, say), uploading would cost more than the launch saves:
// after so many calls without one that came again, only lists that come twice are uploaded.
constexpr std::uint32_t kPatience = 64;

template <class T>
py::bytes bytes_of_table(const std::vector<T>& table) {
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T));
}

bool same_rows(const std::vector<TensorRow>& a, const std::vector<TensorRow>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(TensorRow)) == 0;
}

}  // namespace

std::shared_ptr<ListStepper::Resident> ListStepper::find(const Bucket& bucket,
                                                         dlpack::Device device) {
  for (const std::shared_ptr<Resident>& resident : residents_) {
    if (resident->device.index == device.index && resident->recipe == bucket.recipe &&
        same_rows(resident->rows, bucket.rows)) {
      resident->used = ++clock_;
      return resident;
    }
  }
  return nullptr;
}

bool ListStepper::is_seen_again(const Bucket& bucket) {
  if (misses_ < kPatience) {
    ++misses_;
    return true;
  }
  const bool again = same_rows(missed_, bucket.rows);
  missed_ = bucket.rows;
  return again;
}

std::shared_ptr<ListStepper::Resident> ListStepper::make_resident(const Bucket& bucket,
                                                                  dlpack::Device device) {
  const py::tuple uploaded =
      upload_(device.index, bytes_of_table(bucket.rows), bytes_of_table(bucket.chunks),
              py::bytes(std::string(bucket.rows.size() * sizeof(std::uint32_t), '\0')));
  auto resident = std::make_shared<Resident>();
  resident->device = device;
  resident->recipe = bucket.recipe;
  resident->rows = bucket.rows;
  resident->bytes = bucket.rows.size() * (sizeof(TensorRow) + sizeof(std::uint32_t)) +
                    bucket.chunks.size() * sizeof(Chunk);
  resident->tables = uploaded[0];
  resident->rows_at = uploaded[1].cast<std::uintptr_t>();
  resident->chunks_at = uploaded[2].cast<std::uintptr_t>();
  resident->arrivals_at = uploaded[3].cast<std::uintptr_t>();
  resident->used = ++clock_;
  residents_.push_back(resident);

  const auto freeable = [](const std::shared_ptr<Resident>& r) { return !r->captured; };
  for (;;) {
    std::size_t bytes = 0;
    auto oldest = residents_.end();
    for (auto it = residents_.begin(); it != residents_.end(); ++it) {
      if (!freeable(*it)) continue;
      bytes += (*it)->bytes;
      if (oldest == residents_.end() || (*it)->used < (*oldest)->used) oldest = it;
    }
    if (bytes <= resident_bytes_ || *oldest == resident) return resident;
    const std::shared_ptr<Resident> evicted = *oldest;  // freed after the list has been changed
    residents_.erase(oldest);
  }
}

const char* ListStepper::launch_cuda(const TensorLists& lists, std::vector<Bucket>& buckets,
                                     const ListOptions& options, const Tail& tail,
                                     dlpack::Device device) {
  void* const stream = tensor_reader().current_stream(device);
  const bool capturing = cuda_is_capturing(stream);
  std::vector<std::shared_ptr<Resident>> residents;
  for (const Bucket& bucket : buckets) {
    std::shared_ptr<Resident> resident = find(bucket, device);
    if (resident != nullptr) {
      misses_ = 0;
    } else {
      if (capturing) return "a graph capture before such a step was taken eagerly";
      if (!options.always && !is_seen_again(bucket))
        return "tensors that lie elsewhere at each step";
      resident = make_resident(bucket, device);
      resident->stream = stream;
    }
    residents.push_back(std::move(resident));
  }
  if (options.count_writes) count_writes(lists, options, tail);
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    const Bucket& bucket = buckets[i];
    Resident& resident = *residents[i];
    resident.captured |= capturing;
    if (resident.stream != stream && !resident.captured) {
      use_(resident.tables);
      resident.stream = stream;
    }
    const Launch launch{bucket.recipe,
                        tail,
                        bucket.rows.data(),
                        bucket.grads.data(),
                        static_cast<std::uint32_t>(bucket.rows.size()),
                        &options.hyper,
                        1,
                        bucket.chunks.data(),
                        static_cast<std::uint32_t>(bucket.chunks.size()),
                        bucket.chunk_size};
    const CudaTables tables{reinterpret_cast<const void*>(resident.rows_at),
                            reinterpret_cast<const void*>(resident.chunks_at),
                            reinterpret_cast<void*>(resident.arrivals_at)};
    const CudaResult result = adamw_cuda(launch, tables, device.index, stream);
    launch_counts().cuda += result.launches;
    if (result.error) {
      throw std::runtime_error(std::string("CUDA: ") + cuda_error_text(result.error));
    }
  }
  return nullptr;
}

}  // namespace warpstep
