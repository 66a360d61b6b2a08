"""What rho means: sigma(rho) and its logarithm under each scale, and the way back.

    softplus  sigma = log(1 + e^rho)    exp  sigma = e^rho    sqrt_exp  sigma = e^(rho/2)
    square    sigma = rho^2             identity  sigma = rho

rho = -inf is a pruned weight, whose sigma is 0. The last two pass through sigma = 0 at rho = 0, where log sigma is -inf.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sigma_of(rho: Tensor, scale: str) -> Tensor:
    """The factor of the noise that rho means under `scale`: the standard deviation, but for the identity's sign."""
    if scale == "softplus":
        return F.softplus(
            rho, threshold=40
        )  # exact beyond 40, where log(1 + e^rho) - rho is below float64's resolution
    if scale in ("exp", "sqrt_exp"):
        return (rho if scale == "exp" else 0.5 * rho).exp()
    root = rho.masked_fill(rho == -math.inf, 0.0)
    return root.square() if scale == "square" else root


def deviation_of(rho: Tensor, scale: str) -> Tensor:
    """The standard deviation that rho means under `scale`."""
    sigma = sigma_of(rho, scale)
    return sigma.abs() if scale == "identity" else sigma


def log_sigma_of(rho: Tensor, scale: str) -> Tensor:
    """log |sigma(rho)| for any rho above -inf, right also where sigma itself has underflowed."""
    if scale == "exp":
        return rho
    if scale == "sqrt_exp":
        return 0.5 * rho
    if scale != "softplus":
        log_magnitude = torch.where(rho < 0.0, -rho, rho).log()  # its derivative at 0 is 1 / rho; that of abs().log() is NaN
        return 2.0 * log_magnitude if scale == "square" else log_magnitude
    # With z = e^rho, log(log(1 + z)) = rho - z/2 + 5 z^2 / 24 - ..., and below -12 z^3 is nothing beside rho.
    z = rho.clamp(max=-12.0).exp()
    return torch.where(
        rho < -12.0, rho - z * (0.5 - z * (5.0 / 24.0)), sigma_of(rho.clamp(min=-12.0), scale).log()
    )


def softplus_inverse(sigma: float | Tensor) -> float | Tensor:
    """rho with log(1 + e^rho) = sigma, in float64: sigma + log(1 - e^-sigma)."""
    if isinstance(sigma, Tensor):
        return sigma.double() + (-torch.expm1(-sigma.double())).log()
    return sigma + math.log(-math.expm1(-sigma))


def convert_rho(rho: Tensor, scale: str) -> Tensor:
    """The rho that means under `scale` the sigma that `rho` (float64) means as softplus."""
    if scale == "softplus":
        return rho
    log_sigma = log_sigma_of(rho, "softplus")
    if scale in ("exp", "sqrt_exp"):
        return log_sigma if scale == "exp" else 2.0 * log_sigma
    return (0.5 * log_sigma if scale == "square" else log_sigma).exp()
