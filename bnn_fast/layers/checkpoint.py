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
    """float64 [5]: the scale's code, loc and scale of the weight's prior and of the bias's; nan where it holds a tensor."""
    prior, bias_prior = layer.prior, layer.bias_prior
    numbers = [math.nan if isinstance(value, Tensor) else value
               for value in (prior.loc, prior.scale, bias_prior.loc, bias_prior.scale)]
    return torch.tensor([checks.SCALES[layer.scale], *numbers], dtype=torch.float64)


def save(layer, state_dict: dict, prefix: str, metadata: dict) -> None:
    state_dict[prefix + _NAME] = _meaning(layer)


def load(layer, state_dict: dict, prefix: str, *_) -> None:
    """ValueError if the numbers mean something else in this layer. Those saved without their meaning are taken as they are."""
    given = state_dict.pop(prefix + _NAME, None)
    if given is None or given.is_meta:
        return
    expected = _meaning(layer).to(given.dtype).nan_to_num(nan=-1.0)
    given = given.detach().cpu().nan_to_num(nan=-1.0)
    if given.shape != expected.shape or not torch.equal(given, expected):
        raise ValueError(f"{prefix}{_NAME}: expected parameters of a layer with {_words(expected)}, given those of one with "
                         f"{_words(given)}. Make the layer as the saved one was, or, if these parameters are meant, leave "
                         f"{prefix}{_NAME} out of the state_dict")


def _words(meaning: Tensor) -> str:
    if meaning.shape != (5,):
        return f"an entry {list(meaning.shape)}"
    scale, *priors = meaning.tolist()
    names = {code: name for name, code in checks.SCALES.items()}
    loc, sd, bias_loc, bias_sd = ("tensor" if name and value == -1.0 else f"{value:g}"
                                  for name, value in zip((0, 1, 0, 1), priors))
    return f"scale={names.get(int(scale), scale)!r}, prior N({loc}, {sd}^2), bias_prior N({bias_loc}, {bias_sd}^2)"
