"""Weights of the KL that change from step to step, for `ELBO(..., kl_weight=)`."""
from __future__ import annotations

import math
from typing import Callable

from .. import checks

__all__ = ["blundell_weights", "linear_warmup"]


def linear_warmup(steps: int) -> Callable[[int], float]:
    """kl_weight growing from 1/steps at the first step to 1 at step number `steps`, and 1 ever after."""
    checks.positive_int("steps", steps)
    return lambda step: min(1.0, (step + 1) / steps)


def blundell_weights(n_batches: int) -> Callable[[int], float]:
    """kl_weight of the i-th of an epoch's M batches: M 2^-i / (1 - 2^-M), i = 1..M, of mean 1.

    Blundell et al., "Weight Uncertainty in Neural Networks", 2015, section 3.4: pi_i = 2^(M-i) / (2^M - 1) of
    the KL goes to batch i. Written without 2^M, which overflows.
    """
    checks.positive_int("n_batches", n_batches)
    total = -math.expm1(-n_batches * math.log(2.0))
    return lambda step: math.ldexp(n_batches, -(step % n_batches + 1)) / total
