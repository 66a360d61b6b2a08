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
  // The linear layer's operator; the context variables of `sampling` and `plain`; the mode of a layer that no context covers;
  // state.Record; VariationalLayer; the numbers of scales and KLs.
  Ordinary(const Operator& op, pybind11::object stack, pybind11::object plain, pybind11::tuple uncovered,
           pybind11::object record_type, pybind11::object layer_type, pybind11::dict scales, pybind11::dict kls);

  // y of a linear layer, whose state is then what the call leaves.
  pybind11::object call(pybind11::handle layer, pybind11::handle x) const;

  // The sum of the KLs that the latest calls of the model's layers left, which are taken from them. generation: that of steps.py;
  // of_pass: whether they have to be of calls with the keys of the context around.
  pybind11::object handed_over(pybind11::handle model, pybind11::handle generation, bool of_pass) const;

  // (layers, their modes in a dictionary): of new keys, one for those that share their parameters. The layers' states have the modes.
  pybind11::object pinned(pybind11::handle model, pybind11::handle mode_of_key) const;

 private:
  pybind11::object mode_of(pybind11::handle layer) const;
  std::vector<pybind11::object> layers_of(pybind11::handle model) const;

  const Operator op_;
  const pybind11::object stack_, plain_;
  const pybind11::tuple uncovered_;
  const pybind11::object record_type_, layer_type_;
  const pybind11::dict scales_, kls_;
};

}  // namespace bnn_fast
