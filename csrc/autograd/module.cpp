// The Python module bnn_fast._autograd: the eager nodes of call.h. It uses libtorch's own headers, so it belongs to the very torch
// that it was built for; bnn_fast loads it under no other.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/extension.h>
#include <torch/version.h>

#include "call.h"

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

// torch.randint(-2^63, 2^63 - 1, (count, 2)).unbind(): the same numbers of the same generator, in one step.
py::tuple fresh_keys(size_t count) {
  auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  std::lock_guard<std::mutex> lock(generator->mutex_);
  py::tuple keys(count);
  for (size_t i = 0; i < count; ++i) {
    at::Tensor key = at::empty({2}, at::kLong);
    for (int64_t* word : {key.mutable_data_ptr<int64_t>(), key.mutable_data_ptr<int64_t>() + 1})
      *word = static_cast<int64_t>(generator->random64() % UINT64_MAX + (uint64_t(1) << 63));
    keys[i] = py::cast(std::move(key));
  }
  return keys;
}

// Whether a call would be made in plain eager mode, with gradients and none of what layers have to look at one by one: transforms
// of torch.func, traces, autocast, a backward pass, hooks for saved tensors, dispatch modes.
bool ordinary() {
  auto included = [](c10::DispatchKey key) { return c10::impl::tls_is_dispatch_key_included(key); };
  return at::GradMode::is_enabled() && !included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() && !at::autocast::is_autocast_enabled(at::kCPU) &&
         !at::autocast::is_autocast_enabled(at::kCUDA) && torch::autograd::get_current_graph_task_id() == -1 &&
         !at::SavedTensorDefaultHooks::get_hooks(true) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
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
  m.def("fresh_keys", &fresh_keys);
  m.def("ordinary", &ordinary);
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
