// The Python module bnn_fast._autograd: the eager nodes of call.h. It uses libtorch's own headers, so it belongs to the very torch
// that it was built for; bnn_fast loads it under no other.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/extension.h>
#include <torch/version.h>

#include "ordinary.h"

namespace {

using bnn_fast::Call;
using bnn_fast::Operator;
namespace py = pybind11;

// What torch::jit::toIValue gives, by a shorter way for the lists that the operators take.
c10::IValue value_of(py::handle given, const c10::TypePtr& type) {
  if (type->kind() == c10::TypeKind::TensorType && THPVariable_Check(given.ptr())) return THPVariable_Unpack(given.ptr());
  if (type->kind() != c10::TypeKind::ListType) return torch::jit::toIValue(given, type);
  auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(given.ptr(), "expected a list"));
  if (!sequence) throw py::error_already_set();
  PyObject** items = PySequence_Fast_ITEMS(sequence.ptr());
  Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.ptr());
  auto list_of = [&](auto list, auto convert) {
    list.reserve(count);
    for (Py_ssize_t i = 0; i < count; ++i) list.push_back(convert(items[i]));
    if (PyErr_Occurred()) throw py::error_already_set();
    return c10::IValue(std::move(list));
  };
  switch (type->castRaw<c10::ListType>()->getElementType()->kind()) {
    case c10::TypeKind::TensorType: return list_of(c10::List<at::Tensor>(), [](PyObject* item) { return py::cast<at::Tensor>(item); });
    case c10::TypeKind::FloatType: return list_of(c10::List<double>(), [](PyObject* item) { return PyFloat_AsDouble(item); });
    default: return list_of(c10::List<int64_t>(), [](PyObject* item) { return PyLong_AsLongLong(item); });
  }
}

c10::intrusive_ptr<Call> call_of(const Operator& op, const py::tuple& arguments) {
  const auto& expected = op.forward.schema().arguments();
  TORCH_CHECK_TYPE(arguments.size() + op.has_x == expected.size(), op.forward.schema().name(), " takes ",
                   expected.size() - op.has_x, " arguments beside x, given ", arguments.size());
  std::vector<c10::IValue> values;
  values.reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) values.push_back(value_of(arguments[i], expected[i + op.has_x].type()));
  return c10::make_intrusive<Call>(op, std::move(values));
}

c10::OperatorHandle handle_of(const std::string& name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), ""); }

}  // namespace

PYBIND11_MODULE(_autograd, m) {
  m.attr("TORCH_VERSION") = TORCH_VERSION;
  py::class_<Operator>(m, "Operator")
      .def(py::init([](const std::string& forward, const std::string& backward, std::vector<std::string> parameters, bool has_x,
                       bool draws) {
        return Operator{handle_of(forward), handle_of(backward), std::move(parameters), has_x, draws};
      }));
  py::class_<Call, c10::intrusive_ptr<Call>>(m, "Call")
      .def_readonly("kl", &Call::kl)
      .def_readwrite("layers", &Call::layers)
      .def("unchanged", &Call::unchanged);
  // torch's wrapper lets errors of Python code below (an operator on meta tensors) keep their type.
  m.def("draw", torch::wrap_pybind_function([](const Operator& op, const std::optional<at::Tensor>& x, const py::tuple& arguments) {
    auto call = call_of(op, arguments);
    at::Tensor y;
    {
      py::gil_scoped_release release;
      y = bnn_fast::draw(call, x.value_or(at::Tensor()));
    }
    return std::make_pair(std::move(y), std::move(call));
  }));
  m.def("fresh_keys", [](int64_t count) { return py::tuple(py::cast(bnn_fast::fresh_keys(count))); });
  using bnn_fast::Ordinary;
  py::class_<Ordinary>(m, "Ordinary")
      .def(py::init<const Operator&, const Operator&, py::object, py::object, py::tuple, py::object, py::object, py::dict, py::dict,
                    py::dict, std::pair<int64_t, int64_t>>())
      .def("call", torch::wrap_pybind_function([](const Ordinary& o, py::handle layer, py::handle x) { return o.call(layer, x); }))
      .def("chain", torch::wrap_pybind_function([](const Ordinary& o, const py::list& modules, py::handle x, int64_t draws) {
             return o.chain(modules, x, draws);
           }))
      .def("handed_over", &Ordinary::handed_over)
      .def("pinned", &Ordinary::pinned);
  m.def("kl", torch::wrap_pybind_function([](const Operator& op, const py::tuple& arguments) {
    auto call = call_of(op, arguments);
    py::gil_scoped_release release;
    call->run({});
    return call;
  }));
  m.def("read", torch::wrap_pybind_function([](const std::vector<c10::intrusive_ptr<Call>>& calls) {
    py::gil_scoped_release release;
    return bnn_fast::read(calls);
  }));
}
