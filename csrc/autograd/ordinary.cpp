// The calls of a layer and of a chain: see ordinary.h.
#include "ordinary.h"

#include "objects.h"

namespace bnn_fast {
namespace {

bool runs_on(const Operator& op, const at::Tensor& x) {
  return x.is_cpu() || (x.is_cuda() && op.forward.hasComputedKernelForDispatchKey(c10::DispatchKey::CUDA));
}

// Whether x would pass checks.linear_input, and the operator runs on its device.
bool fits(const Operator& op, const at::Tensor& x, const at::Tensor& mu, int64_t samples) {
  if (x.layout() != at::kStrided || x.is_nested() || x.dim() < 1 || mu.dim() != 2 || x.size(-1) != mu.size(1)) return false;
  if (x.scalar_type() != mu.scalar_type() || x.device() != mu.device() || !runs_on(op, x)) return false;
  return samples == 1 || (x.dim() >= 2 && x.size(0) % samples == 0);
}

// Whether a call of the module, of a type that is known, is its forward and nothing else.
bool is_plain(PyObject* dict) {
  const Names& name = names();
  for (PyObject* hooks : {name._forward_hooks, name._forward_pre_hooks, name._backward_hooks, name._backward_pre_hooks}) {
    PyObject* found = PyDict_GetItemWithError(dict, hooks);
    if (!found || !PyDict_Check(found) || PyDict_Size(found) != 0) return false;
  }
  PyObject* compiled = item(dict, name._compiled_call_impl);
  return !item(dict, name.forward) && (!compiled || compiled == Py_None);
}

}  // namespace

// What a call takes from a linear layer.
struct Ordinary::Layer {
  py::object dict, mode, state, key;
  PyObject* tensors[4];
  size_t count;  // of the tensors that there are
  PyObject *numbers, *scale, *kl;
  int64_t samples, scale_code, kl_code;

  const at::Tensor& tensor(size_t i) const { return THPVariable_Unpack(tensors[i]); }
};

Ordinary::Ordinary(const Operator& linear, const Operator& chain, py::object stack, py::object plain, py::tuple uncovered,
                   py::object record_type, py::object layer_type, py::dict scales, py::dict kls, py::dict steps,
                   std::pair<int64_t, int64_t> most)
    : linear_(linear), chain_(chain), stack_(stack), plain_(plain), uncovered_(uncovered), record_type_(record_type),
      layer_type_(layer_type), scales_(scales), kls_(kls), steps_(steps), most_(most) {}

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

// Whether all of it is as usual.
bool Ordinary::look_at(py::handle layer, Layer& found) const {
  const Names& name = names();
  found.dict = dict_of(layer);
  auto own = [&](PyObject* what) { return item(found.dict.ptr(), what); };
  PyObject *parameters = own(name._parameters), *pruned = own(name._pruned);
  size_t i = 0;
  for (PyObject* which : {name.weight_mu, name.weight_rho, name.bias_mu, name.bias_rho}) {
    found.tensors[i] = item(parameters, which);
    if (!found.tensors[i++]) return false;  // reparametrized
  }
  found.numbers = own(name._numbers);
  if (own(name.prior_tensors) != Py_False || !pruned || PyDict_GET_SIZE(pruned) != 0 ||
      item(own(name._modules), name.parametrizations) || !found.numbers || !PyTuple_Check(found.numbers))
    return false;
  PyObject* estimator = own(name.estimator);
  if (!estimator || PyUnicode_CompareWithASCIIString(estimator, "weight") != 0) return false;
  found.count = found.tensors[2] == Py_None ? 2 : 4;
  for (i = 0; i < found.count; ++i)
    if (!is_tensor(found.tensors[i])) return false;
  found.mode = mode_of(layer);
  found.samples = PyLong_AsLongLong(field(found.mode, kSamples));
  found.scale = own(name.scale);
  found.kl = own(name.kl);
  PyObject *scale_code = item(scales_.ptr(), found.scale), *kl_code = item(kls_.ptr(), found.kl);
  if (field(found.mode, kMean) != Py_False || !scale_code || !kl_code) return false;
  found.scale_code = PyLong_AsLongLong(scale_code);
  found.kl_code = PyLong_AsLongLong(kl_code);
  return is_tensor(pinned_key(found)) || found.tensor(0).is_cpu();
}

PyObject* Ordinary::pinned_key(const Layer& layer) {
  PyObject* key = field(layer.mode, kKey);
  if (key == Py_None && field(layer.mode, kExplicit) == Py_False) key = item(item(layer.dict.ptr(), names()._buffers), names().frozen_key);
  return key;
}

// Before the operator runs: the mode is the latest, the key is chosen.
void Ordinary::begin(Layer& layer) const {
  const Names& name = names();
  PyObject* key = pinned_key(layer);
  layer.key = is_tensor(key) ? py::reinterpret_borrow<py::object>(key) : py::cast(fresh_keys(1)[0]);
  layer.state = get(item(layer.dict.ptr(), name._local), name.state);
  if (field(layer.mode, kRepeatable) == Py_False) return;
  set(layer.state, name.latest, layer.mode);
  set(item(layer.dict.ptr(), name._shared), name.latest, layer.mode);
}

// What is recorded of it, held while the operator runs: other threads may change the layer meanwhile.
std::pair<py::object, py::object> Ordinary::held(const Layer& layer) const {
  auto tensors = py::reinterpret_steal<py::object>(
      PyTuple_Pack(4, layer.tensors[0], layer.tensors[1], layer.tensors[2], layer.tensors[3]));
  return {tensors, py::reinterpret_steal<py::object>(PyTuple_Pack(3, layer.numbers, layer.scale, layer.kl))};
}

void Ordinary::remember(const Layer& layer, const std::pair<py::object, py::object>& held, const py::tuple& kl) const {
  set(layer.state, names().key, layer.key);
  set(layer.state, names().record,
      record_type_(held.first, held.second, layer.key, py::handle(field(layer.mode, kSamples)), kl, false));
}

void Ordinary::append(const Layer& layer, c10::List<at::Tensor>& posterior, c10::List<double>& numbers) {
  for (size_t i = 0; i < layer.count; ++i) {
    posterior.push_back(layer.tensor(i));
    numbers.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(layer.numbers, i)));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

py::object Ordinary::call(py::handle module, py::handle given) const {
  Layer layer;
  if (!THPVariable_CheckExact(given.ptr()) || !ordinary() || value_of(plain_).ptr() != Py_False || !look_at(module, layer))
    return py::none();
  const at::Tensor& x = THPVariable_Unpack(given.ptr());
  if (!fits(linear_, x, layer.tensor(0), layer.samples)) return py::none();
  begin(layer);
  c10::List<at::Tensor> posterior;
  c10::List<double> numbers;
  append(layer, posterior, numbers);
  c10::List<int64_t> options({layer.scale_code, 0, layer.kl_code, layer.samples, 0, 0, 0});
  auto call = c10::make_intrusive<Call>(
      linear_, std::vector<c10::IValue>{std::move(posterior), THPVariable_Unpack(layer.key.ptr()), c10::List<at::Tensor>(),
                                        std::move(numbers), std::move(options)});
  auto kept = held(layer);
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = draw(call, x);
  }
  remember(layer, kept, py::make_tuple(std::move(call)));
  return py::cast(std::move(y));
}

py::object Ordinary::chain(const py::list& modules, py::handle given, int64_t draws) const {
  const Names& name = names();
  if (!THPVariable_CheckExact(given.ptr()) || !eager() || value_of(plain_).ptr() != Py_False) return py::none();
  const at::Tensor& x = THPVariable_Unpack(given.ptr());
  if (x.dim() < 2 || x.layout() != at::kStrided || x.is_nested() || !runs_on(chain_, x)) return py::none();
  std::vector<Layer> layers;
  std::vector<std::array<PyObject*, 2>> fixed;  // weight and bias of those that are not drawn
  std::vector<int64_t> kinds;                   // of each layer, and its activation
  std::vector<double> by_activation;
  std::vector<PyObject*> seen;
  int64_t width = x.size(-1);
  auto add = [&](PyObject* const* tensors, size_t count) {  // whether they continue the chain
    for (size_t i = 0; i < count; ++i) {
      if (!is_tensor(tensors[i]) || std::find(seen.begin(), seen.end(), tensors[i]) != seen.end()) return false;
      seen.push_back(tensors[i]);
      const at::Tensor& t = THPVariable_Unpack(tensors[i]);
      if (t.scalar_type() != x.scalar_type() || t.device() != x.device()) return false;
    }
    const at::Tensor& weight = THPVariable_Unpack(tensors[0]);
    if (weight.dim() != 2 || weight.size(1) != width || std::max(width, weight.size(0)) > most_.first) return false;
    width = weight.size(0);
    by_activation.insert(by_activation.end(), {0.0, 0.0});
    return by_activation.size() <= 2 * static_cast<size_t>(most_.second);
  };
  for (py::handle module : modules) {
    PyObject* child = module.ptr();
    PyObject* step = PyDict_GetItemWithError(steps_.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(child)));
    py::object dict = step ? dict_of(child) : py::object();
    if (!step || !is_plain(dict.ptr())) return py::none();
    if (step == Py_True) {
      Layer& layer = layers.emplace_back();
      if (!look_at(child, layer) || !add(layer.tensors, layer.count)) return py::none();
      const Layer& first = layers[0];
      if (std::tie(layer.samples, layer.scale_code, layer.kl_code) != std::tie(first.samples, first.scale_code, first.kl_code))
        return py::none();
      kinds.insert(kinds.end(), {layer.count == 4 ? 3 : 1, 0});
    } else if (step == Py_False) {
      PyObject* parameters = item(dict.ptr(), name._parameters);
      fixed.push_back({item(parameters, name.weight), item(parameters, name.bias)});
      bool has_bias = fixed.back()[1] != Py_None;
      if (!add(fixed.back().data(), has_bias ? 2 : 1)) return py::none();
      kinds.insert(kinds.end(), {has_bias ? 2 : 0, 0});
    } else {  // an activation: a function that gives its code and numbers
      if (kinds.empty() || kinds.back() != 0) return py::none();
      auto found = py::reinterpret_steal<py::object>(PyObject_CallOneArg(step, child));
      if (!found) throw py::error_already_set();
      if ((kinds.back() = PyLong_AsLongLong(PyTuple_GET_ITEM(found.ptr(), 0))) == 0) return py::none();
      for (int i = 0; i < 2; ++i) by_activation[by_activation.size() - 2 + i] = PyFloat_AsDouble(PyTuple_GET_ITEM(found.ptr(), 1 + i));
      if (PyErr_Occurred()) throw py::error_already_set();
    }
  }
  if (layers.empty() || kinds.size() < 4) return py::none();
  int64_t samples = layers[0].samples;
  if (draws == 1 ? x.size(0) % samples != 0 : draws != samples) return py::none();
  bool sixteen = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  if (x.scalar_type() != at::kFloat && !(x.is_cpu() ? x.scalar_type() == at::kDouble : sixteen)) return py::none();

  c10::List<at::Tensor> parameters, keys;
  c10::List<double> numbers;
  bool with_kl = at::GradMode::is_enabled();
  c10::List<int64_t> options({layers[0].scale_code, 0, with_kl ? layers[0].kl_code : 0, samples, draws > 1});
  std::vector<std::pair<py::object, py::object>> kept;
  auto drawn = layers.begin();
  auto constant = fixed.begin();
  for (size_t i = 0; i < kinds.size(); i += 2) {
    if (kinds[i] & 1) {
      begin(*drawn);
      keys.push_back(THPVariable_Unpack(drawn->key.ptr()));
      append(*drawn, parameters, numbers);
      kept.push_back(held(*drawn++));
    } else {
      parameters.push_back(THPVariable_Unpack((*constant)[0]));
      if (kinds[i] & 2) parameters.push_back(THPVariable_Unpack((*constant)[1]));
      ++constant;
    }
  }
  for (int64_t kind : kinds) options.push_back(kind);
  for (double number : by_activation) numbers.push_back(number);
  auto call = c10::make_intrusive<Call>(chain_, std::vector<c10::IValue>{std::move(parameters), std::move(keys),
                                                                          c10::List<at::Tensor>(), std::move(numbers), std::move(options)});
  call->layers = static_cast<int64_t>(layers.size());
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = with_kl ? draw(call, x) : call->run(x);
  }
  if (!with_kl) {
    for (const Layer& layer : layers) set(layer.state, name.key, layer.key);
    return py::cast(std::move(y));
  }
  py::tuple kl = py::make_tuple(std::move(call));
  for (size_t i = 0; i < layers.size(); ++i) remember(layers[i], kept[i], kl);
  return py::cast(std::move(y));
}

}  // namespace bnn_fast
