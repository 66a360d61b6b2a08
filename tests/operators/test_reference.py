"""The plain PyTorch twin against Python integers, torch.distributions and autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernels import SCALES, one_thread  # noqa: F401
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence

from bnn_fast import Normal, reference

SIGMA = {"softplus": F.softplus, "exp": torch.exp, "sqrt_exp": lambda rho: torch.exp(0.5 * rho), "square": torch.square,
         "identity": lambda rho: rho}
KEY = torch.tensor([-0x123456789ABCDEF, 7])


def parameters(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    rho = (torch.randn(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
    return mu.requires_grad_(), rho.requires_grad_()


def noise(key, rows, columns, n_samples=1, dtype=torch.float64, **where):
    """The noise itself: mu = 0 and sigma = 1."""
    zero = torch.zeros(rows, columns, dtype=dtype)
    return reference.sample_normal(zero, zero, key, scale="exp", kl=None, n_samples=n_samples, **where)[0]


@pytest.mark.parametrize("kl", [None, "analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_draw_is_mu_plus_sigma_eps(scale, kl):
    mu, rho = parameters(4, 6)
    w, value = reference.sample_normal(mu, rho, KEY, scale=scale, kl=kl, n_samples=3)
    torch.testing.assert_close(w, mu + SIGMA[scale](rho) * noise(KEY, 4, 6, 3), rtol=1e-14, atol=1e-14)
    assert (value is None) == (kl is None)
    single, _ = reference.sample_normal(mu, rho, KEY, scale=scale, kl=kl)
    assert torch.equal(single, w[0])


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_one_matrix_product_a_draw(n_samples, bias):
    mu, rho = parameters(5, 7)
    bias_mu, bias_rho = parameters(5, seed=1) if bias else (None, None)
    x = torch.randn(n_samples * 2, 3, 7, dtype=torch.float64)
    y, kl = reference.variational_linear(
        x, mu, rho, bias_mu, bias_rho, KEY, n_samples=n_samples, row_offset=2, column_offset=3
    )
    w, kl_w = reference.sample_normal(mu, rho, KEY, n_samples=n_samples, row_offset=2, column_offset=3)
    b, kl_b = None, 0.0
    if bias:
        b, kl_b = reference.sample_normal(
            bias_mu, bias_rho, KEY, n_samples=n_samples, stream=1, column_offset=2
        )
    for s in range(n_samples):
        expected = F.linear(x[2 * s : 2 * s + 2], w[s], b[s] if bias else None)
        torch.testing.assert_close(y[2 * s : 2 * s + 2], expected)
    torch.testing.assert_close(kl, kl_w + kl_b)


@pytest.mark.parametrize("shape, outputs", [((0, 4), 3), ((2, 0), 3), ((2, 4), 0), ((4,), 3)])
def test_nothing_of_something_is_not_an_error(shape, outputs):
    mu, rho = parameters(outputs, shape[-1])
    bias_mu, bias_rho = parameters(outputs, seed=1)
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y, kl = reference.variational_linear(x, mu, rho, bias_mu, bias_rho, KEY)
    assert y.shape == (*shape[:-1], outputs)
    (y.sum() + kl).backward()
    assert x.grad.shape == x.shape and torch.isfinite(mu.grad).all()


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_gradients(scale, kl, n_samples):
    x = torch.randn(2 * n_samples, 4, dtype=torch.float64, requires_grad=True)
    prior = Normal(torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64) + 0.5)

    def run(*args):
        return reference.variational_linear(
            *args, KEY, prior=prior, bias_prior=Normal(0.3, 0.7), scale=scale, kl=kl, n_samples=n_samples
        )

    arguments = (x, *parameters(3, 4), *parameters(3, seed=1))
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)


@pytest.mark.parametrize("prior", [(0.0, 1.0), (0.3, 0.05), "tensors"])
@pytest.mark.parametrize("scale", SCALES)
def test_kl_is_that_of_torch_distributions(scale, prior):
    mu, rho = parameters(5, 7)
    loc, sd = prior if prior != "tensors" else (torch.randn(5, 7).double(), torch.rand(5, 7).double() + 0.1)
    expected = kl_divergence(
        TorchNormal(mu, SIGMA[scale](rho).abs()),
        TorchNormal(torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(sd, dtype=torch.float64)),
    )
    elements = reference.kl_normal(mu, rho, prior=Normal(loc, sd), scale=scale, reduction="none")
    torch.testing.assert_close(elements, expected)
    for reduction in ("sum", "mean"):
        value = reference.kl_normal(mu, rho, prior=Normal(loc, sd), scale=scale, reduction=reduction)
        torch.testing.assert_close(value, getattr(expected, reduction)())
        gradients = torch.autograd.grad(value, (mu, rho), retain_graph=True)
        expected_gradients = torch.autograd.grad(getattr(expected, reduction)(), (mu, rho), retain_graph=True)
        torch.testing.assert_close(gradients, expected_gradients)
    analytic = reference.sample_normal(mu, rho, KEY, prior=Normal(loc, sd), scale=scale)[1]
    torch.testing.assert_close(analytic, expected.sum())


@pytest.mark.parametrize("scale", SCALES)
def test_sampled_kl_is_the_difference_of_log_densities_at_the_draw(scale):
    mu, rho = parameters(5, 7)
    prior = Normal(0.3, 0.6)
    w, value = reference.sample_normal(mu, rho, KEY, prior=prior, scale=scale, kl="sampled", n_samples=4)
    difference = TorchNormal(mu, SIGMA[scale](rho).abs()).log_prob(w) - TorchNormal(0.3, 0.6).log_prob(w)
    torch.testing.assert_close(value, difference.sum() / 4)


def test_sampled_kl_tends_to_the_analytic_one():
    mu, rho = (p.detach() for p in parameters(20, 20))
    prior = Normal(0.2, 0.8)
    _, sampled = reference.sample_normal(mu, rho, KEY, prior=prior, kl="sampled", n_samples=2000)
    exact = reference.kl_normal(mu, rho, prior=prior)
    # One weight's term has a standard deviation of 1 to 3, the mean of 2000 draws of 400 weights below 1.4.
    assert abs(sampled - exact) < 5


@pytest.mark.parametrize("scale", SCALES)
def test_a_pruned_weight_is_its_mean_and_has_no_kl_and_no_gradient(scale):
    mu, rho = parameters(3, 4)
    pruned = torch.zeros(3, 4, dtype=torch.bool)
    pruned[1, 2] = pruned[0, 0] = True
    with torch.no_grad():
        rho[pruned] = -math.inf
    for kl in ("analytic", "sampled"):
        w, value = reference.sample_normal(mu, rho, KEY, scale=scale, kl=kl)
        assert torch.equal(w[pruned], mu[pruned])
        gradients = torch.autograd.grad(w.sin().sum() + value, (mu, rho))
        for gradient in gradients:
            assert torch.equal(gradient == 0, pruned)
            assert torch.isfinite(gradient).all()
    elements = reference.kl_normal(mu, rho, scale=scale, reduction="none")
    assert torch.equal(elements == 0, pruned)
    torch.testing.assert_close(
        reference.kl_normal(mu, rho, scale=scale, reduction="mean"), elements[~pruned].mean()
    )
    assert reference.kl_normal(mu, torch.full_like(rho, -math.inf), scale=scale, reduction="mean") == 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [1e3, math.inf])
def test_overflow_is_infinite_and_never_nan(scale, value):
    mu = torch.zeros(8, requires_grad=True)
    rho = torch.full((8,), value, requires_grad=True)
    for kl in ("analytic", "sampled"):
        w, kl_value = reference.sample_normal(mu, rho, KEY, scale=scale, kl=kl)
        assert not w.isnan().any() and not kl_value.isnan()
        if scale in ("exp", "sqrt_exp") or value == math.inf:
            assert w.isinf().all() and kl_value == math.inf
    assert not any(
        g.isnan().any() for g in torch.autograd.grad(reference.kl_normal(mu, rho, scale=scale), (mu, rho))
    )


def test_far_below_zero_the_kl_follows_log_sigma_itself():
    mu, rho = torch.zeros(3), torch.tensor([-120.0, -100.0, -90.0], requires_grad=True)
    elements = reference.kl_normal(mu, rho, reduction="none")
    torch.testing.assert_close(elements, -rho - 0.5)
    assert torch.equal(torch.autograd.grad(elements.sum(), rho)[0], -torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(dtype):
    mu, rho = parameters(6, 9, dtype=dtype)
    for kl in ("analytic", "sampled"):
        w, value = reference.sample_normal(mu, rho, KEY, kl=kl, n_samples=2)
        expected, expected_value = reference.sample_normal(mu.float(), rho.float(), KEY, kl=kl, n_samples=2)
        assert w.dtype == dtype and torch.equal(w, expected.to(dtype))
        assert value.dtype == torch.float32 and torch.equal(value, expected_value)
    assert reference.kl_normal(mu, rho, reduction="none").dtype == dtype
    x = torch.randn(4, 9, dtype=dtype)
    for parameter_dtype in (dtype, torch.float32):
        y, value = reference.variational_linear(
            x, mu.to(parameter_dtype), rho.to(parameter_dtype), None, None, KEY
        )
        assert y.dtype == dtype and value.dtype == torch.float32


def test_a_prior_of_tensors_and_one_of_numbers_agree():
    mu, rho = parameters(4, 5, dtype=torch.float32)
    numbers = Normal(0.25, 0.5)
    tensors = Normal(torch.full((4, 5), 0.25), torch.full((4, 5), 0.5))
    for kl in ("analytic", "sampled"):
        assert torch.equal(
            reference.sample_normal(mu, rho, KEY, prior=numbers, kl=kl)[1],
            reference.sample_normal(mu, rho, KEY, prior=tensors, kl=kl)[1],
        )
