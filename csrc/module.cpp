// The Python module bnn_fast._C. Importing it loads the shared object, whose static initialisers register the
// operators with torch; the module itself only tells how it was built. Python's limited API: one binary serves
// every Python from 3.10.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <exception>

namespace bnn_fast {
const char* cpu_capability();  // cpu/dispatch.cpp
}

namespace {

PyObject* cpu_capability(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(bnn_fast::cpu_capability());
  } catch (const std::exception& error) {  // BNN_FAST_CPU asks for what this processor has not
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "The CPU instruction set that the kernels run with."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "VERSION", BNN_FAST_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "TORCH_VERSION", BNN_FAST_TORCH_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", BNN_FAST_CUDA_ARCHITECTURES) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
