"""Networks of narrow layers that run as one operator: made, or made of models that there are."""
from __future__ import annotations

from collections.abc import Callable, Sequence as SequenceOf

from torch import nn

from .. import checks
from .chain import Sequential, parts
from .variational_linear import VariationalLinear

_BY_NAME = {"identity": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU,
            "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
            "softplus": nn.Softplus}


class VariationalMLP(Sequential):
    """VariationalLinear layers of these sizes with an activation between them, x [..., sizes[0]] -> y [..., sizes[-1]].

    Args:
        sizes: at least two: of the inputs, the hidden layers, the outputs.
        activation: "identity", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid" or "softplus"; or what makes
            a module, such as nn.Hardswish, called once for each hidden layer.
        options: those of every VariationalLinear: bias, prior, scale, kl, init, init_sigma, estimator, device, dtype.

    Where layers are at most 128 wide it runs as one operator: see `Sequential`. Raises TypeError or ValueError for a size that is
    no number, fewer than two of them, an unknown activation, and as VariationalLinear does.
    """

    def __init__(self, sizes: SequenceOf[int], activation: str | Callable[[], nn.Module] = "relu", **options):
        if not isinstance(sizes, (list, tuple)):
            raise TypeError(f"sizes: expected a list or tuple of integers, given {checks.describe(sizes)}")
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least 2, of inputs and outputs, given {checks.describe(sizes)}")
        sizes = [checks.integer(f"sizes[{i}]", size, 0) for i, size in enumerate(sizes)]
        if not callable(activation):
            checks.choice("activation", activation, checks.ACTIVATIONS)
            activation = _BY_NAME[activation]
        modules = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            modules += [VariationalLinear(inputs, outputs, **options), activation()]
        if not isinstance(modules[1], nn.Module):
            raise TypeError(f"activation: expected a name or what makes a module, given what makes {checks.describe(modules[1])}")
        super().__init__(*modules[:-1])


def fuse(model: nn.Module) -> nn.Module:
    """Make a `Sequential` of every nn.Sequential in `model`, itself included, that has a chain in it: in place, with the same names,
    state and hooks. Returns the model. TypeError if it is no module.
    """
    checks.module("model", model)
    for module in model.modules():
        if type(module) is nn.Sequential and any(isinstance(part, list) for part in parts(module._modules.values())):
            module.__class__ = Sequential
    return model
