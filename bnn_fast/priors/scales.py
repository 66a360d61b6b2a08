"""What rho means: sigma(rho) and its logarithm under each scale, and the way back."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sigma_of(rho: Tensor, scale: str) -> Tensor:
    """The standard deviation that rho, any finite value, means under `scale`."""
    if scale == "softplus":
        return F.softplus(
            rho, threshold=40
        )  # exact beyond 40, where log(1 + e^rho) - rho is below float64's resolution
    return (rho if scale == "exp" else 0.5 * rho).exp()


def log_sigma_of(rho: Tensor, scale: str) -> Tensor:
    """log sigma(rho), right also where sigma itself has underflowed."""
    if scale != "softplus":
        return rho if scale == "exp" else 0.5 * rho
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
    return log_sigma if scale == "exp" else 2.0 * log_sigma
