"""How large the terms are that each element of an operator's result is the sum of: what its error counts beside.

The operators' formulas (csrc/cpu/sample.h, csrc/layer.h) with every term replaced by its absolute value, in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnn_fast import Normal, reference


class Magnitudes(NamedTuple):
    """Of a posterior's draws [samples, *shape], of its KL (0-d), and of both gradients."""

    w: Tensor
    kl: Tensor
    mu: Tensor
    rho: Tensor


def elements(mu: Tensor, rho: Tensor, prior: Normal, scale: str):
    """(analytic KL, its derivative by mu, by rho) of each element; 0 of pruned ones."""
    mu, rho, loc, t, alive = _wide(mu, rho, prior)
    sigma, d_sigma, log_sigma, d_log_sigma = _spread(rho, scale)
    location = mu.abs() + loc.abs()
    kl = t.log().abs() + log_sigma.clamp(min=1) + 0.5 * ((sigma / t).square() + (location / t).square()) + 0.5
    by_rho = sigma * d_sigma / t.square() + d_log_sigma
    return tuple(value.where(alive, 0.0) for value in (kl, location / t.square(), by_rho))


def sampled(mu, rho, prior, scale, kl, key, n_samples, stream, offsets, by_weight, grad_kl) -> Magnitudes:
    """`by_weight` [samples, *shape]: of the gradient that reaches the draws; `grad_kl`: a number."""
    eps = reference.standard_normal(
        key,
        n_samples,
        *((mu.shape[0], math.prod(mu.shape[1:])) if mu.dim() > 1 else (1, mu.numel())),
        stream=stream,
        row_offset=offsets[0],
        column_offset=offsets[1],
        dtype=torch.float64,
    ).reshape(n_samples, *mu.shape)
    analytic, by_mu, by_rho = elements(mu, rho, prior, scale)
    mu, rho, loc, t, alive = _wide(mu, rho, prior)
    sigma, d_sigma, log_sigma, d_log_sigma = _spread(rho, scale)
    w = mu.abs() + (sigma * eps.abs()).where(alive, 0.0)
    by_weight, k = by_weight.double().abs(), abs(float(grad_kl))
    value = torch.zeros((), dtype=torch.float64)
    d_mu, d_rho = torch.zeros_like(mu), torch.zeros_like(mu)
    if kl == "analytic":
        value, d_mu, d_rho = analytic.sum(), k * by_mu, k * by_rho
    elif kl == "sampled":
        location = w + loc.abs()
        element = t.log().abs() + log_sigma.clamp(min=1) + 0.5 * (eps.square() + (location / t).square())
        value = element.where(alive, 0.0).sum() / n_samples
        by_weight = by_weight + k / n_samples * location / t.square()
        d_rho = k * d_log_sigma
    d_mu = d_mu + by_weight.sum(0)
    d_rho = d_rho + d_sigma * (by_weight * eps.abs()).sum(0)
    return Magnitudes(w, value, d_mu.where(alive, 0.0), d_rho.where(alive, 0.0))


def _wide(mu, rho, prior):
    alive = rho != -math.inf
    loc, t = (torch.as_tensor(p).double() for p in (prior.loc, prior.scale))
    return mu.double(), rho.double().masked_fill(~alive, 1.0), loc, t, alive


def _spread(rho: Tensor, scale: str):
    """|sigma|, its derivative, log |sigma|, its derivative, all without their signs."""
    rho = rho.clone().requires_grad_()
    sigma, log_sigma = reference.sigma_of(rho, scale), reference.log_sigma_of(rho, scale)
    slopes = [torch.autograd.grad(value.sum(), rho)[0] for value in (sigma, log_sigma)]
    return tuple(value.detach().abs() for value in (sigma, slopes[0], log_sigma, slopes[1]))
