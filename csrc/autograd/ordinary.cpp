// See ordinary.h.
#include "ordinary.h"

#include <map>
#include <optional>
#include <set>
#include <unordered_set>

namespace bnn_fast {
namespace {

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
  NAME(prior_tensors);
  NAME(parametrizations);
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

const Names& names() {
  static const Names found;
  return found;
}

// Where the fields of modes.Mode are.
enum Field { kSamples, kFirstSample, kKey, kMean, kExplicit, kOne, kRepeatable };

PyObject* field(py::handle mode, Field which) { return PyTuple_GET_ITEM(mode.ptr(), which); }

// Borrowed; null where there is none.
PyObject* item(PyObject* dict, PyObject* name) {
  return dict && name && PyDict_CheckExact(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
}

py::object value_of(const py::object& variable) {
  PyObject* value = nullptr;
  if (PyContextVar_Get(variable.ptr(), nullptr, &value) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

void set(py::handle object, PyObject* name, py::handle value) {
  if (PyObject_SetAttr(object.ptr(), name, value.ptr()) < 0) throw py::error_already_set();
}

py::object get(PyObject* object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!found) throw py::error_already_set();
  return found;
}

bool is_tensor(PyObject* object) { return object && THPVariable_Check(object); }

// Whether x would pass checks.linear_input, and the operator runs on its device.
bool fits(const Operator& op, const at::Tensor& x, const at::Tensor& mu, int64_t samples) {
  if (x.layout() != at::kStrided || x.is_nested() || x.dim() < 1 || mu.dim() != 2 || x.size(-1) != mu.size(1)) return false;
  if (x.scalar_type() != mu.scalar_type() || x.device() != mu.device()) return false;
  if (!mu.is_cpu() && !(mu.is_cuda() && op.forward.hasComputedKernelForDispatchKey(c10::DispatchKey::CUDA))) return false;
  return samples == 1 || (x.dim() >= 2 && x.size(0) % samples == 0);
}

}  // namespace

Ordinary::Ordinary(const Operator& op, py::object stack, py::object plain, py::tuple uncovered, py::object record_type,
                   py::object layer_type, py::dict scales, py::dict kls)
    : op_(op), stack_(stack), plain_(plain), uncovered_(uncovered), record_type_(record_type), layer_type_(layer_type),
      scales_(scales), kls_(kls) {}

// As modes.entered has it.
py::object Ordinary::mode_of(py::handle layer) const {
  py::object stack = value_of(stack_);
  for (Py_ssize_t i = PyTuple_GET_SIZE(stack.ptr()); i-- > 0;) {
    PyObject* entry = PyTuple_GET_ITEM(stack.ptr(), i);
    if (get(entry, names().active).ptr() != Py_True) continue;
    py::object modes = get(entry, names().modes);
    if (PyObject* mode = item(modes.ptr(), layer.ptr())) return py::reinterpret_borrow<py::object>(mode);
  }
  return uncovered_;
}

py::object Ordinary::call(py::handle layer, py::handle given) const {
  const Names& name = names();
  if (!THPVariable_CheckExact(given.ptr()) || !ordinary() || value_of(plain_).ptr() != Py_False) return py::none();
  auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(layer.ptr(), nullptr));
  auto own = [&](PyObject* what) { return item(dict.ptr(), what); };
  PyObject *parameters = own(name._parameters), *pruned = own(name._pruned), *numbers = own(name._numbers);
  PyObject* tensors[] = {item(parameters, name.weight_mu), item(parameters, name.weight_rho), item(parameters, name.bias_mu),
                         item(parameters, name.bias_rho)};
  bool reparametrized = !tensors[0] || !tensors[1] || !tensors[2] || !tensors[3];
  if (reparametrized || own(name.prior_tensors) != Py_False || !pruned || PyDict_GET_SIZE(pruned) != 0 ||
      item(own(name._modules), name.parametrizations) || !numbers || !PyTuple_Check(numbers))
    return py::none();
  PyObject* estimator = own(name.estimator);
  if (!estimator || PyUnicode_CompareWithASCIIString(estimator, "weight") != 0) return py::none();
  size_t count = tensors[2] == Py_None ? 2 : 4;
  c10::List<at::Tensor> posterior;
  for (size_t i = 0; i < count; ++i) {
    if (!is_tensor(tensors[i])) return py::none();
    posterior.push_back(THPVariable_Unpack(tensors[i]));
  }

  py::object mode = mode_of(layer);
  const at::Tensor &x = THPVariable_Unpack(given.ptr()), mu = posterior.get(0);
  int64_t samples = PyLong_AsLongLong(field(mode, kSamples));
  if (field(mode, kMean) != Py_False || !fits(op_, x, mu, samples)) return py::none();
  PyObject *key = field(mode, kKey), *scale = own(name.scale), *kl = own(name.kl);
  PyObject *scale_code = item(scales_.ptr(), scale), *kl_code = item(kls_.ptr(), kl);
  if (!scale_code || !kl_code) return py::none();
  if (key == Py_None && field(mode, kExplicit) == Py_False) key = item(own(name._buffers), name.frozen_key);
  py::object drawn_with;
  if (is_tensor(key)) {
    drawn_with = py::reinterpret_borrow<py::object>(key);
  } else {
    if (!mu.is_cpu()) return py::none();
    drawn_with = py::cast(fresh_keys(1)[0]);
  }

  c10::List<double> loc_and_scale;
  for (size_t i = 0; i < count; ++i) loc_and_scale.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(numbers, i)));
  c10::List<int64_t> options;
  for (long long option : {PyLong_AsLongLong(scale_code), 0LL, PyLong_AsLongLong(kl_code), static_cast<long long>(samples), 0LL, 0LL, 0LL})
    options.push_back(option);
  if (PyErr_Occurred()) throw py::error_already_set();

  py::object state = get(own(name._local), name.state);
  if (field(mode, kRepeatable) != Py_False) {
    set(state, name.latest, mode);
    set(own(name._shared), name.latest, mode);
  }
  auto call = c10::make_intrusive<Call>(op_, std::vector<c10::IValue>{std::move(posterior), THPVariable_Unpack(drawn_with.ptr()),
                                                                       c10::List<at::Tensor>(), std::move(loc_and_scale), std::move(options)});
  // Held: while the operator runs other threads may change the layer.
  auto all = py::reinterpret_steal<py::object>(PyTuple_Pack(4, tensors[0], tensors[1], tensors[2], tensors[3]));
  auto compared = py::reinterpret_steal<py::object>(PyTuple_Pack(3, numbers, scale, kl));
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = draw(call, x);
  }
  set(state, name.key, drawn_with);
  set(state, name.record,
      record_type_(all, compared, drawn_with, py::handle(field(mode, kSamples)), py::make_tuple(std::move(call)), false));
  return py::cast(std::move(y));
}

namespace {

// In the order of named_layers.
void collect(PyObject* module, PyTypeObject* layer_type, std::unordered_set<PyObject*>& seen, std::vector<py::object>& found) {
  seen.insert(module);
  if (PyObject_TypeCheck(module, layer_type)) found.push_back(py::reinterpret_borrow<py::object>(module));
  auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  PyObject *modules = item(dict.ptr(), names()._modules), *key, *child;
  Py_ssize_t at = 0;
  while (modules && PyDict_Next(modules, &at, &key, &child))
    if (child != Py_None && !seen.contains(child)) collect(child, layer_type, seen, found);
}

using Pairs = std::set<std::pair<PyObject*, PyObject*>>;

// (mu, rho) of each posterior that there is; none where they are reparametrized.
std::optional<std::vector<std::pair<PyObject*, PyObject*>>> pairs_of(PyObject* layer) {
  const Names& name = names();
  PyObject *parameters = item(layer, name._parameters), *of = item(layer, name.names);
  if (!parameters || !of || item(item(layer, name._modules), name.parametrizations)) return std::nullopt;
  std::vector<std::pair<PyObject*, PyObject*>> found;
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(of); i += 2) {
    PyObject *mu = item(parameters, PyTuple_GET_ITEM(of, i)), *rho = item(parameters, PyTuple_GET_ITEM(of, i + 1));
    if (!mu || !rho) return std::nullopt;
    if (mu != Py_None) found.push_back({mu, rho});
  }
  return found;
}

// Whether the layer's record holds, none of its pairs being among those before; its calls are added to the others.
bool holds(PyObject* layer, py::handle record, py::handle generation, Pairs& pairs,
           std::vector<c10::intrusive_ptr<Call>>& calls) {
  const Names& name = names();
  auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(layer, nullptr));
  auto own = [&](PyObject* what) { return item(dict.ptr(), what); };
  auto now = pairs_of(dict.ptr());
  if (!now || own(name.prior_tensors) != Py_False) return false;
  py::object kl = get(record.ptr(), name.kl), tensors = get(record.ptr(), name.tensors), options = get(record.ptr(), name.options);
  if (kl.is_none() || get(record.ptr(), name.calls).ptr() != kl.ptr() || get(record.ptr(), name.generation).ptr() != generation.ptr())
    return false;
  std::vector<std::pair<PyObject*, PyObject*>> then;
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(tensors.ptr()); i += 2)
    if (PyObject* mu = PyTuple_GET_ITEM(tensors.ptr(), i); mu != Py_None) then.push_back({mu, PyTuple_GET_ITEM(tensors.ptr(), i + 1)});
  if (then != *now) return false;
  if (PyTuple_GET_SIZE(options.ptr()) != 3) return false;
  PyObject* compared[] = {own(name._numbers), own(name.scale), own(name.kl)};
  for (int i = 0; i < 3; ++i)
    if (PyTuple_GET_ITEM(options.ptr(), i) != compared[i]) return false;
  for (const auto& pair : then)
    if (!pairs.insert(pair).second) return false;
  for (py::handle each : py::reinterpret_borrow<py::tuple>(kl)) {
    if (!py::isinstance<Call>(each)) return false;
    calls.push_back(py::cast<c10::intrusive_ptr<Call>>(each));
    if (!calls.back()->unchanged()) return false;
  }
  return true;
}

}  // namespace

std::vector<py::object> Ordinary::layers_of(py::handle model) const {
  std::unordered_set<PyObject*> seen;
  std::vector<py::object> layers;
  collect(model.ptr(), reinterpret_cast<PyTypeObject*>(layer_type_.ptr()), seen, layers);
  return layers;
}

py::object Ordinary::handed_over(py::handle model, py::handle generation, bool of_pass) const {
  if (!ordinary()) return py::none();
  const Names& name = names();
  Pairs pairs;
  std::vector<c10::intrusive_ptr<Call>> calls;
  std::vector<py::object> records;
  for (const py::object& layer : layers_of(model)) {
    py::object record = get(get(get(layer.ptr(), name._local).ptr(), name.state).ptr(), name.record);
    if (record.is_none() || !holds(layer.ptr(), record, generation, pairs, calls)) return py::none();
    if (of_pass && field(mode_of(layer), kKey) != get(record.ptr(), name.key).ptr()) return py::none();
    records.push_back(std::move(record));
  }
  if (calls.empty()) return py::none();
  for (const py::object& record : records) set(record, name.kl, py::none());
  at::Tensor total;
  {
    py::gil_scoped_release release;
    total = read(calls);
  }
  return py::cast(std::move(total));
}

py::object Ordinary::pinned(py::handle model, py::handle mode_of_key) const {
  if (!ordinary()) return py::none();
  const Names& name = names();
  std::map<std::pair<PyObject*, PyObject*>, size_t> owners;
  std::vector<py::object> layers = layers_of(model);
  std::vector<size_t> own;  // which of the keys
  for (const py::object& layer : layers) {
    auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(layer.ptr(), nullptr));
    auto tensors = pairs_of(dict.ptr());
    if (!tensors) return py::none();
    for (const auto& [mu, rho] : *tensors)
      if (!is_tensor(mu) || !THPVariable_Unpack(mu).is_cpu()) return py::none();
    auto first = tensors->empty() ? std::make_pair(layer.ptr(), layer.ptr()) : (*tensors)[0];
    own.push_back(owners.try_emplace(first, owners.size()).first->second);
  }
  py::list modes;
  for (at::Tensor& key : fresh_keys(owners.size())) modes.append(mode_of_key(std::move(key)));
  py::list found;
  py::dict by_layer;
  for (size_t i = 0; i < layers.size(); ++i) {
    py::object mode = modes[own[i]];
    set(get(get(layers[i].ptr(), name._local).ptr(), name.state), name.mode, mode);
    found.append(layers[i]);
    by_layer[layers[i]] = mode;
  }
  return py::make_tuple(std::move(found), std::move(by_layer));
}

}  // namespace bnn_fast
