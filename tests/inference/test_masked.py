"""What has no weight has no gradient, whatever the model gives for it."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf

COUNTS = torch.tensor([[0.0, 3.0], [1.0, 0.0], [2.0, 5.0], [7.0, 1.0]])
CASES = {
    "gaussian": (lambda: bf.Gaussian(0.5), 2, COUNTS),
    "learned gaussian": (lambda: bf.Gaussian(0.5, learned=True), 2, COUNTS),
    "heteroscedastic": (bf.HeteroscedasticGaussian, 4, COUNTS),
    "bernoulli": (bf.Bernoulli, 2, COUNTS.clamp(max=1.0)),
    "student": (lambda: bf.StudentTNoise(3.0, 0.5, learned=True), 2, COUNTS),
    "laplace": (lambda: bf.LaplaceNoise(0.5, learned=True), 2, COUNTS),
    "poisson": (bf.Poisson, 2, COUNTS),
    "negative binomial": (lambda: bf.NegativeBinomial(2.0, learned=True), 2, COUNTS),
    "categorical": (bf.Categorical, 3, torch.tensor([0, 2, 1, 1])),
    "categorical of log-probabilities": (lambda: bf.Categorical(log_probs=True), 3, torch.tensor([0, 2, 1, 1])),
    "categorical of elements": (lambda: bf.Categorical(class_dim=1), (3, 2), torch.tensor([[0, 2], [1, 1], [2, 2], [0, 1]])),
    "soft labels": (bf.Categorical, 3, torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])),
}


class Given(nn.Module):
    """Gives its outputs [S, B, ...] as they are, so that their gradient is that of the likelihood."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.outputs = bf.VariationalLinear(1, 1), outputs

    def forward(self, x):
        return self.outputs.flatten(0, 1) + 0.0 * self.layer(x).sum()


def outputs_of(width) -> torch.Tensor:
    shape = (2, 4, *(width if isinstance(width, tuple) else (width,)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gradients(likelihood, outputs, targets, weights):
    outputs = outputs.clone().requires_grad_()
    elbo = bf.ELBO(Given(outputs), likelihood, 100, seed=1)
    loss = elbo(torch.zeros(4, 1), targets, n_samples=2, weights=weights)
    own = list(likelihood.parameters()) if isinstance(likelihood, nn.Module) else []
    return elbo.nll, torch.autograd.grad(loss, [outputs, *own])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", CASES)
def test_a_row_without_weight(name, bad):
    make, width, targets = CASES[name]
    likelihood, outputs, weights = make(), outputs_of(width), torch.tensor([1.0, 0.0, 2.0, 0.0])
    nll, (found, *own) = gradients(likelihood, outputs, targets, weights)
    hidden = weights == 0.0
    broken = outputs.masked_fill(hidden.reshape(4, *(1,) * (outputs.dim() - 2)), bad)
    if targets.is_floating_point():
        targets = targets.masked_fill(hidden.reshape(4, *(1,) * (targets.dim() - 1)), torch.nan)
    again, (without, *own_without) = gradients(likelihood, broken, targets, weights)
    assert torch.equal(nll, again) and torch.equal(found, without)
    assert (without[:, hidden] == 0.0).all() and (without[:, ~hidden] != 0.0).any()
    torch.testing.assert_close(own, own_without)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2].dim() > 1 and name != "soft labels"])
def test_an_element_without_weight(name, bad):
    make, width, targets = CASES[name]
    likelihood, outputs = make(), outputs_of(width)
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0]])
    nll, (found, *own) = gradients(likelihood, outputs, targets, weights)
    hidden = (weights == 0.0)[:, None] if isinstance(width, tuple) else (weights == 0.0).repeat(1, width // 2)
    broken = outputs.masked_fill(hidden, bad)
    again, (without, *own_without) = gradients(likelihood, broken, targets, weights)
    assert torch.equal(nll, again) and torch.equal(found, without)
    assert (without.masked_select(hidden) == 0.0).all() and without.isfinite().all()
    torch.testing.assert_close(own, own_without)


@pytest.mark.parametrize("log_probs", [False, True])
def test_a_target_that_is_ignored(log_probs):
    likelihood, outputs = bf.Categorical(log_probs, ignore_index=-100), outputs_of(3)
    targets = torch.tensor([0, -100, 2, 1])
    nll, (found,) = gradients(likelihood, outputs, targets, None)
    outputs[:, 1] = torch.nan
    again, (without,) = gradients(likelihood, outputs, targets, None)
    assert torch.equal(nll, again) and torch.equal(found, without) and (without[:, 1] == 0.0).all()


def test_a_likelihood_of_ones_own_that_takes_several_outputs():
    class Two(Given):
        def forward(self, x):
            return {"mean": super().forward(x), "name": "two"}

    outputs = outputs_of(2)
    outputs[:, 1] = torch.nan
    outputs.requires_grad_()
    elbo = bf.ELBO(Two(outputs), lambda o, y: (o["mean"] - y).square().sum(-1), 100)
    loss = elbo(torch.zeros(4, 1), COUNTS, n_samples=2, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    found, = torch.autograd.grad(loss, outputs)
    assert found.isfinite().all() and (found[:, 1] == 0.0).all() and loss.isfinite()
