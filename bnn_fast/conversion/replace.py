"""Layers put in the place of others, with what a model has beside its weights: mode, hooks, buffers, ties."""
from __future__ import annotations

import copy

from torch import nn

from ..layers.base import VariationalLayer

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")


class Ties:
    """Parameters that several layers have, so that their counterparts share a posterior, too."""

    def __init__(self):
        self._known: dict[object, tuple[str, VariationalLayer, str]] = {}

    def share(self, name: str, layer: VariationalLayer, pair: str, source: object) -> None:
        """The posterior `pair` of the layer stands for `source`; if another layer's does already, it becomes that one."""
        first, other, others_pair = self._known.setdefault(source, (name, layer, pair))
        if other is layer:
            return
        if other.scale != layer.scale:
            raise ValueError(f"scale: expected one for layers that share a parameter, given {other.scale!r} for {first!r} and "
                             f"{layer.scale!r} for {name!r}")
        for kind in ("mu", "rho"):
            layer.register_parameter(f"{pair}_{kind}", other._parameters[f"{others_pair}_{kind}"])


def replace(model: nn.Module, made: list[tuple[nn.Module, VariationalLayer]], inplace: bool = False) -> nn.Module:
    """The model with each of these layers in place of the module beside it: a copy, or itself."""
    layers = {id(module): layer for module, layer in made}
    if inplace:
        for owner in list(model.modules()):
            for name, child in owner._modules.items():
                if id(child) in layers:
                    owner._modules[name] = layers[id(child)]
        converted, of_layer = model, lambda value: value
    else:  # deepcopy takes what its memo holds for a module wherever it meets the module
        converted = copy.deepcopy(model, layers)
        of_layer = lambda value: copy.deepcopy(value, layers)  # noqa: E731  a hook may be a method of the model: of the copy then
    for module, layer in made:
        for name in module._buffers.keys() & layer._buffers.keys():
            layer._buffers[name] = of_layer(module._buffers[name])
        for hooks in _HOOKS:
            setattr(layer, hooks, of_layer(getattr(module, hooks)))
        layer.train(module.training)
    for encoder in converted.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(part in layers.values() for part in encoder.modules()):
            encoder.use_nested_tensor = False  # which is of the fused path, and no layer here takes
    return converted
