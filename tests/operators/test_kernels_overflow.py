"""Where sigma overflows, results are infinite or 0 as the true values have it, never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from judging import check_overflow, check_zero_sigma, overflowing
from kernels import (
    DTYPES,
    KEY,
    OPS,
    SCALES,
    kl_arguments,
    in_every_regime,
    one_thread,  # noqa: F401
    random,
    raw_sample,
)

from bnn_fast import Normal, functional, reference


@in_every_regime
@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", ["exp", "sqrt_exp"])
def test_an_overflowing_sigma_has_an_infinite_gradient(scale, kl, n_samples, regime, inputs, batch):
    check_overflow(scale, 20, inputs, batch, kl, n_samples)


@in_every_regime
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", ["square", "identity"])
def test_a_sigma_of_zero(scale, kl, regime, inputs, batch):
    check_zero_sigma(scale, 20, inputs, batch, kl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["square", "identity"])
def test_a_sigma_of_zero_in_the_reference_and_every_type(scale, dtype):
    mu, rho = torch.zeros(6, dtype=dtype), torch.tensor([0.0, -0.0, -math.inf, 0.5, -0.5, 1.0], dtype=dtype).requires_grad_()
    for module in (functional, reference):
        for kl in ("analytic", "sampled"):
            w, value = module.sample_normal(mu, rho, KEY, scale=scale, kl=kl)
            (d_rho,) = torch.autograd.grad(value, rho)
            assert value == math.inf and (w[:3] == 0).all() and w.isfinite().all()
            assert d_rho.tolist()[:3] == [-math.inf, math.inf, 0.0] and d_rho[3:].isfinite().all()
        elements = module.kl_normal(mu, rho, scale=scale, reduction="none")
        assert elements.tolist()[:3] == [math.inf, math.inf, 0.0] and elements[3:].isfinite().all()
        (d_rho,) = torch.autograd.grad(module.sample_normal(mu, rho, KEY, scale=scale, kl=None)[0].sum(), rho)
        eps = functional.sample_normal(mu, mu, KEY, scale="exp", kl=None)[0]
        slope = 2 * rho if scale == "square" else torch.ones_like(rho)
        torch.testing.assert_close(d_rho, (slope * eps).masked_fill(rho == -math.inf, 0.0).detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", ["exp", "sqrt_exp"])
def test_in_every_type(scale, kl, dtype):
    rho, large = overflowing(9, 40, dtype)
    mu = torch.zeros_like(rho)
    wide = torch.promote_types(dtype, torch.float32)
    for weight, sign in ((0.3, 1), (-0.3, -1)):
        _, (d_mu, d_rho) = raw_sample(
            mu,
            rho,
            prior=Normal(),
            scale=scale,
            kl=kl,
            n_samples=1,
            grad_w=random(1, 9, 40, dtype=dtype, seed=5),
            grad_kl=torch.tensor(weight, dtype=wide),
        )
        assert (d_rho[large] == sign * math.inf).all() and not d_rho.isnan().any() and not d_mu.isnan().any()


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_sigmas_near_both_ends(scale, kl):
    """Of finite sigmas beyond 1e19 the KL overflows; of vanishing ones only (log sigma)' is left of its gradient."""
    low, high = {"softplus": (-85.0, 1e30), "exp": (-85.0, 80.0), "sqrt_exp": (-170.0, 160.0), "square": (-1e-15, 1e18),
                 "identity": (-1e-30, 1e30)}[scale]
    for value in (low, high):
        rho = torch.full((5, 40), value)
        _, (d_mu, d_rho) = raw_sample(
            torch.zeros(5, 40),
            rho,
            prior=Normal(),
            scale=scale,
            kl=kl,
            n_samples=1,
            grad_w=random(1, 5, 40, seed=5),
            grad_kl=torch.tensor(1.0),
        )
        if value == low:
            expected = {"sqrt_exp": -0.5, "square": 2e15, "identity": 1e30}.get(scale, -1.0)
            torch.testing.assert_close(d_rho, torch.full_like(d_rho, expected))
        elif scale in ("softplus", "identity"):  # sigma' = 1, so that it is about sigma / t^2, and eps^2 of it
            assert (d_rho > 1e20).all() and d_rho.isfinite().all()
        else:
            assert (d_rho == math.inf).all() and not d_mu.isnan().any()


@pytest.mark.parametrize("scale", ["exp", "sqrt_exp"])
def test_elementwise_divergence(scale):
    rho, large = overflowing(5, 40)
    mu = random(5, 40, seed=1)
    arguments = kl_arguments(mu, rho, scale=scale, reduce=False)
    assert (OPS._kl_normal(*arguments)[large] == math.inf).all()
    grad = torch.ones(5, 40)
    grad[0] = 0.0
    d_mu, d_rho = OPS._kl_normal_backward([grad], *arguments)
    assert (d_rho[1:][large[1:]] == math.inf).all() and (d_rho[0] == 0).all() and d_mu.isfinite().all()
