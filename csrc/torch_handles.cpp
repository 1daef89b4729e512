// Finding torch's functions, trying them, and reading a tensor with them: see torch_handles.h.
#include "torch_handles.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>

namespace py = pybind11;

namespace warpstep {
namespace {

// c10::ScalarType, c10::Layout and c10::DeviceType, as the C ABI has them.
constexpr std::int32_t kByte = 0, kShort = 2, kHalf = 5, kFloat = 6, kDouble = 7, kComplexHalf = 8,
                       kComplexFloat = 9, kComplexDouble = 10, kBFloat16 = 15;
constexpr std::int32_t kStrided = 0;
constexpr std::int32_t kCpu = 0, kCuda = 1;

bool set_format(std::int32_t dtype, TensorView& view) {
  view.is_complex = dtype >= kComplexHalf && dtype <= kComplexDouble;
  const std::int32_t real = view.is_complex ? dtype - (kComplexHalf - kHalf) : dtype;
  view.format = real == kDouble  ? Format::float64
                : real == kFloat ? Format::float32
                : real == kHalf  ? Format::float16
                : real == kShort ? Format::int16
                : real == kByte  ? Format::uint8
                                 : Format::bfloat16;
  return (real >= kHalf && real <= kDouble) || real == kBFloat16 || real == kShort || real == kByte;
}

PyTypeObject* type_of(py::handle module, const char* name) {
  return reinterpret_cast<PyTypeObject*>(py::object(module.attr(name)).release().ptr());
}

// A function of torch's, or of a library that torch's module is linked with; false without.
template <class Function>
bool find(const char* name, Function& function) {
  static void* const library = [] {
    const py::object path =
        py::getattr(py::module_::import("torch").attr("_C"), "__file__", py::none());
    const bool known = py::isinstance<py::str>(path);
    return known ? dlopen(path.cast<std::string>().c_str(), RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  }();
  function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
  return function != nullptr;
}

}  // namespace

ParallelFor find_parallel_for() {
  ParallelFor function;
  find("torch_parallel_for", function);
  return function;
}

bool TorchHandles::read(Handle tensor, TensorView& view) const {
  if (dispatches_to_python(tensor)) return false;
  std::int64_t ndim;
  std::int32_t dtype, layout, device, index = 0;
  if (functions_.get_data_ptr(tensor, &view.data) != 0 || functions_.get_dim(tensor, &ndim) != 0 ||
      functions_.get_sizes(tensor, &view.shape) != 0 ||
      functions_.get_strides(tensor, &view.strides) != 0 ||
      functions_.get_dtype(tensor, &dtype) != 0 || functions_.get_layout(tensor, &layout) != 0 ||
      layout != kStrided || functions_.get_device_type(tensor, &device) != 0) {
    return false;
  }
  std::int64_t bytes = 1;
  if (is_low(view.data) && functions_.get_storage_size(tensor, &bytes) == 0 && bytes == 0) {
    view.data = nullptr;
  }
  view.ndim = static_cast<std::int32_t>(ndim);
  view.known_format = set_format(dtype, view);
  if (device == kCpu) {
    view.device = {dlpack::cpu, 0};
    return true;
  }
  if (device != kCuda || functions_.get_device_index(tensor, &index) != 0) return false;
  view.device = {has_rocm_ ? dlpack::rocm : dlpack::cuda, index};
  return true;
}

std::optional<TorchHandles> TorchHandles::make() {
  const py::module_ torch = py::module_::import("torch");
  TorchHandles handles;
  handles.tensor_type_ = type_of(torch, "Tensor");
  handles.parameter_type_ = type_of(torch.attr("nn"), "Parameter");
  handles.has_rocm_ = !torch.attr("version").attr("hip").is_none();
  try {
    if (!find_functions(handles.functions_) || !handles.find_offset() ||
        !handles.find_python_keys() || !handles.answers_as_expected()) {
      return std::nullopt;
    }
  } catch (const std::exception&) {  // this torch lacks an attribute, or it is of another type
    return std::nullopt;
  }
  return handles;
}

bool TorchHandles::find_functions(Functions& functions) {
  return find("aoti_torch_get_data_ptr", functions.get_data_ptr) &&
         find("aoti_torch_get_storage_size", functions.get_storage_size) &&
         find("aoti_torch_get_dim", functions.get_dim) &&
         find("aoti_torch_get_sizes", functions.get_sizes) &&
         find("aoti_torch_get_strides", functions.get_strides) &&
         find("aoti_torch_get_dtype", functions.get_dtype) &&
         find("aoti_torch_get_layout", functions.get_layout) &&
         find("aoti_torch_get_device_type", functions.get_device_type) &&
         find("aoti_torch_get_device_index", functions.get_device_index) &&
         find("aoti_torch_is_defined", functions.is_defined) &&
         find("aoti_torch_new_tensor_handle", functions.new_handle) &&
         find("aoti_torch_delete_tensor_object", functions.delete_handle) &&
         // c10::TensorImpl::grad() const
         find("_ZNK3c1010TensorImpl4gradEv", functions.grad) &&
         // at::TensorBase::_version() const
         find("_ZNK2at10TensorBase8_versionEv", functions.version) &&
         // torch::autograd::impl::bump_version(const at::Tensor&)
         find("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", functions.bump_version);
}

bool TorchHandles::find_offset() {
  const py::module_ torch = py::module_::import("torch");
  const py::object sample = torch.attr("zeros")(1);
  const py::object capsule =
      torch.attr("_C").attr("_aoti").attr("unsafe_alloc_void_ptr_from_tensor")(sample);
  const Handle handle = static_cast<Handle>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (handle == nullptr) throw py::error_already_set();
  const void* const body = *handle;
  functions_.delete_handle(handle);

  int found = 0;
  const char* const object = reinterpret_cast<const char*>(sample.ptr());
  const std::ptrdiff_t size = tensor_type_->tp_basicsize;
  for (auto at = static_cast<std::ptrdiff_t>(sizeof(PyObject));
       at + static_cast<std::ptrdiff_t>(sizeof(void*)) <= size; at += sizeof(void*)) {
    if (*reinterpret_cast<void* const*>(object + at) != body) continue;
    offset_ = at;
    ++found;
  }
  return found == 1;
}

// The word that all plain tensors have in common, and to which all others add the same bits.
bool TorchHandles::find_python_keys() {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor"), zeros = torch.attr("zeros");
  py::dict body;
  body["__torch_dispatch__"] = py::module_::import("builtins").attr("classmethod")(zeros);
  const py::object subclass = py::type::of(tensor)("Dispatching", py::make_tuple(tensor), body);
  const py::object plain[] = {
      zeros(1), zeros(py::make_tuple(2, 3), py::arg("dtype") = torch.attr("float64")),
      torch.attr("nn").attr("Parameter")(zeros(2)), zeros(py::make_tuple(4, 5)).attr("t")()};
  const py::object others[] = {tensor.attr("_make_subclass")(subclass, zeros(1)),
                               tensor.attr("_make_wrapper_subclass")(subclass, py::make_tuple(2))};

  const auto word = [&](const py::object& sample, std::size_t at) {
    return static_cast<const std::uint64_t*>(*handle_in(sample.ptr()))[at];
  };
  // Behind its table of functions and its references; the keys are among the last of some 20 words.
  for (keys_word_ = 2; keys_word_ < 24; ++keys_word_) {
    const std::uint64_t common = word(plain[0], keys_word_);
    python_keys_ = word(others[0], keys_word_) & ~common;
    const auto adds_keys = [&](const py::object& sample) {
      return word(sample, keys_word_) == (common | python_keys_);
    };
    const auto is_common = [&](const py::object& sample) {
      return word(sample, keys_word_) == common;
    };
    if (python_keys_ != 0 && std::all_of(std::begin(plain), std::end(plain), is_common) &&
        std::all_of(std::begin(others), std::end(others), adds_keys)) {
      return true;
    }
  }
  return false;
}

// Tensors of each format and of several layouts, gradients that are there or not, and counters.
bool TorchHandles::answers_as_expected() const {
  const py::module_ torch = py::module_::import("torch");
  const struct {
    const char* name;
    Format format;
    bool is_complex;
  } dtypes[] = {{"float16", Format::float16, false},  {"bfloat16", Format::bfloat16, false},
                {"float32", Format::float32, false},  {"float64", Format::float64, false},
                {"complex64", Format::float32, true}, {"complex128", Format::float64, true},
                {"int16", Format::int16, false},      {"uint8", Format::uint8, false}};
  for (const auto& dtype : dtypes) {
    const py::object whole =
        torch.attr("zeros")(py::make_tuple(3, 5), py::arg("dtype") = torch.attr(dtype.name));
    const py::object tensor = whole.attr("t")()[py::int_(1)].attr("view")(3, 1);
    TensorView view;
    if (of(tensor.ptr()) == nullptr || !read(of(tensor.ptr()), view) ||
        view.data != reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>()) ||
        view.ndim != 2 || view.shape[0] != 3 || view.shape[1] != 1 || view.strides[0] != 5 ||
        !view.known_format || view.format != dtype.format || view.is_complex != dtype.is_complex ||
        view.device.type != dlpack::cpu) {
      return false;
    }
  }
  TensorView view;
  const py::object integers = torch.attr("zeros")(2, py::arg("dtype") = torch.attr("int64"));
  if (!read(of(integers.ptr()), view) || view.known_format) return false;

  const py::object param = torch.attr("nn").attr("Parameter")(torch.attr("zeros")(2));
  const Handle handle = of(param.ptr());
  if (handle == nullptr || grad_of(handle) != nullptr) return false;
  const py::object grad = torch.attr("zeros")(2);
  param.attr("grad") = grad;
  const Handle found = grad_of(handle);
  if (found == nullptr || *found != *of(grad.ptr())) return false;
  const Handle kept = keep(found);
  const bool keeps = kept != nullptr && kept != found && *kept == *found;
  if (keeps) drop(kept);
  if (!keeps) return false;

  const auto version = param.attr("_version").cast<std::int64_t>();
  if (version_of(handle) != version) return false;
  bump_version(handle);
  return version_of(handle) == version + 1 &&
         param.attr("_version").cast<std::int64_t>() == version + 1;
}

}  // namespace warpstep
