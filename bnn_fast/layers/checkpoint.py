"""What a layer's saved numbers mean travels with them: an entry "meaning" of its part of the state_dict.

A rho of -5 is another sigma under another scale, and a prior of numbers is in no parameter. The entry is made when a
state_dict is, and looked at when one is loaded; it is no buffer, so that nothing converts, averages or broadcasts it.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks

_NAME = "meaning"


def _meaning(layer) -> Tensor:
    """float64 [1 + 2 P]: the scale's code, then loc and scale of each of P priors; nan where it holds a tensor."""
    numbers = [number if tensor is None else math.nan for number, tensor in zip(layer._numbers, layer.priors())]
    return torch.tensor([checks.SCALES[layer.scale], *numbers], dtype=torch.float64)


def save(layer, state_dict: dict, prefix: str, metadata: dict) -> None:
    state_dict[prefix + _NAME] = _meaning(layer)


def load(layer, state_dict: dict, prefix: str, *_) -> None:
    """ValueError if the numbers mean something else in this layer. Those saved without their meaning are taken as they are.

    A prior of tensors is in the state_dict, and a layer whose own is of numbers takes it over.
    """
    given = state_dict.pop(prefix + _NAME, None)
    known = given is not None and not given.is_meta and given.shape == (1 + len(layer._numbers),)
    numbers = list(layer._numbers)
    for at, (name, pair) in enumerate(zip(layer._prior_names, layer._fans)):
        kinds = [kind for kind in ("loc", "scale") if f"{prefix}{name}_{kind}" in state_dict]
        mu = getattr(layer, f"{pair}_mu")
        if not kinds or mu is None or layer._buffers[f"{name}_loc"] is not None or layer._buffers[f"{name}_scale"] is not None:
            continue
        for kind in kinds:
            layer.register_buffer(f"{name}_{kind}", torch.empty_like(mu, requires_grad=False))
        if known:
            numbers[2 * at:2 * at + 2] = given[1 + 2 * at:3 + 2 * at].nan_to_num(nan=1.0).tolist()
        layer.prior_tensors = True
    layer._numbers = tuple(numbers)
    if given is None or given.is_meta:
        return
    expected, given = _meaning(layer).to(given.dtype), given.detach().cpu()
    if given.shape != expected.shape or not torch.equal(given.nan_to_num(nan=math.inf), expected.nan_to_num(nan=math.inf)):
        raise ValueError(f"{prefix}{_NAME}: expected parameters of a layer with {_words(layer, expected)}, given those of one with "
                         f"{_words(layer, given)}. Make the layer as the saved one was, or, if these parameters are meant, leave "
                         f"{prefix}{_NAME} out of the state_dict")


def _words(layer, meaning: Tensor) -> str:
    names = layer._prior_names
    if meaning.shape != (1 + 2 * len(names),):
        return f"an entry {list(meaning.shape)}"
    scale, *numbers = meaning.tolist()
    scales = {code: name for name, code in checks.SCALES.items()}
    words = [f"scale={scales.get(int(scale), scale)!r}"]
    for name, loc, sd in zip(names, numbers[::2], numbers[1::2]):
        loc, sd = ("tensor" if math.isnan(value) else f"{value:g}" for value in (loc, sd))
        words.append(f"{name} N({loc}, {sd}^2)")
    return ", ".join(words)
