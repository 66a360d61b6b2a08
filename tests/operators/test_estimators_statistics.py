"""What the estimators estimate: mean, variance and covariance of outputs and gradients against closed forms of a small layer."""
from __future__ import annotations

import math

import pytest
import torch
from common import key_of, needs_extension, posterior

from bnn_fast import functional, reference

ESTIMATORS = ("weight", "local", "flipout")
DRAWS, KEYS = 100_000, 8000
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


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients(estimator):
    """Of L = |y|^2 / 2, whose mean is (m^2 + v) / 2: every estimator has the same mean gradient, and for mu, dL/dmu = sum y x, the
    variance that follows from y's covariance. Of sigma the variance of "local" is the least.
    """
    x, *parameters = small_layer()
    leaves = [t.clone().requires_grad_() for t in parameters]
    found = []
    for seed in range(KEYS):
        y, _ = functional.variational_linear(x, *leaves, key_of(seed), kl=None, estimator=estimator)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum() / 2, leaves)]))
    found = torch.stack(found)
    mean, *parts = exact(x, *parameters)
    covariance = between_rows(estimator, *parts)
    leaves = [t.clone().requires_grad_() for t in parameters]
    mean, covariance_of_weights, of_bias = exact(x, *leaves)
    expected = (mean.square().sum() + (covariance_of_weights + of_bias).diagonal(dim1=1, dim2=2).sum()) / 2
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(expected, leaves)])
    error = found.std(0) / math.sqrt(KEYS)
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    of_mu = torch.einsum("bi,obc,ci->oi", x, covariance, x).flatten()
    assert ((found[:, :of_mu.numel()].var(0) / of_mu - 1).abs() < 8 * math.sqrt(2 / KEYS)).all()


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
