"""The CPU kernels' conversions from and to the types of 16 bits are torch's, for every number there is."""

from __future__ import annotations

import math

import pytest
import torch
from kernels import (
    HALVES,
    OPS,
    draw_arguments,
    one_thread,  # noqa: F401
    regime_of,
)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same numbers, and NaN where there is NaN."""
    a_is, b_is = a.isnan(), b.isnan()
    return torch.equal(a_is, b_is) and torch.equal(a.masked_fill(a_is, 0), b.masked_fill(b_is, 0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_pruned_weight_is_its_mean_whatever_that_is(dtype):
    mu = every_number(dtype)
    rho = torch.full_like(mu, -math.inf)
    w = OPS._sample_normal(*draw_arguments(mu, rho))[0][0]
    assert same(w, mu)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float_results_are_rounded_to_the_nearest_number_of_16_bits(dtype):
    """One input that is 1, weights that are numbers of 16 bits, halfway between two, and just beside that."""
    numbers = every_number(dtype)
    numbers = numbers[numbers.isfinite()].float().sort().values
    between = numbers[:-1] + (numbers[1:] - numbers[:-1]) / 2
    largest = numbers.abs().max()
    overflowing = torch.tensor([float(largest) * (1 + torch.finfo(dtype).eps / 4), math.inf, math.nan, 1e38])
    full_nan = torch.tensor([0x7FFFFFFF, -1]).to(torch.int32).view(torch.float32)  # that rounding would carry over
    values = torch.cat([numbers, between, overflowing, -overflowing, full_nan])
    beside = [values.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf)]
    values = torch.cat([values, *beside])
    mu, x = values.unsqueeze(1), torch.ones(1, 1, dtype=dtype)
    assert regime_of(x, mu, 1) == "fused"
    y = OPS._variational_linear(x, *draw_arguments(mu, torch.full_like(mu, -math.inf)))[0]
    assert same(y[0], values.to(dtype))
