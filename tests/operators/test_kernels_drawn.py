"""The drawn regime in several blocks of rows, and sums over more elements than one pass can add without a care."""

from __future__ import annotations

import pytest
import torch
from judging import check_linear
from kernels import (
    DTYPES,
    KEY,
    KLS,
    OPS,
    draw_arguments,
    make_prior,
    one_thread,  # noqa: F401
    posterior,
    random,
    raw_linear,
    regime_of,
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


@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs", [(21, 69), (64, 128), (300, 400)])
def test_a_backward_that_draws_once_gives_the_bits_of_one_that_draws_for_each_gradient(outputs, inputs, dtype, kl):
    """With the gradient of x the noise is what the pass for that drew; without, it is drawn for the gradient of rho."""
    x = random(70, inputs, dtype=dtype, seed=2)
    mu, rho = posterior(outputs, inputs, dtype=dtype)
    rho[::2, 1::3] = -torch.inf
    assert regime_of(x, mu, 1) == "drawn"
    grad_kl = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def gradients(need_grad_x):
        return raw_linear(x, mu, rho, None, None, KEY, grad_y=random(70, outputs, dtype=dtype, seed=3), grad_kl=grad_kl,
                          need_grad_x=need_grad_x, kl=kl, row_offset=3, column_offset=2)[2]

    (_, *once), (_, *twice) = gradients(True), gradients(False)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


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
