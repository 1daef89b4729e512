// What a launch reads, kept alive until it has ended, whatever other Python threads do meanwhile.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensor_reader.h"

namespace warpstep {

namespace py = pybind11;

// A launch on the CPU of up to so many elements takes no longer than Python lets a thread hold the
// GIL (5 ms). Then it is held: that other threads wait is cheaper than owning every tensor.
constexpr std::int64_t kBriefElements = std::int64_t{1} << 22;

// To be filled, cleared and destroyed with the GIL held.
class Keeper {
 public:
  Keeper() = default;
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;
  ~Keeper() { clear(); }

  void keep(PyObject* object) {
    if (object == nullptr) return;
    objects_.push_back(object);  // which may throw: nothing is owned then
    Py_INCREF(object);
  }

  // The gradient that is read in place. (What Python gives as one is held by who asked for it.)
  void keep_grad_of(PyObject* param) {
    grads_.emplace_back();
    grads_.back() = tensor_reader().keep_grad(param);
    if (grads_.back() == nullptr) grads_.pop_back();
  }

  void reserve(std::size_t objects, std::size_t grads) {
    objects_.reserve(objects);
    grads_.reserve(grads);
  }

  bool is_empty() const { return objects_.empty() && grads_.empty(); }

  void clear() {
    // What is freed may run Python, which finds this empty.
    std::vector<PyObject*> objects;
    std::vector<TorchHandles::Handle> grads;
    objects.swap(objects_);
    grads.swap(grads_);
    for (const TorchHandles::Handle grad : grads) tensor_reader().drop(grad);
    for (PyObject* object : objects) Py_DECREF(object);
  }

 private:
  std::vector<PyObject*> objects_;
  std::vector<TorchHandles::Handle> grads_;
};

}  // namespace warpstep
