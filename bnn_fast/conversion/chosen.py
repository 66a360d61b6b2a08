"""Which layers of a model are converted, and which cannot be."""
from __future__ import annotations

import fnmatch
import sys
from typing import Iterable

from torch import nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import type_before_parametrizations

from .. import checks
from ..layers import __all__ as _NAMES
from ..layers.base import VariationalLayer

_LAYERS = sys.modules[f"{__package__.rpartition('.')[0]}.layers"]
COUNTERPARTS = {getattr(nn, name.removeprefix("Variational")): getattr(_LAYERS, name) for name in _NAMES
                if name.startswith("Variational") and hasattr(nn, name.removeprefix("Variational"))}


def choose(model: nn.Module, layers) -> dict[str, nn.Module]:
    """The modules to be converted, by their first names: see `to_variational`."""
    inside = {id(part) for module in model.modules() if isinstance(module, (nn.MultiheadAttention, VariationalLayer))
              for part in module.modules() if part is not module}  # is that layer's own affair
    offered = {name: module for name, module in model.named_modules() if id(module) not in inside}
    known = {name: module for name, module in offered.items() if _kind(module) in COUNTERPARTS}
    if layers is None:
        chosen = known
    elif isinstance(layers, str) and layers == "last":
        chosen = dict([item for item in known.items() if next(item[1].parameters(), None) is not None][-1:])
    elif callable(layers) and not isinstance(layers, type):
        chosen = {name: module for name, module in offered.items() if layers(name, module)}
    else:
        chosen = _named(known, layers)
    for name, module in chosen.items():
        if _kind(module) not in COUNTERPARTS:
            raise ValueError(f"layers: expected layers that have a counterpart, given {name!r}, {checks.describe(type(module))}: "
                             "bnn_fast.Variational(module) draws the parameters of any")
        if any(isinstance(parameter, UninitializedTensorMixin) for parameter in module.parameters()):
            raise ValueError(f"model: expected layers whose parameters have shapes, given {name!r}, a lazy one: call the model once before")
    if not chosen:
        raise ValueError(f"model: expected layers that have a counterpart, found none in {type(model).__name__}: "
                         "bnn_fast.Variational(module) draws the parameters of any module")
    return chosen


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class that counts, behind torch.nn.utils.parametrize and laziness."""
    kind = type_before_parametrizations(module)
    return getattr(kind, "cls_to_become", None) or kind


def _named(known: dict[str, nn.Module], layers) -> dict[str, nn.Module]:
    wanted = [layers] if isinstance(layers, (str, type)) else list(layers) if isinstance(layers, Iterable) else None
    if wanted is None or not all(isinstance(one, (str, type)) for one in wanted):
        raise TypeError("layers: expected None, 'last', names, patterns, classes, or a function of (name, module), "
                        f"given {checks.describe(layers)}")
    chosen = {}
    for one in wanted:
        fits = {name: module for name, module in known.items()
                if (isinstance(module, one) if isinstance(one, type) else fnmatch.fnmatchcase(name, one))}
        if not fits:
            raise ValueError(f"layers: expected names, patterns or classes of layers among {', '.join(known) or 'none'}, "
                             f"given {one.__name__ if isinstance(one, type) else repr(one)}")
        chosen.update(fits)
    return chosen


def refuse_partial_ties(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """ValueError if a layer that is converted shares a parameter with a module that is not."""
    owners = {id(parameter): name for name, module in chosen.items() for parameter in module.parameters()}
    parts = {id(part) for module in chosen.values() for part in module.modules()}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if id(module) not in parts and parameter is not None and id(parameter) in owners:
                raise ValueError(f"layers: expected all that share a parameter, or none of them, given {owners[id(parameter)]!r} without "
                                 f"{name!r}, which has it as {own!r}: choose both, give one a parameter of its own, or draw a "
                                 "module that holds both by bnn_fast.Variational(module)")
