"""The CPU's kernels for layers of at most 64 inputs and outputs: rows shorter than a vector, and around whole ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from judging import check_linear
from kernels import (
    KEY,
    expected_regime,
    one_thread,  # noqa: F401
    posterior,
    random,
    raw_linear,
)

from bnn_fast import Normal


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize(
    "outputs, inputs",
    [(1, 16), (1, 20), (1, 33), (1, 64), (17, 1), (20, 1), (7, 8), (8, 7), (15, 17), (16, 16), (33, 9), (9, 33), (48, 20),
     (64, 64), (65, 64), (64, 65)],
)
def test_linear_narrow_shapes(outputs, inputs, n_samples):
    """Around whole vectors of outputs and inputs; batches around whole blocks of rows, sums and tasks."""
    mu, rho = posterior(outputs, inputs)
    for batch in (1, 7, 8, 9, 63, 65, 257, 1100):
        x = random(n_samples * batch, inputs, seed=2)
        regime = "small" if max(outputs, inputs) <= 64 and (n_samples == 1 or batch >= 8) else None
        if regime and batch <= 32:
            regime = regime if expected_regime("small", x.dtype) == "small" else "fused"
        for biases in ((None, None), posterior(outputs, seed=1)):
            check_linear(
                x, mu, rho, *biases, n_samples=n_samples, row_offset=3, column_offset=2, regime=regime
            )


@pytest.mark.parametrize("outputs, inputs", [(1, 20), (20, 1), (5, 5), (40, 17)])
def test_linear_takes_nothing_from_beyond_its_rows(outputs, inputs):
    """Rows shorter than a vector are read beyond their end: what is there must not matter."""
    mu, rho = posterior(outputs, inputs)
    options = dict(prior=Normal(), bias_prior=Normal(), scale="softplus", kl="analytic", n_samples=1)
    options |= dict(row_offset=0, column_offset=0, grad_kl=torch.tensor(1.0))
    for rows in (1, 9, 300):
        x, grad_y = random(rows, inputs, seed=2), random(rows, outputs, seed=7)
        y, _, gradients = raw_linear(x, mu, rho, None, None, KEY, **options, grad_y=grad_y)
        amid_nan = [torch.full((rows + 40, t.shape[1]), math.nan) for t in (x, grad_y)]
        for whole, t in zip(amid_nan, (x, grad_y)):
            whole[20:-20] = t
        x, grad_y = (t[20:-20] for t in amid_nan)
        again = raw_linear(x, mu, rho, None, None, KEY, **options, grad_y=grad_y)
        for a, b in zip((y, *gradients), (again[0], *again[2])):
            assert torch.equal(a, b)


@pytest.mark.parametrize("outputs, inputs", [(1, 20), (1, 33), (20, 1), (20, 20)])
def test_linear_keeps_an_infinity_in_its_row(outputs, inputs):
    """Where vectors overlap, no element may count twice or meet a zero: inf * 0 is NaN."""
    options = dict(prior=Normal(), bias_prior=Normal(), scale="softplus", kl="analytic", n_samples=1)
    options |= dict(row_offset=0, column_offset=0, grad_kl=torch.tensor(1.0))
    mu, rho = posterior(outputs, inputs)
    for row, place in itertools.product((0, 4, 8), range(max(inputs, outputs))):
        x, grad_y = random(9, inputs, seed=2), random(9, outputs, seed=7)
        x[row, place % inputs] = grad_y[row, place % outputs] = math.inf
        y, _, (grad_x, *_) = raw_linear(x, mu, rho, None, None, KEY, **options, grad_y=grad_y)
        for result in (y, grad_x):
            assert result[row].isinf().all()
            assert result.isfinite().sum() == result.numel() - result.shape[1]
