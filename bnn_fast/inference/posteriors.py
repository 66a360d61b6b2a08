"""The posterior of a whole model as distributions, and priors set by name: yesterday's posterior is today's prior."""
from __future__ import annotations

from typing import Callable

from torch import Tensor, nn

from .. import checks
from ..layers.base import VariationalLayer, named_layers
from ..priors import Normal

__all__ = ["posterior", "set_prior"]


def posterior(model: nn.Module) -> dict[str, Normal]:
    """The posterior of every weight and bias of the variational layers of `model`: detached copies under the parameters' qualified
    names without "_mu" ("0.weight", "0.bias"). A pruned weight's scale is 1. Parameters that layers share come once.
    """
    checks.module("model", model)
    found = {}
    for places in _shared(model):
        name, layer, pair = places[0]
        found[name] = layer.posterior()[pair]
    return found


def set_prior(model: nn.Module, prior: Normal | dict[str, Normal] | Callable[[str, Tensor], Normal | None]) -> None:
    """Set the priors of a model's variational layers, before or after training: the KL is to them from now on.

    Args:
        prior: a Normal, for all weights and biases; a dictionary of Normals by names as `posterior` gives them, the others keeping
            theirs; or a function of (name, mu) that gives a Normal, or None to leave that one.

    `set_prior(model, posterior(model))` makes the posterior the prior of what is learned next (Nguyen et al., "Variational
    Continual Learning", 2018); the KL is 0 then. A prior of tensors is in the state_dict. Layers that share parameters share
    what is set.

    ValueError or TypeError, before any is set, if there is no such name or a prior does not fit.
    """
    checks.module("model", model)
    shared = _shared(model)
    checks.any_layers(model, shared, "there is no prior to set")
    known = {name: places for places in shared for name, _, _ in places}
    if isinstance(prior, dict):
        unknown = [name for name in prior if name not in known]
        if unknown:
            raise ValueError(f"prior: expected names among {', '.join(known)}, given {unknown[0]!r}")
        given = {id(known[name]): value for name, value in prior.items()}

        def choose(places):
            return given.get(id(places))
    elif callable(prior) and not isinstance(prior, type):
        def choose(places):
            name, layer, pair = places[0]
            return prior(name, getattr(layer, f"{pair}_mu").detach())
    else:
        def choose(places):
            return prior
    chosen = []
    for places in shared:
        value = choose(places)
        if value is not None:
            chosen += [(layer, pair, layer.fitting_prior(pair, value)) for _, layer, pair in places]
    for layer, pair, fitting in chosen:
        layer.set_prior(pair, fitting)


def _shared(model: nn.Module) -> list[list[tuple[str, VariationalLayer, str]]]:
    """For each posterior of the model where it is: [(qualified name, layer, its name in the layer), ...]."""
    found: dict[tuple, list] = {}
    for name, layer in named_layers(model):
        for identity, pair in zip(layer.identities(), layer.pairs()):
            found.setdefault(identity, []).append((f"{name}.{pair.name}" if name else pair.name, layer, pair.name))
    return list(found.values())
