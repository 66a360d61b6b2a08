// The read of a model's KL, and the entering of pinned keys: see ordinary.h.
#include <map>
#include <optional>
#include <set>
#include <unordered_set>

#include "objects.h"
#include "ordinary.h"

namespace bnn_fast {
namespace {

// In the order of named_layers.
void collect(PyObject* module, PyTypeObject* layer_type, std::unordered_set<PyObject*>& seen, std::vector<py::object>& found) {
  seen.insert(module);
  if (PyObject_TypeCheck(module, layer_type)) found.push_back(py::reinterpret_borrow<py::object>(module));
  auto dict = dict_of(module);
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

// Calls in the order of their first layers, with how many of their layers were met.
struct Calls {
  std::vector<c10::intrusive_ptr<Call>> calls;
  std::vector<int64_t> layers;

  void add(c10::intrusive_ptr<Call> call) {
    for (size_t i = 0; i < calls.size(); ++i)
      if (calls[i] == call) return void(++layers[i]);
    calls.push_back(std::move(call));
    layers.push_back(1);
  }
  bool whole() const {
    for (size_t i = 0; i < calls.size(); ++i)
      if (calls[i]->layers != layers[i] || !calls[i]->unchanged()) return false;
    return !calls.empty();
  }
};

// Whether the layer's record holds but for changes of its tensors, none of its pairs being among those before; its calls are added to the others.
bool holds(PyObject* layer, py::handle record, py::handle generation, Pairs& pairs, Calls& calls) {
  const Names& name = names();
  auto dict = dict_of(layer);
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
    calls.add(py::cast<c10::intrusive_ptr<Call>>(each));
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
  Calls calls;
  std::vector<py::object> records;
  for (const py::object& layer : layers_of(model)) {
    py::object record = get(get(get(layer.ptr(), name._local).ptr(), name.state).ptr(), name.record);
    if (record.is_none() || !holds(layer.ptr(), record, generation, pairs, calls)) return py::none();
    if (of_pass && field(mode_of(layer), kKey) != get(record.ptr(), name.key).ptr()) return py::none();
    records.push_back(std::move(record));
  }
  if (!calls.whole()) return py::none();
  for (const py::object& record : records) set(record, name.kl, py::none());
  at::Tensor total;
  {
    py::gil_scoped_release release;
    total = read(calls.calls);
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
    auto dict = dict_of(layer);
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
