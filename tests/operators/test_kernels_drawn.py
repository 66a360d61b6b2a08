"""The drawn regime in several blocks of rows, and sums over more elements than one pass can add without a care."""

from __future__ import annotations

import pytest
import torch
from judging import check_linear
from kernels import (
    KLS,
    OPS,
    draw_arguments,
    make_prior,
    one_thread,  # noqa: F401
    posterior,
    random,
)


@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize(
    "dtype, x_dtype",
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("outputs, inputs, batch, n_samples", [(300, 400, 130, 3), (100, 100, 33, 30)])
def test_drawn_in_several_blocks_of_rows(outputs, inputs, batch, n_samples, dtype, x_dtype, kl):
    bias, tensors = kl != "analytic", kl != "sampled"
    check_linear(
        random(n_samples * batch, inputs, dtype=x_dtype or dtype, seed=2),
        *posterior(outputs, inputs, dtype=dtype),
        *(posterior(outputs, dtype=dtype, seed=1) if bias else (None, None)),
        prior=make_prior(tensors, outputs, inputs, dtype=dtype),
        bias_prior=make_prior(tensors, outputs, dtype=dtype, seed=1),
        kl=kl,
        n_samples=n_samples,
        row_offset=3,
        column_offset=2,
        regime="drawn",
    )


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_the_kl_of_millions_of_weights_is_right_to_the_last_digits(kl):
    """Against the sum in float64 of the KLs of pieces of 256 columns, in which there is little to lose."""
    rows, columns, piece = 4, 4_000_000, 256
    mu = torch.zeros(rows, columns)
    rho = torch.full((rows, columns), -3.0)
    whole = OPS._sample_normal(*draw_arguments(mu, rho, kl=kl))[1]
    first = [OPS._sample_normal(*draw_arguments(mu[:, c:c + piece], rho[:, c:c + piece], kl=kl, column_offset=c))[1].double()
             for c in range(0, columns, piece)]
    assert abs(whole.double() / sum(first) - 1) < 1e-7
