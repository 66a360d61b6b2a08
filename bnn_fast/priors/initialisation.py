"""Named initialisations. Each gives means and, on the softplus scale, rho; other scales get the same sigma.

    name       mu                             sigma                               from
    default    N(0, 2 / in), bias 0           softplus(-5)                        He et al. 2015 for the means
    blundell   N(0, 0.1^2)                    softplus(-3)
    tutorial   N(0, 0.001^2), bias 0          softplus(N(-2.5, 0.001^2)), bias softplus(0)
    zeros      0                              1
    adv_bnn    U(-1 / sqrt(in), 1 / sqrt(in)) the prior's                         Liu et al., Adv-BNN, 2019

The means of gains (weights of normalisations) begin with 1 under all of them.
"""
from __future__ import annotations

import math

import torch

from .scales import convert_rho, softplus_inverse


def _default(pair, fan_in):
    pair.mu.zero_() if "bias" in pair.name else pair.mu.normal_(0.0, math.sqrt(2.0 / fan_in))
    return -5.0


def _blundell(pair, fan_in):
    pair.mu.normal_(0.0, 0.1)
    return -3.0


def _tutorial(pair, fan_in):
    if "bias" in pair.name:
        pair.mu.zero_()
        return 0.0
    pair.mu.normal_(0.0, 0.001)
    return torch.empty_like(pair.rho, dtype=torch.float64).normal_(-2.5, 0.001)


def _zeros(pair, fan_in):
    pair.mu.zero_()
    return softplus_inverse(1.0)


def _adv_bnn(pair, fan_in):
    bound = 1.0 / math.sqrt(fan_in)
    pair.mu.uniform_(-bound, bound)
    return softplus_inverse(pair.prior.scale)


INITIALISATIONS = {"default": _default, "blundell": _blundell, "tutorial": _tutorial, "zeros": _zeros,
                   "adv_bnn": _adv_bnn}


@torch.no_grad()
def initialise(name: str, pairs, scale: str, sigma: float | None = None) -> None:
    """Fill mu and rho of a layer's `pairs` in place, under what `scale` makes of rho; with `sigma` as the standard deviation of
    all of them in place of the named initialisation's, and the means of a pair that has a `begin` all that.
    """
    for pair in pairs:
        rho = INITIALISATIONS[name](pair, max(pair.fan_in, 1))
        if pair.begin is not None:
            pair.mu.fill_(pair.begin)
        if sigma is not None:
            rho = softplus_inverse(sigma)
        if isinstance(rho, float):
            rho = torch.tensor(rho, dtype=torch.float64, device="cpu")
            pair.rho.fill_(convert_rho(rho, scale).item())
        else:
            pair.rho.copy_(convert_rho(rho, scale))
