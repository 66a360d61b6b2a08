"""x that the samples share, expanded along dimension 0: read where it is, in every regime."""
from __future__ import annotations

import pytest
import torch
from judging import check_linear
from kernels import KEY, KLS, in_every_regime, make_prior, posterior, random, raw_linear

from bnn_fast import Normal


@in_every_regime
@pytest.mark.parametrize("dtype, x_dtype", [(torch.float32, None), (torch.float64, None), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("kl", KLS, ids=str)
def test_linear(kl, dtype, x_dtype, regime, inputs, batch):
    for bias, shape in ((True, (batch, inputs)), (False, (batch // 2, 2, inputs))):
        check_linear(
            random(*shape, dtype=x_dtype or dtype, seed=2).expand(3, *shape),
            *posterior(19, inputs, dtype=dtype),
            *(posterior(19, dtype=dtype, seed=1) if bias else (None, None)),
            prior=make_prior(bias, 19, inputs, dtype=dtype),
            bias_prior=make_prior(bias, 19, dtype=dtype, seed=1),
            kl=kl,
            n_samples=3,
            row_offset=3,
            column_offset=2,
            regime=regime,
        )


@pytest.mark.parametrize("outputs, inputs, batch, n_samples", [(300, 400, 130, 3), (100, 100, 33, 30), (5, 1, 70, 2), (1, 40, 20, 2)])
def test_several_blocks_of_rows_and_short_ones(outputs, inputs, batch, n_samples):
    x = random(batch, 2 * inputs, seed=2)[:, ::2]  # not dense within a sample either
    check_linear(x.expand(n_samples, batch, inputs), *posterior(outputs, inputs), *posterior(outputs, seed=1), n_samples=n_samples)


@in_every_regime
def test_the_same_as_of_copies(regime, inputs, batch):
    x = random(batch, inputs, seed=2).expand(4, batch, inputs)
    options = dict(prior=Normal(), bias_prior=Normal(), scale="softplus", kl="analytic", n_samples=4, row_offset=0, column_offset=0)
    arguments = *posterior(9, inputs), *posterior(9, seed=1), KEY
    grad_y = random(4, batch, 9, seed=4)
    shared = raw_linear(x, *arguments, **options, grad_y=grad_y)
    copied = raw_linear(x.contiguous(), *arguments, **options, grad_y=grad_y)
    for found, expected in zip((shared[0], *shared[2]), (copied[0], *copied[2])):
        if regime == "drawn":
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)
