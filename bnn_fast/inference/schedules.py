"""Weights of the KL that change from step to step, for `ELBO(..., kl_weight=)`.

Each is a small object that compares, prints and pickles, and gives the weight at a step: a float for an int, and for
an integer tensor, which torch.compile has, a float64 tensor.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import checks

__all__ = ["blundell_weights", "linear_warmup"]


class Steps:
    """A count that torch.compile sees as a tensor, and so compiles once for all its values, and that is an int for
    the cost of one elsewhere: two views of the same memory, on the CPU.
    """

    def __init__(self, number: int = 0):
        self.array = np.array(number, dtype=np.int64)
        with torch.inference_mode(False):
            self.tensor = torch.from_numpy(self.array)

    def __reduce__(self):
        return Steps, (self.array.item(),)


@dataclass(frozen=True)
class linear_warmup:
    """kl_weight growing from 1/steps at the first step to 1 at step number `steps`, and 1 ever after."""

    steps: int

    def __post_init__(self):
        object.__setattr__(self, "steps", checks.positive_int("steps", self.steps))

    def __call__(self, step: int | Tensor) -> float | Tensor:
        if isinstance(step, Tensor):
            return ((step + 1).double() / self.steps).clamp(max=1.0)
        return min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class blundell_weights:
    """kl_weight of the i-th of an epoch's M batches: M 2^-i / (1 - 2^-M), i = 1..M, of mean 1.

    Blundell et al., "Weight Uncertainty in Neural Networks", 2015, section 3.4: pi_i = 2^(M-i) / (2^M - 1) of
    the KL goes to batch i. Written without 2^M, which overflows.
    """

    n_batches: int

    def __post_init__(self):
        object.__setattr__(self, "n_batches", checks.positive_int("n_batches", self.n_batches))

    def __call__(self, step: int | Tensor) -> float | Tensor:
        first = self.n_batches / -math.expm1(-self.n_batches * math.log(2.0))
        i = step % self.n_batches + 1
        return first * (-i.double()).exp2() if isinstance(i, Tensor) else math.ldexp(first, -i)
