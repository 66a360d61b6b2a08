"""Models of bayesian-torch, torchbnn, blitz and torch-uncertainty, and their state_dicts, taken over."""
from __future__ import annotations

import re
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .. import checks
from ..layers.base import VariationalLayer, named_layers
from ..layers.posterior import Pair
from ..priors import Normal
from ..priors.scales import convert_rho, softplus_inverse
from .peers import LIBRARIES, Peer, arranged, counterpart, keys_of, name_of, recognise, unknown
from .replace import Ties, replace


def import_from(model: nn.Module, *, prior: Normal | Callable[[str, Tensor], Normal | None] | None = None) -> nn.Module:
    """A copy of a model of bayesian-torch, torchbnn, blitz or torch-uncertainty with layers of bnn_fast in place of theirs: with the
    same means, sigmas (and rho, as `scale` says) and priors, trained or not. No library need be installed for its layers to be known.

    Args:
        model: with their layers: linear layers, convolutions (transposed ones too), LSTM and GRU, embeddings, torchbnn's BatchNorm; or
            one such layer. Other modules are copied.
        prior: in place of their priors: a Normal, or a function of (qualified name, mean) that gives one, or None to keep theirs. A
            scale mixture (blitz, torch-uncertainty: prior_pi between 0 and 1) has no counterpart, so that one has to be given.

    The KL of `kl_divergence` is that of all weights, in sum. Theirs is, of the same posteriors and priors:

        bayesian-torch      `get_kl_loss`: for each layer the mean over its weights plus that over its biases, summed over layers
                            (twice for an LSTM)
        torchbnn            `BKLLoss`: the mean over all weights, `kl_divergence(model, "mean")`; with reduction="sum" the same as here
        blitz               sampled; the density of its prior is no less than 1e-6
        torch-uncertainty   `KLDiv`: sampled, 0.5 too small for each weight, averaged over layers

    Their own losses find no layers in the result. Other than there are: flipout layers, which draw one network for the batch;
    recurrences, which draw once for a sequence (in bayesian-torch at every step), and give the last states, [1, B, H], as torch's do
    (bayesian-torch: all of them, [B, T, H]; blitz: [B, H]); an embedding's padding row, which is drawn like the others, as in
    blitz, but has gradients; a BayesianGRU, of whose weights those parts are left out that nothing depends on.

    ValueError if there are no such layers, or one that has no counterpart: of another kind, a subclass, frozen (the means are had by
    `sampling(mean=True)`), giving its KL beside its output (bayesian-torch without dnn_to_bnn_flag), or with another prior.
    """
    checks.module("model", model)
    if not (prior is None or isinstance(prior, (Normal, torch.distributions.Normal))
            or callable(prior) and not isinstance(prior, type)):
        raise TypeError(f"prior: expected a Normal or a function of (name, mean), given {checks.describe(prior)}")
    made, ties = [], Ties()
    for name, module, library, peer in _theirs(model):
        layer = _layer(name, module, library, peer)
        values = module.state_dict(keep_vars=True)
        for pair in layer.pairs():
            theirs = name_of(library, layer, pair.name)
            mu, rho = keys_of(library, theirs)
            _fill(pair, *_read(library, layer, pair, values[mu], values[rho]))
            pair.mu.requires_grad_(values[mu].requires_grad), pair.rho.requires_grad_(values[rho].requires_grad)
            layer.set_prior(pair.name, _prior(f"{name}.{pair.name}".lstrip("."), prior, pair, lambda library=library, module=module,
                                              theirs=theirs: LIBRARIES[library].prior(module, theirs)))
            ties.share(name, layer, pair.name, (values[mu], pair.name))
        layer.find_pruned()
        made.append((module, layer))
    if not made:
        raise ValueError("model: expected layers of bayesian-torch, torchbnn, blitz or torch-uncertainty, found none in "
                         f"{type(model).__name__}: to_variational takes those of torch")
    return replace(model, made)


def import_state_dict(model: nn.Module, state_dict: dict[str, Tensor], library: str | None = None, *, strict: bool = True):
    """Load a state_dict of a model of bayesian-torch, torchbnn, blitz or torch-uncertainty into a model of bnn_fast that has the same
    layers under the same names: means and sigmas into its variational layers, all else as load_state_dict does it.

    Args:
        library: "bayesian_torch", "torchbnn", "blitz" or "torch_uncertainty"; None tells it by the keys.
        strict: whether it is an error if a key is missing or not understood.

    Sigmas are taken over under the `scale` that a layer has. Priors stay the model's own. Nothing is changed where an error is raised.

    Returns a named tuple (missing_keys, unexpected_keys), both of their names; empty if strict. blitz's BayesianLinear(bias=False) saves
    a bias nevertheless, which is then among the unexpected.

    ValueError naming the keys if there are missing or unexpected ones and strict, if a tensor has another shape, or if the library
    cannot be told.
    """
    checks.module("model", model)
    checks.flags(strict=strict)
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"state_dict: expected a dictionary of tensors by name, given {checks.describe(state_dict)}")
    layers = named_layers(model)
    library = _library(state_dict) if library is None else library
    checks.choice("library", library, LIBRARIES)
    fills, missing, rest = [], [], {key: value for key, value in state_dict.items() if not _beside(library, key, layers)}
    ordinary = model.state_dict()
    for name, layer in layers:
        prefix = f"{name}." if name else ""
        for key in (*layer.names, *layer._prior_buffers, "meaning"):
            ordinary.pop(prefix + key, None)
        for pair in layer.pairs():
            keys = [prefix + key for key in keys_of(library, name_of(library, layer, pair.name))]
            absent = [key for key in keys if key not in state_dict]
            missing += absent
            for key in keys:
                rest.pop(key, None)
            if not absent:
                found = _read(library, layer, pair, *(state_dict[key] for key in keys))
                for key, value in zip(keys, found):
                    _check_shape(key, value, pair.mu)
                fills.append((pair, *found))
    missing = list(dict.fromkeys(missing)) + [key for key in ordinary if key not in rest]
    unexpected = [key for key in rest if key not in ordinary]
    if strict and (missing or unexpected):
        told = [f"{len(keys)} {what} ({', '.join(keys[:20])}{', ...' if len(keys) > 20 else ''})"
                for keys, what in ((missing, "missing"), (unexpected, "not understood")) if keys]
        raise ValueError(f"state_dict: expected the keys of {library} for this model, given a state_dict with {' and '.join(told)}; "
                         "strict=False takes what there is")
    taken = {key: value for key, value in rest.items() if key in ordinary}
    for key, value in taken.items():
        _check_shape(key, value, ordinary[key])
    for fill in fills:
        _fill(*fill)
    model.load_state_dict(taken, strict=False)  # after which layers look which weights are pruned
    return _IncompatibleKeys(missing, unexpected)


def _theirs(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Peer]]:
    """(first name, layer, library, what it is) of each of their layers."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        found = recognise(module)
        if found is None:
            if unknown(module):
                raise ValueError(f"model: expected layers that have a counterpart, given {name!r}, {checks.describe(type(module))} of "
                                 f"{type(module).__module__}")
            continue
        inside.update(id(part) for part in module.modules())
        yield name, module, *found


def _layer(name: str, module: nn.Module, library: str, peer: Peer) -> VariationalLayer:
    """The counterpart, its parameters to be filled."""
    if LIBRARIES[library].frozen(module):
        raise ValueError(f"model: expected layers that draw, given {name!r}, which is frozen: unfreeze it before, and take the means by "
                         "bnn_fast.sampling(model, mean=True), one draw by bnn_fast.freeze(model)")
    if library == "bayesian_torch" and name and not module.dnn_to_bnn_flag:
        raise ValueError(f"model: expected layers that give their output alone, given {name!r}, which gives (output, KL) to a forward that "
                         "takes them apart: write the forward without KLs and set dnn_to_bnn_flag = True on the layer, or load the "
                         "state_dict into a model of bnn_fast by import_state_dict")
    parameter = next(module.parameters(), None)
    there = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    try:
        return counterpart(peer)(**peer.arguments(module), scale=LIBRARIES[library].scale, **there)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or type(module).__name__}: {error}") from None


def _prior(name: str, given, pair: Pair, theirs: Callable[[], object]) -> Normal:
    """The prior of the posterior of this name."""
    prior = given
    if callable(given):
        prior = given(name, pair.mu.detach())
    if prior is None:
        prior = theirs()
    if isinstance(prior, str):
        raise ValueError(f"prior: expected one for {name!r}, whose own has no counterpart: it is {prior}. Give what is to stand for it: "
                         "import_from(model, prior=bnn_fast.Normal(0.0, ...))")
    return prior


def _read(library: str, layer: VariationalLayer, pair: Pair, mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Their mean and rho as those of a pair of the layer."""
    mu, rho = (arranged(library, layer, pair.name, value.detach(), absent) for value, absent in ((mu, 0.0), (rho, -torch.inf)))
    given = LIBRARIES[library].scale
    if given != layer.scale:
        rho = convert_rho(rho.double() if given == "softplus" else softplus_inverse(rho.double().exp()), layer.scale)
    return mu, rho


@torch.no_grad()
def _fill(pair: Pair, mu: Tensor, rho: Tensor) -> None:
    pair.mu.copy_(mu)
    pair.rho.copy_(rho)


def _check_shape(key: str, value, expected: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        raise ValueError(f"{key}: expected a tensor {list(expected.shape)} for this model, given {checks.describe(value)}")


def _library(state_dict: dict[str, Tensor]) -> str:
    for name, library in LIBRARIES.items():
        if any(re.search(library.mark, key) for key in state_dict):
            return name
    raise ValueError(f"library: expected one of {', '.join(LIBRARIES)}, as the keys of the state_dict do not tell, given None beside "
                     f"{', '.join(list(state_dict)[:5]) or 'none'}")


def _beside(library: str, key: str, layers: list[tuple[str, VariationalLayer]]) -> bool:
    """Whether the key is of a layer and holds nothing of its posterior."""
    return any(key.startswith(prefix) and re.fullmatch(LIBRARIES[library].beside, key[len(prefix):])
               for prefix in (f"{name}." if name else "" for name, _ in layers))
