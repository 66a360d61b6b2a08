"""The continuous ranked probability score in closed form, where a prediction has one.

Of a mixture F of S equal parts it is E|X - y| - E|X - X'| / 2, X and X' independent draws of F (Gneiting and Raftery, "Strictly proper
scoring rules, prediction, and estimation", 2007, equation 21): means over the parts and over all pairs of them.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..metrics import mean_absolute


def of_gaussians(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """[B, ...] of mixtures of N(mean, scale^2), both [S, B, ...], at y [B, ...]: a difference of two Gaussians is one (Grimit et al.,
    "The continuous ranked probability score for circular variables and its application to mesoscale forecast ensemble verification",
    2006, equation 5).
    """
    return mean_absolute(y - mean, scale).mean(0) - 0.5 * _over_pairs(
        lambda a, b: mean_absolute(mean[a] - mean[b], torch.hypot(scale[a], scale[b])), len(mean))


def of_laplaces(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """[B, ...] of mixtures of Laplace(loc, scale), loc [S, B, ...], scale 0-d, at y [B, ...]. With z = |y - loc| / scale a part has
    E|X - y| = scale (z + e^-z), and two, z apart, have E|X - X'| = scale (z + e^-z (3 + z) / 2); of one part the score is that of
    Jordan, Krueger and Lerch, "Evaluating probabilistic forecasts with scoringRules", 2019, appendix A.
    """
    def apart(a, b) -> Tensor:
        z = (loc[a] - loc[b]).abs() / scale
        return z + (-z).exp() * (1.5 + 0.5 * z)

    z = (y - loc).abs() / scale
    return scale * ((z + (-z).exp()).mean(0) - 0.5 * _over_pairs(apart, len(loc)))


def of_student_t(df: float, loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Of loc + scale t with df > 1 degrees of freedom, at y of loc's shape. With F and f those of t, z = (y - loc) / scale and Beta B:

        scale (z (2 F(z) - 1) + 2 f(z) (df + z^2) / (df - 1) - 2 sqrt(df) B(1/2, df - 1/2) / ((df - 1) B(1/2, df/2)^2))

    (Jordan, Krueger and Lerch 2019, appendix A).
    """
    z = (y - loc) / scale
    square = z.square()
    log_beta = _log_beta(0.5, 0.5 * df)
    density = (-0.5 * (df + 1.0) * torch.log1p(square / df) - log_beta).exp() / math.sqrt(df)
    within = 1.0 - _incomplete_beta(df / (df + square), 0.5 * df)  # 2 F(|z|) - 1
    spread = math.exp(_log_beta(0.5, df - 0.5) - 2.0 * log_beta)
    return scale * (z.abs() * within + (2.0 * density * (df + square) - 2.0 * math.sqrt(df) * spread) / (df - 1.0))


def _over_pairs(apart: Callable, n: int) -> Tensor:
    """The mean of apart(a, b) over all pairs of n parts: a one of them, b several, their distances are added up once."""
    total = apart(slice(None), slice(None)).sum(0)
    for a in range(1, n):
        total = total + 2.0 * apart(a, slice(a)).sum(0)
    return total / n ** 2


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _incomplete_beta(x: Tensor, a: float) -> Tensor:
    """The regularised incomplete beta function I_x(a, 1/2) for x in (0, 1], in float64, by its continued fraction on the side where that
    converges (Press et al., "Numerical Recipes", section 6.4).
    """
    b = 0.5
    swapped = x > (a + 1.0) / (a + b + 2.0)
    front = (a * x.log() + b * (-x).log1p() - _log_beta(a, b)).exp()
    below = front * _fraction(torch.where(swapped, 0.0, x), a, b) / a
    above = 1.0 - front * _fraction(torch.where(swapped, 1.0 - x, 0.0), b, a) / b
    return torch.where(swapped, above, below)


def _fraction(x: Tensor, a: float, b: float) -> Tensor:
    """By Lentz's method, of which no denominator vanishes here: x is below (a + 1) / (a + b + 2)."""
    c, d = torch.ones_like(x), 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    found = d
    for m in range(1, 10000):
        step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1.0 / (1.0 + step * d), 1.0 + step / c
        found = found * d * c
        step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1.0 / (1.0 + step * d), 1.0 + step / c
        found = found * d * c
        if ((d * c - 1.0).abs() < 1e-15).all():
            break
    return found
