"""What the counterparts of torch's modules have in common."""
from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from .. import checks
from ..operators import functional
from .base import VariationalLayer


class Counterpart(VariationalLayer):
    """A layer that computes what a module of torch does, with drawn weights; it has the names, shapes and settings of that module.

    Args:
        arguments: of the module's constructor, by name, without device and dtype.
        options: of VariationalLayer.
    """
    ordinary: type[nn.Module]
    begins: dict[str, float] = {}   # what means begin with, by name: see add_posterior
    no_settings: tuple[str, ...] = ()   # attributes of the module that are none

    def __init__(self, arguments: dict, **options):
        super().__init__(**options)
        module = self.ordinary(**arguments, device="meta")
        self._described = (module,)     # in a tuple: it is none of the layer's modules
        self._settings = tuple(name for name in vars(module) if name not in vars(nn.Module()) and name not in self.no_settings)
        for name in self._settings:
            setattr(self, name, getattr(module, name))
        fan_in = self._fan_in(module)
        for name, parameter in self._named(module).items():
            self.add_posterior(name, None if parameter is None else tuple(parameter.shape), fan_in, self.begins.get(name))

    def _named(self, module: nn.Module) -> dict[str, nn.Parameter | None]:
        """The module's parameters by the names of their posteriors."""
        return module._parameters

    def _put(self, module: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        for name, w in weights.items():
            setattr(module, name, w)

    def _fan_in(self, module: nn.Module) -> int:
        """Inputs of one output."""
        return math.prod(module.weight.shape[1:])

    def drawn(self, key: Tensor | None) -> nn.Module:
        module = self._like_this()
        self._put(module, {name: nn.Parameter(w) for name, w in self.weights(key).items()})
        for name in module._buffers:
            buffer = self._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.detach().clone()
        return module.train(self.training)

    def _like_this(self) -> nn.Module:
        """The ordinary module with the settings as they are now, without weights."""
        module = copy.deepcopy(self._described[0])
        for name in self._settings:
            setattr(module, name, copy.copy(getattr(self, name)))
        return module

    def _check(self, name: str, x: Tensor) -> None:
        """dtype and device of an input."""
        mu = next((t for t in self.tensors() if t is not None), None)
        if mu is not None:
            checks.like_parameters(name, x, mu, functional.autocasting(x))

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (self._like_this().extra_repr(), super().extra_repr())))


def in_dtype(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) for an operator of torch that wants them in x's dtype; where autocast is on, that is its own affair."""
    found = weights.get("weight"), weights.get("bias")
    if functional.autocasting(x):
        return found
    return tuple(None if w is None else w.to(x.dtype) for w in found)
