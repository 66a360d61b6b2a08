"""Any model made variational, and the other way: every layer that has a counterpart here, or those that are chosen."""
from __future__ import annotations

import copy
import fnmatch
import inspect
import sys
from typing import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from . import checks
from .inference.posteriors import set_prior
from .inference.sampling import draw
from .layers import __all__ as _NAMES
from .layers.base import VariationalLayer
from .priors import Normal
from .priors.initialisation import INITIALISATIONS
from .priors.scales import convert_rho, softplus_inverse

__all__ = ["to_variational", "to_deterministic"]

_COUNTERPARTS = {getattr(nn, name.removeprefix("Variational")): getattr(sys.modules[f"{__package__}.layers"], name) for name in _NAMES
                 if hasattr(nn, name.removeprefix("Variational"))}
_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")
_LEAST = 1e-4   # of MOPED's sigma, over the root mean square of the tensor: a weight of 0 would have sigma 0, which is pruned for good


def to_variational(model: nn.Module, layers=None, *, prior: Normal | Callable[[str, Tensor], Normal | None] = Normal(0.0, 1.0),
                   init: str = "default", delta: float = 0.1, inplace: bool = False,
                   options: dict[str, dict] | None = None, **keywords) -> nn.Module:
    """`model` with variational layers in place of those of torch that have a counterpart (bnn_fast.Variational*).

    Args:
        model: any module; a copy of it is converted, or with inplace=True itself (unless it is a layer, which cannot be replaced).
        layers: which. None for all; names or patterns of them ("layer4.*", "fc", as in fnmatch), one or several; a class or several; a
            function of (name, module) that says so; or "last", the last in the order of the modules.
        prior: a Normal for all weights and biases, or a function of (qualified name, mean) as `set_prior` takes it:
            `lambda name, mean: Normal(mean, 1.0)` is the prior around the trained weights.
        init: a named initialisation, for a new network; or "moped" (Krishnan et al., "Specifying weight priors in Bayesian deep neural
            networks with empirical Bayes", 2020): means are the model's weights, and sigma is delta |w|, no less than 1e-4 of the
            root mean square of the tensor; or init_sigma where that is given.
        delta: of MOPED.
        options: further keyword arguments by pattern of the layer's name, later patterns counting more: {"head": {"kl": "sampled"}}.
        keywords: those of every layer: bias_prior, scale, kl, init_sigma.

    Parameters that layers share stay shared, absent biases absent; training mode, device, dtype, requires_grad, hooks and buffers are as
    they were. Layers are converted whole: nn.MultiheadAttention with its out_proj. Subclasses of torch's layers are left, as
    what they compute may be another thing; for any other module there is `Variational`.

    ValueError if nothing is chosen, or a chosen layer has no counterpart or is parametrized (torch.nn.utils.parametrize, weight_norm).
    """
    checks.module("model", model)
    checks.flags(inplace=inplace)
    checks.choice("init", init, {**INITIALISATIONS, "moped": None})
    delta = checks.positive("delta", delta)
    if not isinstance(prior, (Normal, torch.distributions.Normal)) and (not callable(prior) or isinstance(prior, type)):
        raise TypeError(f"prior: expected a Normal or a function of (name, mean), given {checks.describe(prior)}")
    if not inplace:
        model = copy.deepcopy(model)
    chosen = _chosen(model, layers)
    if inplace and "" in chosen:
        raise ValueError("inplace: expected False for a model that is one layer, which cannot be replaced where it is")
    made: dict[int, VariationalLayer] = {}
    shared: dict[nn.Parameter, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, module in chosen.items():
        own = {"init": "default" if init == "moped" else init, **keywords}
        for pattern, given in (options or {}).items():
            own |= given if fnmatch.fnmatchcase(name, pattern) else {}
        made[id(module)] = layer = _layer(name, module, own)
        for pair, (source, parameter) in zip(layer.pairs(), _sources(layer, module)):
            if init == "moped":
                _moped(layer, pair, parameter, None if own.get("init_sigma") is not None else delta)
            if parameter in shared:
                layer.register_parameter(f"{pair.name}_mu", shared[parameter][0])
                layer.register_parameter(f"{pair.name}_rho", shared[parameter][1])
            shared.setdefault(parameter, (pair.mu, pair.rho))
    converted = made[id(model)] if id(model) in made else model
    for owner in [] if id(model) in made else list(model.modules()):
        for name, child in owner._modules.items():
            if id(child) in made:
                owner._modules[name] = made[id(child)]
    new = {id(layer) for layer in made.values()}
    kept = any("bias_prior" in given for given in (keywords, *(options or {}).values()))
    names = [f"{name}.{pair.name}" if name else pair.name for name, layer in converted.named_modules() if id(layer) in new
             for pair in layer.pairs() if not (kept and layer._is_bias(pair.name))]
    if isinstance(prior, (Normal, torch.distributions.Normal)):
        set_prior(converted, dict.fromkeys(names, prior))
    else:
        set_prior(converted, lambda name, mean: prior(name, mean) if name in names else None)
    return converted


def to_deterministic(model: nn.Module) -> nn.Module:
    """The means of a model as an ordinary one: torch's layers in place of the variational ones, in a copy."""
    return draw(model, mean=True)


def _chosen(model: nn.Module, layers) -> dict[str, nn.Module]:
    """The modules to be converted, by their first names."""
    inside = {id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
              if part is not module}
    known = {name: module for name, module in model.named_modules()
             if type_before_parametrizations(module) in _COUNTERPARTS and id(module) not in inside}
    if layers is None:
        chosen = known
    elif isinstance(layers, str) and layers == "last":
        chosen = dict(list(known.items())[-1:])
    elif callable(layers) and not isinstance(layers, type):
        chosen = {name: module for name, module in model.named_modules() if layers(name, module)}
    else:
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
    for name, module in chosen.items():
        if is_parametrized(module) or any("weight_norm" in type(hook).__module__ or "spectral_norm" in type(hook).__module__
                                                      for hook in module._forward_pre_hooks.values()):
            raise ValueError(f"model: expected layers with parameters of their own, given {name!r}, whose are parametrized: remove that "
                             "first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)")
        if type(module) not in _COUNTERPARTS:
            raise ValueError(f"layers: expected layers that have a counterpart, given {name!r}, {checks.describe(type(module))}: "
                             "bnn_fast.Variational(module) draws the parameters of any")
    if not chosen:
        raise ValueError(f"model: expected layers that have a counterpart, found none in {type(model).__name__}: "
                         "bnn_fast.Variational(module) draws the parameters of any module")
    return chosen


def _has_bias(module: nn.Module) -> bool:
    bias = module.in_proj_bias if isinstance(module, nn.MultiheadAttention) else module.bias
    return bias if isinstance(bias, bool) else bias is not None


_SETTINGS = {"bias": _has_bias, "add_bias_kv": lambda module: module.bias_k is not None}    # others are attributes


def _layer(name: str, module: nn.Module, options: dict) -> VariationalLayer:
    """The counterpart with the module's settings and buffers."""
    kind = _COUNTERPARTS[type(module)]
    arguments = {argument: _SETTINGS.get(argument, lambda m: getattr(m, argument))(module)   # torch's own come first, in its order
                 for argument, parameter in inspect.signature(kind).parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY}
    parameter = next(module.parameters(), None)
    if parameter is not None:
        arguments |= {"device": parameter.device, "dtype": parameter.dtype}
    try:
        layer = kind(**arguments, **options)
    except TypeError as error:
        raise TypeError(f"{name or type(module).__name__}: {error}") from None
    for buffer, value in module._buffers.items():
        layer._buffers[buffer] = value
    for hooks in _HOOKS:
        getattr(layer, hooks).update(getattr(module, hooks))
    for pair, (_, own) in zip(layer.pairs(), _sources(layer, module)):
        pair.mu.requires_grad_(own.requires_grad), pair.rho.requires_grad_(own.requires_grad)
    return layer.train(module.training)


def _sources(layer: VariationalLayer, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = layer._named(module) if hasattr(layer, "_named") else module._parameters
    return [(name, parameter) for name, parameter in named.items() if parameter is not None]


@torch.no_grad()
def _moped(layer: VariationalLayer, pair, w: Tensor, delta: float | None) -> None:
    """mu = w; sigma = delta |w|, unless that is None."""
    pair.mu.copy_(w)
    if delta is not None:
        least = max(_LEAST * w.double().square().mean().sqrt().item(), 1e-6) if w.numel() else 1.0
        pair.rho.copy_(convert_rho(softplus_inverse((delta * w.double().abs()).clamp(min=least)), layer.scale))
