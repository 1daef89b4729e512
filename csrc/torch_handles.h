// Torch tensors looked at where they lie, through torch's own C functions.
//
// NOTE [handles]
// Torch's stable C ABI (torch/csrc/inductor/aoti_torch/c/shim.h) takes an AtenTensorHandle: the
// address of an at::Tensor, which is one pointer to what the tensor is. Every tensor of Python has
// an at::Tensor in it, so a handle can be had without a new reference, and each question to it
// costs one or two nanoseconds; DLPack's exchange takes 20 to 80 a tensor, most of it for counting
// references up and down again. Where in the Python object the at::Tensor lies is found when
// warpstep is imported, by looking for the pointer of a handle that torch has made; and which bits
// of a tensor say that it answers questions through Python, by comparing such tensors with plain
// ones. Three functions that the C ABI lacks are torch's exported C++ ones: the gradient, the
// version counter, and its increment. All are tried on tensors with known answers first; if one is
// missing or answers otherwise than expected, none is used: TensorReader has other ways for
// everything.
#pragma once

#include <Python.h>

#include <cstdint>
#include <optional>

#include "cpu/threads.h"
#include "tensor_view.h"

namespace warpstep {

// torch's threads; null where it does not lend them.
ParallelFor find_parallel_for();

class TorchHandles {
 public:
  // An at::Tensor. Good while nobody drops the tensor.
  using Handle = void**;

  // None where torch is not as expected.
  static std::optional<TorchHandles> make();

  // Of torch.Tensor and torch.nn.Parameter themselves; null for everything else.
  Handle of(PyObject* object) const {
    const PyTypeObject* const type = Py_TYPE(object);
    if (type != tensor_type_ && type != parameter_type_) return nullptr;
    return handle_in(object);
  }

  // False where the tensor has no strided memory on a CPU, an NVIDIA or an AMD GPU, or where asking
  // it could run Python. Never runs Python itself, so that any thread can read.
  bool read(Handle tensor, TensorView& view) const;

  // Where its elements begin; null where it has no such memory.
  const void* address_of(Handle tensor) const {
    void* address = nullptr;
    return functions_.get_data_ptr(tensor, &address) == 0 ? address : nullptr;
  }

  // Null if there is none.
  Handle grad_of(Handle tensor) const {
    const Handle grad = functions_.grad(*tensor);
    bool defined = false;
    return functions_.is_defined(grad, &defined) == 0 && defined ? grad : nullptr;
  }

  // A handle that keeps the tensor alive, to be dropped with the GIL held; null where memory is
  // short.
  Handle keep(Handle tensor) const {
    Handle kept = nullptr;
    return functions_.new_handle(tensor, &kept) == 0 ? kept : nullptr;
  }
  void drop(Handle kept) const { functions_.delete_handle(kept); }

  // Counts the writes to a tensor's memory.
  std::int64_t version_of(Handle tensor) const { return functions_.version(tensor); }
  void bump_version(Handle tensor) const { functions_.bump_version(tensor); }

  // What a tensor is, and what that points to (its storage; what autograd knows of it and its
  // version counter, if these will be looked at), brought into the caches. To be called some time
  // apart, in this order.
  void fetch(Handle tensor) const {
    const char* const body = static_cast<const char*>(*tensor);
    for (int line = 0; line < 3; ++line) __builtin_prefetch(body + 64 * line);
  }
  void fetch_parts(Handle tensor, bool only_storage) const {
    void* const* const body = static_cast<void* const*>(*tensor);
    const int end = only_storage ? 3 : 6;
    for (int word = 2; word < end; ++word) {  // behind its table of functions and its references
      if (body[word] == nullptr) continue;
      __builtin_prefetch(body[word]);
      __builtin_prefetch(static_cast<const char*>(body[word]) + 63);
    }
  }

 private:
  struct Functions {
    int (*get_data_ptr)(Handle, void**);
    int (*get_storage_size)(Handle, std::int64_t*);
    int (*get_dim)(Handle, std::int64_t*);
    int (*get_sizes)(Handle, const std::int64_t**);
    int (*get_strides)(Handle, const std::int64_t**);
    int (*get_dtype)(Handle, std::int32_t*);
    int (*get_layout)(Handle, std::int32_t*);
    int (*get_device_type)(Handle, std::int32_t*);
    int (*get_device_index)(Handle, std::int32_t*);
    int (*is_defined)(Handle, bool*);
    int (*new_handle)(Handle, Handle*);
    int (*delete_handle)(Handle);
    Handle (*grad)(const void* body);
    std::int64_t (*version)(Handle);
    void (*bump_version)(Handle);
  };

  TorchHandles() = default;
  static bool find_functions(Functions& functions);
  bool find_offset();
  bool find_python_keys();
  bool answers_as_expected() const;

  Handle handle_in(PyObject* tensor) const {
    return reinterpret_cast<Handle>(reinterpret_cast<char*>(tensor) + offset_);
  }
  // Whether it is of a subclass with __torch_dispatch__.
  bool dispatches_to_python(Handle tensor) const {
    return (static_cast<const std::uint64_t*>(*tensor)[keys_word_] & python_keys_) != 0;
  }

  Functions functions_{};
  PyTypeObject* tensor_type_ = nullptr;
  PyTypeObject* parameter_type_ = nullptr;
  std::ptrdiff_t offset_ = 0;
  // Where a tensor has its dispatch keys, and which of them lead to Python.
  std::size_t keys_word_ = 0;
  std::uint64_t python_keys_ = 0;
  bool has_rocm_ = false;  // whose devices torch calls CUDA's
};

}  // namespace warpstep
