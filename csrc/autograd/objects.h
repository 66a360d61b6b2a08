// Python's objects as ordinary*.cpp look at them: attributes by interned names, dictionaries, tensors.
#pragma once

#include <torch/extension.h>

namespace bnn_fast {

namespace py = pybind11;

// Interned once, as dictionaries compare them by address.
#define NAME(name) PyObject* const name = PyUnicode_InternFromString(#name)
struct Names {
  NAME(_parameters);
  NAME(_buffers);
  NAME(_modules);
  NAME(_pruned);
  NAME(_numbers);
  NAME(_local);
  NAME(_shared);
  NAME(_forward_hooks);
  NAME(_forward_pre_hooks);
  NAME(_backward_hooks);
  NAME(_backward_pre_hooks);
  NAME(_compiled_call_impl);
  NAME(forward);
  NAME(prior_tensors);
  NAME(parametrizations);
  NAME(weight);
  NAME(bias);
  NAME(weight_mu);
  NAME(weight_rho);
  NAME(bias_mu);
  NAME(bias_rho);
  NAME(frozen_key);
  NAME(scale);
  NAME(estimator);
  NAME(kl);
  NAME(key);
  NAME(state);
  NAME(latest);
  NAME(record);
  NAME(names);
  NAME(tensors);
  NAME(options);
  NAME(generation);
  NAME(calls);
  NAME(mode);
  NAME(modes);
  NAME(active);
};
#undef NAME

inline const Names& names() {
  static const Names found;
  return found;
}

// Where the fields of modes.Mode are.
enum Field { kSamples, kFirstSample, kKey, kMean, kExplicit, kOne, kRepeatable };

inline PyObject* field(py::handle mode, Field which) { return PyTuple_GET_ITEM(mode.ptr(), which); }

// Borrowed; null where there is none.
inline PyObject* item(PyObject* dict, PyObject* name) {
  return dict && name && PyDict_CheckExact(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
}

inline py::object dict_of(py::handle object) {
  return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object.ptr(), nullptr));
}

inline py::object value_of(const py::object& variable) {
  PyObject* value = nullptr;
  if (PyContextVar_Get(variable.ptr(), nullptr, &value) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

inline void set(py::handle object, PyObject* name, py::handle value) {
  if (PyObject_SetAttr(object.ptr(), name, value.ptr()) < 0) throw py::error_already_set();
}

inline py::object get(PyObject* object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!found) throw py::error_already_set();
  return found;
}

inline bool is_tensor(PyObject* object) { return object && THPVariable_Check(object); }

}  // namespace bnn_fast
