"""A layer with one draw of its weights, as an ordinary module."""
from __future__ import annotations

import copy

from torch import Tensor, nn


class Drawn(nn.Module):
    """What a variational layer without an ordinary counterpart becomes: its weights are parameters of their names, and its forward
    is the layer's `compute`. Whatever else the layer holds is copied.
    """

    def __init__(self, layer: nn.Module, weights: dict[str, Tensor]):
        super().__init__()
        own = {*layer.names, *layer._prior_buffers, "frozen_key"}
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            rest = {name: value for name, value in getattr(layer, kind).items() if name not in own} if kind != (
                "_non_persistent_buffers_set") else getattr(layer, kind) - own
            getattr(self, kind).update(copy.deepcopy(rest))
        self._names = tuple(weights)
        self.train(layer.training)
        # The layer without what makes it variational, its parameters, buffers and modules being those of this module. It is
        # none of the modules itself.
        shell = copy.copy(layer)
        shell.__dict__.update({kind: self.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")})
        self.__dict__["_layer"] = shell

    def forward(self, *inputs, **keywords):
        self._layer.training = self.training
        return self._layer.compute({name: self._parameters[name] for name in self._names}, *inputs, **keywords)

    def extra_repr(self) -> str:
        return type(self._layer).__name__
