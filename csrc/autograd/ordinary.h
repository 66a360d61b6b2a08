// What a training step of linear layers asks of bnn_fast/layers and bnn_fast/inference where nothing is unusual, each in one step,
// as a small layer would feel every line of Python: entering a context of pinned keys, a layer's call, the read of a model's
// KL. Whatever is not looked at here is left to Python.
#pragma once

#include <torch/extension.h>

#include "call.h"
#include "surroundings.h"

namespace bnn_fast {

// Each method gives None, and nothing has happened, where anything is unusual.
class Ordinary {
 public:
  // The operators of a linear layer and a chain; the context variables of `sampling` and `plain`; the mode of a layer that no
  // context covers; state.Record; VariationalLayer; the numbers of scales and KLs; the types that a chain is made of: True for
  // layers that are drawn, False for those that are not, of an activation the function that gives its code and numbers; how
  // wide and how many its layers are at most.
  Ordinary(const Operator& linear, const Operator& chain, pybind11::object stack, pybind11::object plain, pybind11::tuple uncovered,
           pybind11::object record_type, pybind11::object layer_type, pybind11::dict scales, pybind11::dict kls,
           pybind11::dict steps, std::pair<int64_t, int64_t> most);

  // y of a linear layer, whose state is then what the call leaves.
  pybind11::object call(pybind11::handle layer, pybind11::handle x) const;

  // The same of modules that are one chain; draws: of so many, which x is that of all of.
  pybind11::object chain(const pybind11::list& modules, pybind11::handle x, int64_t draws) const;

  // The sum of the KLs that the latest calls of the model's layers left, which are taken from them. generation: that of steps.py;
  // of_pass: whether they have to be of calls with the keys of the context around.
  pybind11::object handed_over(pybind11::handle model, pybind11::handle generation, bool of_pass) const;

  // (layers, their modes in a dictionary): of new keys, one for those that share their parameters. The layers' states have the modes.
  pybind11::object pinned(pybind11::handle model, pybind11::handle mode_of_key) const;

 private:
  struct Layer;

  pybind11::object mode_of(pybind11::handle layer) const;
  std::vector<pybind11::object> layers_of(pybind11::handle model) const;
  bool look_at(pybind11::handle layer, Layer& found) const;
  void begin(Layer& layer) const;
  std::pair<pybind11::object, pybind11::object> held(const Layer& layer) const;
  void remember(const Layer& layer, const std::pair<pybind11::object, pybind11::object>& held, const pybind11::tuple& kl) const;
  static PyObject* pinned_key(const Layer& layer);
  static void append(const Layer& layer, c10::List<at::Tensor>& posterior, c10::List<double>& numbers);

  const Operator linear_, chain_;
  const pybind11::object stack_, plain_;
  const pybind11::tuple uncovered_;
  const pybind11::object record_type_, layer_type_;
  const pybind11::dict scales_, kls_, steps_;
  const std::pair<int64_t, int64_t> most_;
};

}  // namespace bnn_fast
