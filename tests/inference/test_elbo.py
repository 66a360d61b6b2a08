"""ELBO, likelihoods, KL weights."""
from __future__ import annotations

import copy
import math

import pytest
import torch
from common import network, twin  # noqa: F401
from torch import distributions, nn

import bnn_fast as bf
from bnn_fast.inference.mean_nll import mean_nll


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(6, 3, dtype=torch.float64, generator=generator),
            torch.randn(6, 2, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("n_samples", [1, 3])
def test_elbo_is_mean_nll_plus_kl_over_n_data(twin, batch, n_samples):
    model = network()
    x, y = batch
    elbo = bf.ELBO(model, bf.Gaussian(0.5).double(), n_data=100, kl_weight=0.3)
    torch.manual_seed(0)
    loss = elbo(x, y, n_samples)
    torch.manual_seed(0)
    outputs = bf.mc_forward(model, x, n_samples)
    nll = -distributions.Normal(outputs, torch.tensor(0.5).double()).log_prob(y).sum(-1).mean()
    torch.testing.assert_close(elbo.nll, nll.detach())
    torch.testing.assert_close(elbo.kl, bf.kl_divergence(model).detach())
    torch.testing.assert_close(loss, nll + 0.3 * elbo.kl / 100)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    copy.deepcopy(elbo)


def test_sampled_kl_is_of_the_draws_of_the_call(twin, batch):
    model = network(kl="sampled")
    elbo = bf.ELBO(model, bf.Gaussian(), 100)
    elbo(*batch, 2)
    torch.testing.assert_close(bf.kl_divergence(model).detach(), elbo.kl)


def test_learned_noise_is_among_the_parameters(twin, batch):
    elbo = bf.ELBO(network(), bf.Gaussian(0.2, learned=True), 100)
    assert "likelihood.log_scale" in dict(elbo.named_parameters())
    torch.testing.assert_close(elbo.likelihood.scale.item(), 0.2)
    elbo(*batch).backward()
    assert elbo.likelihood.log_scale.grad is not None
    assert "log_scale" not in dict(bf.Gaussian(0.2).named_parameters())


def test_learned_noise_finds_the_noise():
    torch.manual_seed(0)
    likelihood = bf.Gaussian(3.0, learned=True)
    targets, outputs = 0.5 * torch.randn(20000, 1), torch.zeros(1, 20000, 1)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        likelihood(outputs, targets).mean().backward()
        optimizer.step()
    torch.testing.assert_close(likelihood.scale.item(), 0.5, rtol=0.02, atol=0)


def test_training_reduces_the_loss(twin):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = (x.sum(1, keepdim=True) > 0).float()
    model = nn.Sequential(bf.VariationalLinear(3, 16), nn.ReLU(), bf.VariationalLinear(16, 1))
    elbo = bf.ELBO(model, bf.Bernoulli(), n_data=64, kl_weight=0.1)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = elbo(x, y, 2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and elbo.nll < 0.4


S, B = 3, 5
OUTPUTS = torch.randn(S, B, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("likelihood, targets, expected", [
    (bf.Gaussian(0.7), torch.randn(B, 4), lambda t: -distributions.Normal(OUTPUTS, 0.7).log_prob(t).sum(-1)),
    (bf.HeteroscedasticGaussian(), torch.randn(B, 2),
     lambda t: -distributions.Normal(OUTPUTS[..., :2], (0.5 * OUTPUTS[..., 2:]).exp()).log_prob(t).sum(-1)),
    (bf.Bernoulli(), (torch.rand(B, 4) > 0.5).float(),
     lambda t: -distributions.Bernoulli(logits=OUTPUTS).log_prob(t).sum(-1)),
    (bf.Bernoulli(), torch.rand(B, 4) > 0.5,
     lambda t: -distributions.Bernoulli(logits=OUTPUTS).log_prob(t.float()).sum(-1)),
    (bf.Categorical(), torch.tensor([0, 1, 2, 3, 0]),
     lambda t: -distributions.Categorical(logits=OUTPUTS).log_prob(t)),
])
def test_likelihoods(likelihood, targets, expected):
    found = likelihood(OUTPUTS, targets)
    assert found.shape == (S, B)
    torch.testing.assert_close(found, expected(targets))


def test_categorical_log_probs_and_more_dimensions():
    targets = torch.randint(4, (B,))
    torch.testing.assert_close(bf.Categorical(log_probs=True)(OUTPUTS.log_softmax(-1), targets),
                               bf.Categorical()(OUTPUTS, targets))
    outputs, targets = torch.randn(S, B, 7, 4), torch.randint(4, (B, 7))
    torch.testing.assert_close(bf.Categorical()(outputs, targets),
                               -distributions.Categorical(logits=outputs).log_prob(targets).sum(-1))


def test_likelihoods_are_stable_and_in_float32_at_least():
    assert bf.Bernoulli()(torch.tensor([[[1000.0]], [[-1000.0]]]), torch.ones(1, 1)).tolist() == [[0.0],
                                                                                                  [1000.0]]
    assert bf.Categorical()(OUTPUTS.bfloat16(), torch.zeros(B, dtype=torch.int64)).dtype == torch.float32
    nll = bf.HeteroscedasticGaussian()(torch.tensor([[[0.0, -150.0]]], requires_grad=True), torch.zeros(1, 1))
    assert nll.isfinite().all()


@pytest.mark.parametrize("likelihood, outputs, targets, message", [
    (bf.Gaussian(), (2, 5, 1), (5,),
     r"expected \[5\] for each draw, given outputs \[5, 1\] for each draw and targets \[5\]"),
    (bf.Gaussian(), (2, 5), (5, 1), r"expected \[5, 1\] for each draw"),
    (bf.Gaussian(), (2, 5, 3), (5, 1), r"expected \[5, 1\] for each draw"),
    (bf.Bernoulli(), (2, 5, 1), (5,), r"expected \[5\] for each draw"),
    (bf.HeteroscedasticGaussian(), (2, 5, 3), (5, 3), r"expected \[5, 6\] for each draw"),
    (bf.HeteroscedasticGaussian(), (2, 5), (5,), "expected at least two dimensions in the targets"),
    (bf.Categorical(), (2, 5, 4), (5, 1), r"expected \[5, 1, 4\] for each draw"),
    (bf.Categorical(), (2, 6, 4), (5,), r"expected \[5, 4\] for each draw"),
])
def test_shapes_that_do_not_match(likelihood, outputs, targets, message):
    dtype = torch.int64 if isinstance(likelihood, bf.Categorical) else torch.float32
    with pytest.raises(ValueError, match=message):
        likelihood(torch.zeros(outputs), torch.zeros(targets, dtype=dtype))


def test_elbo_with_targets_of_another_shape(batch):
    x, _ = batch
    elbo = bf.ELBO(nn.Sequential(network(), nn.Linear(2, 1).double()), bf.Gaussian(), 100)
    with pytest.raises(ValueError, match="they are not broadcast"):
        elbo(x, torch.zeros(6).double())


@pytest.mark.parametrize("make, error, message", [
    (lambda: bf.ELBO(network(), bf.Gaussian(), 0), ValueError,
     "n_data: expected the positive number of training rows, given int 0"),
    (lambda: bf.ELBO(network(), bf.Gaussian(), 10, "1"), TypeError,
     "kl_weight: expected a number or a callable"),
    (lambda: bf.Gaussian(0.0), ValueError, "scale: expected a positive number, given float 0.0"),
    (lambda: bf.Gaussian(torch.ones(2)), ValueError, "scale: expected a positive number"),
    (lambda: bf.Categorical()(torch.zeros(1, 2, 3), torch.zeros(2)), TypeError,
     "targets: expected integer classes"),
    (lambda: bf.linear_warmup(0), ValueError, "steps: expected at least 1"),
    (lambda: bf.blundell_weights(0), ValueError, "n_batches: expected at least 1"),
])
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_linear_warmup():
    weight = bf.linear_warmup(4)
    assert [weight(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("m", [1, 2, 10, 2000, 10 ** 6])
def test_blundell_weights(m):
    weight = bf.blundell_weights(m)
    total = math.fsum(weight(step) for step in range(min(m, 1100)))
    assert math.isclose(total, m, rel_tol=1e-12), "the mean over an epoch is 1"
    assert weight(0) == weight(m) and weight(0) <= m
    if m > 1:
        assert math.isclose(weight(0), 2 * weight(1)) and weight(m - 1) >= 0
    if m <= 10:
        for i in range(1, m + 1):
            assert math.isclose(weight(i - 1), m * 2 ** (m - i) / (2 ** m - 1))


def test_kl_weight_follows_the_steps_made_with_gradients(batch):
    seen = []
    elbo = bf.ELBO(network(), bf.Gaussian(), 100, kl_weight=lambda step: seen.append(step) or 0.5 * step)
    for _ in range(2):
        torch.testing.assert_close(elbo(*batch).detach(), elbo.nll + 0.5 * seen[-1] * elbo.kl / 100)
        with torch.no_grad():
            elbo(*batch)
    assert seen == [0, 1, 1, 2]
    assert elbo.state_dict()["step"] == elbo.step == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fixed_scale_may_change(dtype):
    """Its numbers are made once, and anew where it has another value."""
    outputs, y = torch.randn(2, 5, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype)

    def check(likelihood, scale):
        expected = -torch.distributions.Normal(outputs.double(), scale).log_prob(y.double()).sum(-1)
        torch.testing.assert_close(likelihood(outputs, y).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean_nll(likelihood, outputs, y).double(), expected.mean(), rtol=1e-5, atol=1e-5)

    likelihood = bf.Gaussian(0.5)
    check(likelihood, 0.5)
    check(likelihood, 0.5)
    likelihood.load_state_dict(bf.Gaussian(2.0).state_dict())
    check(likelihood, 2.0)
    likelihood.log_scale.fill_(math.log(3.0))
    check(copy.deepcopy(likelihood), 3.0)
    check(likelihood, 3.0)
    check(likelihood.double(), 3.0)
    likelihood.load_state_dict(bf.Gaussian(0.25).double().state_dict(), assign=True)
    check(likelihood, 0.25)
    for scale in (1e-20, 1e20):  # whose squares are no numbers in float32
        assert not bf.Gaussian(scale)(outputs, y).isnan().any()
    assert bf.Gaussian(1e-20)(outputs, outputs[0])[0].isfinite().all()
