"""A model's layers made variational, and the other way."""
from __future__ import annotations

import fnmatch
import inspect
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .. import checks
from ..inference.posteriors import set_prior
from ..inference.sampling import draw
from ..layers.base import VariationalLayer, named_layers
from ..priors import Normal
from ..priors.initialisation import INITIALISATIONS
from ..priors.scales import convert_rho, softplus_inverse
from .chosen import COUNTERPARTS, choose, refuse_partial_ties
from .replace import Ties, replace

_LEAST = 1e-4   # of MOPED's sigma, over the root mean square of the tensor: a weight of 0 would have sigma 0, which is pruned for good
_INITS = {**INITIALISATIONS, "moped": None}


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
        options: further keyword arguments by pattern of the layer's name, later patterns counting more:
            {"head": {"kl": "sampled", "prior": Normal(0.0, 0.1)}}; init and delta may be among them.
        keywords: those of every layer: bias_prior, scale, kl, init_sigma.

    Parameters that layers share stay shared, absent biases absent; training mode, device, dtype, requires_grad, hooks and buffers are as
    they were. Layers are converted whole: nn.MultiheadAttention with its out_proj. An nn.TransformerEncoder no longer makes nested
    tensors of padded batches. Subclasses of torch's layers are left, as what they compute may be another thing; for them, for any
    other module, and for one that reads the `.weight` of a child there is `Variational`, which draws it whole.

    ValueError if nothing is chosen, or a chosen layer has no counterpart, shares a parameter with a module that is not chosen, has
    parameters that are made of others (torch.nn.utils.parametrize, weight_norm, prune), or none yet.
    """
    checks.module("model", model)
    checks.flags(inplace=inplace)
    if not isinstance(prior, (Normal, torch.distributions.Normal)) and (not callable(prior) or isinstance(prior, type)):
        raise TypeError(f"prior: expected a Normal or a function of (name, mean), given {checks.describe(prior)}")
    chosen = choose(model, layers)
    if inplace and model in chosen.values():
        raise ValueError("inplace: expected False for a model that is one layer, which cannot be replaced where it is")
    refuse_partial_ties(model, chosen)
    made, ties, names = [], Ties(), []
    for name, own in _options(list(chosen), {"init": init, "delta": delta, **keywords}, options).items():
        module = chosen[name]
        layer = _layer(name, module, own)
        sources = _sources(layer, module)
        for pair in layer.pairs():
            source = sources[pair.name]
            if own["init"] == "moped":
                _moped(layer, pair, source, None if own.get("init_sigma") is not None else own["delta"])
            pair.mu.requires_grad_(source.requires_grad), pair.rho.requires_grad_(source.requires_grad)
            ties.share(name, layer, pair.name, source)
            if "prior" not in own and not (own.get("bias_prior") is not None and layer._is_bias(pair.name)):
                names.append(f"{name}.{pair.name}" if name else pair.name)
        made.append((module, layer))
    converted = replace(model, made, inplace)
    if isinstance(prior, (Normal, torch.distributions.Normal)):
        set_prior(converted, dict.fromkeys(names, prior))
    else:
        set_prior(converted, lambda name, mean: prior(name, mean) if name in names else None)
    return converted


def to_deterministic(model: nn.Module) -> nn.Module:
    """The means of a model as an ordinary one: torch's layers in place of the variational ones, in a copy. Parameters that layers share
    stay shared, and have the requires_grad of the means; hooks of the layers are left.
    """
    ordinary, known = draw(model, mean=True), {}
    for name, layer in named_layers(model):
        for identity, pair in zip(layer.identities(), layer.pairs()):
            for place in layer.places(pair.name):
                owner, _, own = f"{name}.{place}".lstrip(".").rpartition(".")
                module = ordinary.get_submodule(owner)
                setattr(module, own, known.setdefault(identity, getattr(module, own)))
            known[identity].requires_grad_(pair.mu.requires_grad)
    return ordinary


def _options(names: list[str], keywords: dict, options: dict[str, dict] | None) -> dict[str, dict]:
    """Each layer's keyword arguments, with init and delta."""
    if options is not None and not (isinstance(options, dict) and all(isinstance(given, dict) for given in options.values())):
        raise TypeError(f"options: expected a dictionary of dictionaries by pattern, given {checks.describe(options)}")
    found = {name: dict(keywords) for name in names}
    for pattern, given in (options or {}).items():
        fits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not fits:
            raise ValueError(f"options: expected patterns of layers among {', '.join(names)}, given {pattern!r}")
        for name in fits:
            found[name] |= given
    for own in found.values():
        checks.choice("init", own["init"], _INITS)
        own["delta"] = checks.positive("delta", own["delta"])
    return found


def _has_bias(module: nn.Module) -> bool:
    bias = module.in_proj_bias if isinstance(module, nn.MultiheadAttention) else module.bias
    return bias if isinstance(bias, bool) else bias is not None


_SETTINGS = {"bias": _has_bias, "add_bias_kv": lambda module: module.bias_k is not None}    # others are attributes


def _layer(name: str, module: nn.Module, own: dict) -> VariationalLayer:
    """The counterpart with the module's settings."""
    kind = COUNTERPARTS[type_before_parametrizations(module)]
    arguments = {argument: _SETTINGS.get(argument, lambda m: getattr(m, argument))(module)   # torch's own come first, in its order
                 for argument, parameter in inspect.signature(kind).parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY}
    parameter = next(module.parameters(), None)
    if parameter is not None:
        arguments |= {"device": parameter.device, "dtype": parameter.dtype}
    options = {option: value for option, value in own.items() if option != "delta"}
    if own["init"] == "moped":
        options["init"] = "default"
    try:
        layer = kind(**arguments, **options)
    except TypeError as error:
        raise TypeError(f"{name or type(module).__name__}: {error}") from None
    expected, found = [pair.name for pair in layer.pairs()], list(_sources(layer, module))
    if set(expected) != set(found):
        raise ValueError(f"model: expected layers with parameters of their own, given {name!r}, whose are parametrized: remove that first. "
                         f"{', '.join(expected)} are expected, and there are {', '.join(found)} (torch.nn.utils has "
                         "parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm and prune.remove)")
    layer._buffers |= module._buffers
    layer._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return layer


def _sources(layer: VariationalLayer, module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters by the names of the layer's posteriors."""
    named = layer._named(module) if hasattr(layer, "_named") else module._parameters
    return {name: parameter for name, parameter in named.items() if parameter is not None}


@torch.no_grad()
def _moped(layer: VariationalLayer, pair, w: Tensor, delta: float | None) -> None:
    """mu = w; sigma = delta |w|, unless that is None."""
    pair.mu.copy_(w)
    if delta is not None:
        least = max(_LEAST * w.double().square().mean().sqrt().item(), 1e-6) if w.numel() else 1.0
        pair.rho.copy_(convert_rho(softplus_inverse((delta * w.double().abs()).clamp(min=least)), layer.scale))
