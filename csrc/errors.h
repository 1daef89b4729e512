// Python's errors in C++: which of them are expected, and words that are made once.
#pragma once

#include <pybind11/pybind11.h>

namespace warpstep {

namespace py = pybind11;

// Whether an error only says that an object lacks what was asked for, as it may. A MemoryError is
// for the caller to know, and so is what is no Exception: a KeyboardInterrupt, say.
inline bool is_expected(const py::error_already_set& error) {
  return error.matches(PyExc_Exception) && !error.matches(PyExc_MemoryError);
}

// Clears Python's error, if there is one, where it is expected; else throws it.
inline void clear_expected_error() {
  if (PyErr_Occurred() == nullptr) return;
  if (PyErr_ExceptionMatches(PyExc_Exception) == 0 || PyErr_ExceptionMatches(PyExc_MemoryError)) {
    throw py::error_already_set();
  }
  PyErr_Clear();
}

// An interned str, for a static to hold. Throws without memory: the static is then made the next
// time, and never null.
inline PyObject* interned(const char* text) {
  PyObject* const name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

}  // namespace warpstep
