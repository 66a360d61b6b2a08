"""The compiled sample_normal and kl_normal against the reference with the same key; the noise bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from judging import check_kl, check_sample
from kernels import (
    DTYPES,
    KEY,
    KLS,
    OPS,
    SCALES,
    draw_arguments,
    kl_arguments,
    one_thread,  # noqa: F401
    posterior,
    random,
)

from bnn_fast import Normal, functional, reference
from bnn_fast.priors.scales import sigma_of


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (0,),
        (1,),
        (5,),
        (1023,),
        (3, 1),
        (1, 3),
        (7, 127),
        (2, 4097),
        (0, 4),
        (4, 0),
        (3, 2, 5),
        (2, 3, 4, 5),
    ],
    ids=str,
)
def test_noise_is_the_references_bit_for_bit(shape):
    zero = torch.zeros(shape)
    for n_samples, stream, row_offset, column_offset in (
        (1, 0, 0, 0),
        (3, 1, 2, 5),
        (2, 7, 2**32 - 9, 2**32 - 3),
    ):
        for key in (KEY, torch.tensor([-1, 2**32 - 2]), torch.tensor([-(2**63), 0])):
            options = dict(
                key=key,
                scale="exp",
                kl=None,
                n_samples=n_samples,
                stream=stream,
                row_offset=row_offset,
                column_offset=column_offset,
            )
            w, _ = OPS._sample_normal(*draw_arguments(zero, zero, **options))
            expected, _ = reference.sample_normal(zero, zero, **options)
            assert w.shape == (n_samples, *shape)
            assert torch.equal(w.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("scale", SCALES)
def test_sigma_is_within_4_ulp_of_the_references(scale):
    low, high = {"softplus": (-87, 120), "exp": (-87, 87), "sqrt_exp": (-120, 120)}.get(scale, (-1e3, 1e3))
    rho = torch.linspace(low, high, 1_000_003)
    zero = torch.zeros_like(rho)
    w = functional.sample_normal(zero, rho, KEY, scale=scale, kl=None)[0]
    eps = functional.sample_normal(zero, zero, KEY, scale="exp", kl=None)[0]
    sigma = sigma_of(rho, scale)
    # w / eps is sigma, but for one more rounding, where w is neither denormal nor inf
    inside = (w.abs() > 1e-36) & w.isfinite()
    assert inside.float().mean() > 0.95
    assert (w.double() / eps.double() / sigma.double() - 1)[inside].abs().max() <= 4.5 * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_sample_normal(scale, kl, dtype):
    for tensors, n_samples, offsets in itertools.product((False, True), (1, 3), ((0, 0), (3, 6))):
        for shape in ((19, 37), (5,), (2, 3, 7), (), (0, 3)):
            check_sample(
                *shape, dtype=dtype, tensors=tensors, scale=scale, kl=kl, n_samples=n_samples, offsets=offsets
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_kl_normal(scale, dtype):
    for tensors, shape in itertools.product(
        (False, True), ((19, 37), (3, 1023), (5,), (2, 3, 7), (), (0, 3))
    ):
        for reduction in ("sum", "none"):
            check_kl(*shape, dtype=dtype, tensors=tensors, reduction=reduction, scale=scale)


@pytest.mark.parametrize("scale", SCALES)
def test_kl_normal_over_the_whole_range_of_rho(scale):
    high = 40.0 if scale in ("exp", "sqrt_exp") else 120.0
    rho = torch.cat([torch.linspace(-120, high, 5000), torch.tensor([-math.inf])])
    mu = random(5001)
    leaves = mu.double().requires_grad_(), rho.double().requires_grad_()
    truth = reference.kl_normal(*leaves, scale=scale, reduction="none")
    grads = torch.autograd.grad(truth.sum(), leaves)
    arguments = kl_arguments(mu, rho, scale=scale, reduce=False)
    torch.testing.assert_close(OPS._kl_normal(*arguments).double(), truth.detach(), rtol=1e-6, atol=1e-5)
    for got, true in zip(OPS._kl_normal_backward([torch.ones(5001)], *arguments), grads):
        torch.testing.assert_close(got.double(), true, rtol=2e-6, atol=1e-6)
        assert got[-1] == 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_of_rho", [1e4, math.inf])
def test_overflow_is_infinite_and_never_nan(value_of_rho, dtype, scale):
    mu, rho = torch.zeros(3, 40, dtype=dtype), torch.full((3, 40), value_of_rho, dtype=dtype)
    for kl in ("analytic", "sampled"):
        w, value = OPS._sample_normal(*draw_arguments(mu, rho, scale=scale, kl=kl, n_samples=2))
        assert not w.isnan().any() and not value.isnan()
        if scale in ("exp", "sqrt_exp") or value_of_rho == math.inf:
            assert w.isinf().all() and value == math.inf
    elements = OPS._kl_normal(*kl_arguments(mu, rho, scale=scale, reduce=False))
    assert not elements.isnan().any()


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_sample_normal_and_kl_normal_gradcheck(scale, kl):
    def run(mu, rho):
        return (
            *functional.sample_normal(mu, rho, KEY, prior=Normal(0.2, 0.7), scale=scale, kl=kl, n_samples=2),
            functional.kl_normal(mu, rho, scale=scale),
            functional.kl_normal(mu, rho, scale=scale, reduction="none"),
        )

    assert torch.autograd.gradcheck(run, [p.requires_grad_() for p in posterior(3, 7, dtype=torch.float64)])
