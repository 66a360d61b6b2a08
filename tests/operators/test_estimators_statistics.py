"""What the estimators estimate: mean, variance and covariance of outputs and gradients against closed forms of a small layer."""
from __future__ import annotations

import math

import pytest
import torch
from common import key_of, needs_extension, posterior

from bnn_fast import functional, reference

ESTIMATORS = ("weight", "local", "flipout")
DRAWS = 100_000
OUTPUTS, INPUTS, ROWS = 2, 3, 2


def small_layer():
    mu, rho = posterior(OUTPUTS, INPUTS, grad=False)
    bias_mu, bias_rho = posterior(OUTPUTS, seed=9, grad=False)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, mu, rho, bias_mu, bias_rho


def exact(x, mu, rho, bias_mu, bias_rho):
    """The mean of y [B, out], and its covariance between rows [out, B, B] where weights are drawn, without the bias's and of it."""
    sigma, of_bias = rho.exp().log1p(), bias_rho.exp().log1p()
    covariance = torch.einsum("bi,ci,oi->obc", x, x, sigma.square())
    return x @ mu.T + bias_mu, covariance, of_bias.square()[:, None, None]


def between_rows(estimator, covariance, of_bias):
    """Signs of examples are independent, so that of flipout only the bias, drawn once, is common to them."""
    own = torch.diag_embed((covariance + of_bias).diagonal(dim1=1, dim2=2))
    if estimator == "local":
        return own
    return covariance + of_bias if estimator == "weight" else own + of_bias * (1 - torch.eye(ROWS, dtype=torch.float64))


@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension), reference])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_outputs(module, estimator):
    x, *parameters = small_layer()
    y, _ = module.variational_linear(x.repeat(DRAWS, 1), *parameters, key_of(5), kl=None, n_samples=DRAWS, estimator=estimator)
    y = y.unflatten(0, (DRAWS, ROWS))
    mean, *parts = exact(x, *parameters)
    expected = between_rows(estimator, *parts)
    deviation = expected.diagonal(dim1=1, dim2=2).T.sqrt()
    assert ((y.mean(0) - mean).abs() < 5 * deviation / math.sqrt(DRAWS)).all()
    centred = (y - mean) / deviation
    found = torch.einsum("sbo,sco->obc", centred, centred) / DRAWS
    expected = expected / torch.einsum("bo,co->obc", deviation, deviation)
    assert (found - expected).abs().max() < 6 * math.sqrt(2 / DRAWS)
    outputs = torch.einsum("sbo,sbp->bop", centred, centred) / DRAWS  # different outputs have nothing in common
    assert (outputs - torch.eye(OUTPUTS)).abs().max() < 6 * math.sqrt(2 / DRAWS)
    assert (estimator == "local") == (expected[0, 0, 1] == 0) and (estimator == "local") == (found[0, 0, 1].abs() < 0.03)


def variances(estimator, x, mu, rho, bias_mu, bias_rho):
    """Of the gradients of L = |y|^2 / 2 by mu, rho and those of the bias.

    Those by mu are sums of y, Gaussian with the covariance of y. Those by rho are sigma' G eps, G a sum of y that is Gaussian with a
    covariance c with eps (given the signs): Var(G eps) = E[G]^2 + Var(G) + c^2, by Isserlis. Of "local" they are sums over rows of
    u y eps / sqrt(v), with the rows' own eps: Var(y eps) = m^2 + 2 v.
    """
    (m, covariance, of_bias), square = exact(x, mu, rho, bias_mu, bias_rho), x.square()
    sigma, of_sigma = rho.exp().log1p(), rho.sigmoid()
    bias_sigma, of_bias_sigma = bias_rho.exp().log1p(), bias_rho.sigmoid()
    both = between_rows(estimator, covariance, of_bias)
    v = (covariance + of_bias).diagonal(dim1=1, dim2=2).T
    by_mu, by_bias = torch.einsum("bi,obc,ci->oi", x, both, x), both.sum((1, 2))
    if estimator == "local":
        of_rows = (m.square() + 2 * v) / v
        by_rho = (sigma * of_sigma).square() * (of_rows.T @ square.square())
        return by_mu, by_rho, by_bias, (bias_sigma * of_bias_sigma).square() * of_rows.sum(0)
    with_eps = (square.sum(0) * sigma).square()
    if estimator == "weight":
        by_rho = (m.T @ x).square() + by_mu + with_eps
    else:  # G = sum_b y r x s: of pairs of rows the signs leave the weight's own part alone
        pairs = square.sum(0).square() - square.square().sum(0)
        by_rho = m.square().T @ square + v.T @ square + pairs * sigma.square() + with_eps
    by_bias_rho = of_bias_sigma.square() * (m.sum(0).square() + by_bias + (ROWS * bias_sigma).square())
    return by_mu, of_sigma.square() * by_rho, by_bias, by_bias_rho


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients(estimator):
    """Of L = |y|^2 / 2, whose mean is (m^2 + v) / 2: every estimator has the same mean gradient, and the variance of its own."""
    x, mu, rho, bias_mu, bias_rho = small_layer()
    parameters = 0.3 * mu, rho + 1.5, 0.3 * bias_mu, bias_rho + 1.0  # a posterior wide enough for all terms to be seen

    def loss(key, *leaves):
        y, _ = functional.variational_linear(x, *leaves, key, kl=None, estimator=estimator)
        return y.square().sum() / 2

    keys = torch.stack([torch.arange(DRAWS), torch.zeros(DRAWS, dtype=torch.int64)], dim=1)
    found = torch.vmap(torch.func.grad(loss, argnums=(1, 2, 3, 4)), in_dims=(0, *[None] * 4))(keys, *parameters)
    leaves = [t.clone().requires_grad_() for t in parameters]
    mean, covariance, of_bias = exact(x, *leaves)
    of_mean = (mean.square().sum() + (covariance + of_bias).diagonal(dim1=1, dim2=2).sum()) / 2
    for each, expected, variance in zip(found, torch.autograd.grad(of_mean, leaves), variances(estimator, x, *parameters), strict=True):
        centred = each - each.mean(0)
        assert ((each.mean(0) - expected).abs() < 5 * (variance / DRAWS).sqrt()).all()
        error = ((centred ** 4).mean(0) - variance.square()).sqrt() / math.sqrt(DRAWS)
        assert ((centred.square().mean(0) - variance).abs() < 5 * error).all()


@needs_extension
def test_local_has_the_least_variance():
    """Of the gradient by rho, for a batch: of "weight" it does not go down with the rows, as all share their draw."""
    torch.manual_seed(0)
    x, (mu, rho) = torch.randn(64, 20), posterior(10, 20, dtype=torch.float32)
    target, variances = torch.randn(64, 10), {}
    for estimator in ESTIMATORS:
        grads = []
        for seed in range(300):
            y, _ = functional.variational_linear(x, mu, rho, None, None, key_of(seed), kl=None, estimator=estimator)
            grads.append(torch.cat(torch.autograd.grad((y - target).square().mean(), [mu, rho])))
        variances[estimator] = torch.stack(grads).var(0).mean().item()
    assert variances["local"] < variances["flipout"] < variances["weight"]
