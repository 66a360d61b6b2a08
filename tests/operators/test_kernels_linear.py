"""The compiled variational_linear against the reference with the same key: shapes, strides, every option."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from judging import check_linear
from kernels import (
    DRAWN,
    DTYPES,
    FUSED,
    HALVES,
    KEY,
    KLS,
    SCALES,
    expected_regime,
    in_every_regime,
    make_prior,
    one_thread,  # noqa: F401
    posterior,
    random,
    raw_linear,
    regime_of,
)

from bnn_fast import Normal, functional


@in_every_regime
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_linear_options(scale, kl, dtype, regime, inputs, batch):
    for tensors, bias, n_samples, offsets in itertools.product(
        (False, True), (False, True), (1, 3), ((0, 0), (5, 7))
    ):
        mu, rho = posterior(19, inputs, dtype=dtype)
        bias_mu, bias_rho = posterior(19, dtype=dtype, seed=1) if bias else (None, None)
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            mu,
            rho,
            bias_mu,
            bias_rho,
            prior=make_prior(tensors, 19, inputs, dtype=dtype),
            bias_prior=make_prior(tensors, 19, dtype=dtype, seed=1),
            scale=scale,
            kl=kl,
            n_samples=n_samples,
            row_offset=offsets[0],
            column_offset=offsets[1],
            regime=regime,
        )


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize(
    "outputs, inputs",
    [
        (1, 1),
        (3, 1),
        (1, 3),
        (2, 16),
        (127, 3),
        (3, 127),
        (127, 1023),
        (1023, 127),
        (1, 1023),
        (4, 256),
        (5, 257),
        (0, 5),
        (5, 0),
        (0, 0),
        (1, 4097),
    ],
)
def test_linear_awkward_shapes(outputs, inputs, n_samples):
    batches = (3, 40) if outputs * inputs > 5000 else (0, 1, 3, 24, 25, 127)
    for batch, (row_offset, column_offset) in itertools.product(batches, ((0, 0), (3, 2))):
        mu, rho = posterior(outputs, inputs)
        check_linear(
            random(n_samples * batch, inputs, seed=2),
            mu,
            rho,
            *posterior(outputs, seed=1),
            n_samples=n_samples,
            row_offset=row_offset,
            column_offset=column_offset,
        )


@pytest.mark.parametrize("outputs, inputs", [(8192, 32), (4, 65536)])
def test_linear_long_sums(outputs, inputs):
    """Sums over many inputs (y) and outputs (the gradient of x) must not be one long chain of roundings."""
    for batch in (8, 40):
        check_linear(random(batch, inputs, seed=2), *posterior(outputs, inputs))


@in_every_regime
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_linear_small_elements_are_as_right_as_large_ones(dtype, regime, inputs, batch):
    """Rows of x, and columns of the gradient of y, of four orders of magnitude: so have all results."""

    def graded(n):
        return (10.0 ** -(torch.arange(n) % 4)).to(dtype)

    for n_samples in (1, 2):
        rows = n_samples * batch
        check_linear(
            random(rows, inputs, dtype=dtype, seed=2) * graded(rows).unsqueeze(1),
            *posterior(19, inputs, dtype=dtype),
            kl=None,
            n_samples=n_samples,
            grad_y=random(rows, 19, dtype=dtype, seed=7) * graded(19),
            regime=regime,
        )


@in_every_regime
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linear_with_half_inputs_and_float_parameters(dtype, regime, inputs, batch):
    for kl, n_samples, bias in itertools.product(KLS, (1, 3), (False, True)):
        mu, rho = posterior(19, inputs)
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            mu,
            rho,
            *(posterior(19, seed=1) if bias else (None, None)),
            kl=kl,
            n_samples=n_samples,
            column_offset=3,
            regime=regime,
        )


@pytest.mark.parametrize("columns", [21, 69])
@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_linear_strides_and_dimensions(kl, n_samples, columns):
    mu, rho = posterior(9, columns)
    options = dict(n_samples=n_samples, kl=kl)
    inputs = {
        "3-d": random(4, 3, columns),
        "large 3-d": random(4, 30, columns),
        "4-d": random(2, 2, 3, columns),
        "transposed": random(columns, 8).T,
        "large transposed": random(columns, 60).T,
        "expanded batch": random(1, columns).expand(8, columns),
        "expanded features": random(60, 1).expand(60, columns),
        "every other": random(8, 2 * columns)[:, ::2],
        "shifted": random(8, columns + 2)[:, 1:-1],
    }
    if n_samples == 1:
        inputs["1-d"] = random(columns)
    for x in inputs.values():
        check_linear(x, mu, rho, *posterior(9, seed=1), **options)
    for mu_, rho_ in (
        (random(columns, 9).T, random(columns, 9, seed=3).T),
        (random(1, columns).expand(9, columns), random(9, 1).expand(9, columns)),
    ):
        for batch in (FUSED, DRAWN):
            prior = Normal(random(columns, 9, seed=5).T, random(9, 1, seed=6).abs().expand(9, columns) + 0.5)
            check_linear(
                random(n_samples * batch, columns),
                mu_,
                rho_,
                random(1).expand(9),
                random(18)[::2],
                prior=prior,
                **options,
            )


@in_every_regime
@pytest.mark.parametrize("n_samples", [1, 2])
def test_linear_backward_takes_gradients_of_any_stride_and_either_alone(n_samples, regime, inputs, batch):
    mu, rho, rows = *posterior(9, inputs), n_samples * batch
    x, biases = random(rows, inputs), posterior(9, seed=1)
    assert regime_of(x, mu, n_samples) == expected_regime(regime, x.dtype)
    options = dict(
        prior=Normal(0.0, 1.0),
        bias_prior=Normal(0.0, 1.0),
        scale="softplus",
        n_samples=n_samples,
        row_offset=0,
        column_offset=0,
    )
    grad_kl = torch.tensor(0.3)
    for kl in ("analytic", "sampled"):
        for grad_y in (torch.ones(()).expand(rows, 9), random(9, rows, seed=4).T):
            given = raw_linear(x, mu, rho, *biases, KEY, **options, kl=kl, grad_y=grad_y, grad_kl=grad_kl)[2]
            dense = raw_linear(
                x, mu, rho, *biases, KEY, **options, kl=kl, grad_y=grad_y.contiguous(), grad_kl=grad_kl
            )[2]
            only_y = raw_linear(x, mu, rho, *biases, KEY, **options, kl=kl, grad_y=grad_y)[2]
            only_kl = raw_linear(x, mu, rho, *biases, KEY, **options, kl=kl, grad_kl=grad_kl)[2]
            no_x = raw_linear(
                x, mu, rho, *biases, KEY, **options, kl=kl, grad_y=grad_y, grad_kl=grad_kl, need_grad_x=False
            )[2]
            for a, b in zip(given, dense):
                assert torch.equal(a, b)
            assert torch.equal(given[0], only_y[0])
            assert only_kl[0].shape == no_x[0].shape == (0,)
            for whole, part_y, part_kl, without_x in zip(given[1:], only_y[1:], only_kl[1:], no_x[1:]):
                torch.testing.assert_close(whole, part_y + part_kl)
                assert torch.equal(whole, without_x)
                assert part_y.abs().sum() > 0 and part_kl.abs().sum() > 0


@in_every_regime
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_linear_pruned_weights(scale, kl, regime, inputs, batch):
    for n_samples in (1, 3):
        mu, rho = posterior(9, inputs)
        bias_mu, bias_rho = posterior(9, seed=1)
        pruned, bias_pruned = random(9, inputs, seed=8) > 0, random(9, seed=9) > 0
        rho[pruned], bias_rho[bias_pruned] = -math.inf, -math.inf
        x = random(n_samples * batch, inputs, seed=2)
        check_linear(x, mu, rho, bias_mu, bias_rho, scale=scale, kl=kl, n_samples=n_samples, regime=regime)
        gradients = raw_linear(
            x,
            mu,
            rho,
            bias_mu,
            bias_rho,
            KEY,
            prior=Normal(),
            bias_prior=Normal(),
            scale=scale,
            kl=kl,
            n_samples=n_samples,
            row_offset=0,
            column_offset=0,
            grad_y=random(n_samples * batch, 9),
            grad_kl=torch.tensor(1.0),
        )[2]
        for gradient, mask in zip(gradients[1:], (pruned, pruned, bias_pruned, bias_pruned)):
            assert torch.equal(gradient == 0, mask)


@in_every_regime
def test_linear_uses_the_weights_of_sample_normal(regime, inputs, batch):
    """Row by row with x the identity's rows: every regime multiplies by the very weights, bit for bit."""
    mu, rho = posterior(24, inputs)
    drawn = functional.sample_normal(mu, rho, KEY, row_offset=2, column_offset=6)[0]
    eye = torch.eye(inputs).repeat(batch // inputs + 1, 1)[:batch]
    assert regime_of(eye, mu, 1) == expected_regime(regime, eye.dtype)
    y, _ = functional.variational_linear(eye, mu, rho, None, None, KEY, row_offset=2, column_offset=6)
    assert torch.equal(y, drawn.T.repeat(batch // inputs + 1, 1)[:batch])


@pytest.mark.parametrize("regime, batch", [("fused", 2), ("drawn", 33)])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_linear_gradcheck(scale, kl, regime, batch):
    def run(*arguments):
        return functional.variational_linear(
            *arguments, KEY, prior=Normal(0.2, 0.7), scale=scale, kl=kl, n_samples=2
        )

    arguments = (
        random(2 * batch, 4, dtype=torch.float64),
        *posterior(3, 4, dtype=torch.float64),
        *posterior(3, dtype=torch.float64, seed=1),
    )
    assert regime_of(*arguments[:2], 2) == regime
    assert torch.autograd.gradcheck(run, [a.requires_grad_() for a in arguments])
