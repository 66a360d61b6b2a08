"""Likelihoods of torch.distributions: noise with heavy tails, and counts."""
from __future__ import annotations

import copy
import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

import bnn_fast as bf

OF_SCIPY = {
    "laplace": (lambda: bf.LaplaceNoise(0.7), lambda f: scipy.stats.laplace(f, 0.7)),
    "student": (lambda: bf.StudentTNoise(5.0, 0.7), lambda f: scipy.stats.t(5.0, f, 0.7)),
    "poisson": (lambda: bf.Poisson(), lambda f: scipy.stats.poisson(math.exp(f))),
    "negative binomial": (lambda: bf.NegativeBinomial(3.0), lambda f: scipy.stats.nbinom(3.0, 3.0 / (3.0 + math.exp(f)))),
}


class Answers(nn.Module):
    """A variational layer whose outputs barely depend on the draw: its mean is what each row asks for."""

    def __init__(self, spread: float = 1e-6):
        super().__init__()
        self.layer = bf.VariationalLinear(1, 1, bias=False, init_sigma=spread, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight_mu.fill_(1.0)

    def forward(self, x):
        return self.layer(x)


def targets_of(name: str, outputs):
    if "o" in name and name in ("poisson", "negative binomial"):
        return torch.tensor([[0.0], [1.0], [4.0], [30.0]], dtype=outputs.dtype)
    return torch.tensor([[-2.0], [0.1], [0.4], [30.0]], dtype=outputs.dtype)


@pytest.mark.parametrize("name", OF_SCIPY)
def test_the_nll_is_that_of_scipy(name):
    make, of_scipy = OF_SCIPY[name]
    outputs = torch.tensor([[[-1.0], [0.1], [1.5], [3.0]]], dtype=torch.float64)
    targets = targets_of(name, outputs)
    found = make()(outputs, targets)
    assert found.shape == (1, 4)
    for f, y, nll in zip(outputs.flatten().tolist(), targets.flatten().tolist(), found[0].tolist()):
        own = of_scipy(f)
        assert nll == pytest.approx(-(own.logpmf(y) if hasattr(own.dist, "pmf") else own.logpdf(y)), rel=1e-5)
    two = make()(outputs.expand(1, 4, 1).repeat(1, 1, 2), targets.repeat(1, 2))
    torch.testing.assert_close(two, 2.0 * found)  # summed over the outputs of a row


@pytest.mark.parametrize("name", OF_SCIPY)
def test_prediction(name):
    make, of_scipy = OF_SCIPY[name]
    x = torch.tensor([[-0.5], [0.3], [1.0]], dtype=torch.float64)
    prediction = bf.predict(Answers(), x, make(), n_samples=40, seed=1)
    assert isinstance(prediction, bf.FamilyPrediction)
    owns = [of_scipy(f) for f in x.flatten().tolist()]
    for row, own in enumerate(owns):
        assert prediction.mean[row].item() == pytest.approx(own.mean(), rel=1e-4, abs=1e-4)
        assert prediction.std[row].item() == pytest.approx(own.std(), rel=1e-4)
        assert prediction.aleatoric[row].item() == pytest.approx(own.var(), rel=1e-4)
        assert prediction.epistemic[row].item() < 1e-8
    targets = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)
    exact = [own.logpmf(y) if hasattr(own.dist, "pmf") else own.logpdf(y) for own, y in zip(owns, targets.flatten().tolist())]
    torch.testing.assert_close(prediction.log_prob(targets), torch.tensor(exact, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    levels = [0.1, 0.5, 0.9]
    found = prediction.quantile(levels)
    for row, own in enumerate(owns):
        for level, value in zip(levels, found[:, row, 0].tolist()):  # from 1,000 draws: within four standard errors of the level
            assert own.cdf(value - 1e-9) - 0.04 <= level <= own.cdf(value) + 0.04
        assert prediction.cdf(targets)[row].item() == pytest.approx(own.cdf(targets[row].item()), abs=0.05)
    assert torch.equal(found, prediction.quantile(levels))  # the same noise again
    before = torch.random.get_rng_state()
    prediction.crps(targets)
    assert torch.equal(before, torch.random.get_rng_state())


def exact_crps(own, y: float) -> float:
    """The integral of (F(t) - [t >= y])^2 (Gneiting and Raftery 2007, equation 20)."""
    if hasattr(own.dist, "pmf"):
        return sum((own.cdf(k) - (k >= y)) ** 2 for k in range(2000))
    low = scipy.integrate.quad(lambda t: own.cdf(t) ** 2, -200.0, y, limit=500)[0]
    return low + scipy.integrate.quad(lambda t: own.sf(t) ** 2, y, 200.0, limit=500)[0]


@pytest.mark.parametrize("name", OF_SCIPY)
def test_crps(name):
    make, of_scipy = OF_SCIPY[name]
    x = torch.tensor([[0.3], [1.0]], dtype=torch.float64)
    targets = torch.tensor([[2.0], [7.0]], dtype=torch.float64)
    prediction = bf.predict(Answers(), x, make(), n_samples=50, seed=1)
    exact = sum(exact_crps(of_scipy(f), y) for f, y in zip((0.3, 1.0), (2.0, 7.0))) / 2
    assert prediction.crps(targets).item() == pytest.approx(exact, rel=0.04)


def test_crps_of_a_gaussian_mixture():
    x, targets = torch.tensor([[0.3], [1.0]], dtype=torch.float64), torch.tensor([[2.0], [0.7]], dtype=torch.float64)
    prediction = bf.predict(Answers(), x, bf.Gaussian(0.5), n_samples=50, seed=1)
    exact = bf.metrics.crps_gaussian(prediction.mean, prediction.std, targets)
    assert prediction.crps(targets).item() == pytest.approx(exact.item(), rel=0.04)


def test_spread_between_the_draws_counts():
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    prediction = bf.predict(Answers(0.5), x, bf.LaplaceNoise(0.1), n_samples=2000, seed=3)
    torch.testing.assert_close(prediction.epistemic, 0.25 * x.square(), rtol=0.1, atol=0.0)
    torch.testing.assert_close(prediction.std.square(), prediction.epistemic + prediction.aleatoric)
    low, high = prediction.interval(0.9)
    torch.testing.assert_close(high - low, 2 * 1.645 * 0.5 * x, rtol=0.15, atol=0.1)


def test_student_without_a_variance():
    x = torch.tensor([[1.0]], dtype=torch.float64)
    for df in (0.5, 1.0, 2.0):
        prediction = bf.predict(Answers(), x, bf.StudentTNoise(df), n_samples=10, seed=3)
        assert prediction.mean.item() == pytest.approx(1.0, abs=1e-4) and prediction.std.item() == math.inf
        assert prediction.quantile(0.5).item() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("make", [lambda: bf.LaplaceNoise(2.0, learned=True), lambda: bf.StudentTNoise(3.0, 2.0, learned=True)])
def test_a_learned_scale_is_found(make):
    torch.manual_seed(0)
    likelihood, outputs = make(), torch.zeros(1, 4000, 1)
    noise = likelihood.distribution(torch.zeros(4000, 1)).sample() / 4.0  # of scale 0.5
    optimiser = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        likelihood(outputs, noise).mean().backward()
        optimiser.step()
    assert likelihood.scale.item() == pytest.approx(0.5, rel=0.08)
    again = make()
    again.load_state_dict(copy.deepcopy(likelihood.state_dict()))
    assert torch.equal(again.scale, likelihood.scale)
    assert [name for name, _ in likelihood.named_parameters()] == ["log_scale"]


def test_a_learned_dispersion():
    torch.manual_seed(0)
    likelihood = bf.NegativeBinomial(10.0, learned=True)
    counts = bf.NegativeBinomial(2.0).distribution(torch.full((8000, 1), 1.5)).sample()
    optimiser = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        likelihood(torch.full((1, 8000, 1), 1.5), counts).mean().backward()
        optimiser.step()
    assert likelihood.total_count.item() == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("name", OF_SCIPY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extremes_are_no_nan(name, dtype):
    likelihood = OF_SCIPY[name][0]()
    outputs = torch.tensor([[[-1e4], [0.0], [1e4], [3e38]]], dtype=dtype).requires_grad_()
    for target in (0.0, 1.0, 1e6):
        nll = likelihood(outputs, torch.full((4, 1), target))
        assert not nll.isnan().any() and nll.dtype == torch.promote_types(dtype, torch.float32)
        (grad,) = torch.autograd.grad(nll.clamp(max=1e30).sum(), outputs)
        assert not grad.isnan().any()
    tiny = bf.LaplaceNoise(1e-30), bf.StudentTNoise(4.0, 1e-30)
    for likelihood in tiny:
        with torch.no_grad():
            likelihood.log_scale.fill_(-200.0)
        assert likelihood(torch.zeros(1, 2, 1), torch.zeros(2, 1)).isfinite().all()


def test_trained_by_elbo_and_compiled():
    torch.manual_seed(1)
    x = torch.linspace(-1.0, 1.0, 64)[:, None]
    counts = torch.poisson((1.0 + 1.5 * x).exp())
    model = bf.VariationalLinear(1, 1)
    elbo = bf.ELBO(model, bf.Poisson(), n_data=64)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        elbo(x, counts, n_samples=4).backward()
        optimiser.step()
    assert model.weight_mu.item() == pytest.approx(1.5, abs=0.4) and model.bias_mu.item() == pytest.approx(1.0, abs=0.3)
    compiled = torch.compile(bf.Poisson(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[None], counts), bf.Poisson()(x[None], counts))


def test_bad_input():
    outputs, y = torch.zeros(1, 3, 1), torch.zeros(3, 1)
    for make, message in ((lambda: bf.LaplaceNoise(0.0), "scale: expected a positive"), (lambda: bf.StudentTNoise(-1.0), "df: expected a positive"),
                          (lambda: bf.StudentTNoise(None), "df: expected a positive"), (lambda: bf.NegativeBinomial("2"), "total_count: expected"),
                          (lambda: bf.LaplaceNoise(learned="yes"), "learned: expected")):
        with pytest.raises((TypeError, ValueError), match=message):
            make()
    for counts in (torch.full((3, 1), -1.0), torch.full((3, 1), 0.5), torch.full((3, 1), math.nan), torch.full((3, 1), math.inf)):
        for likelihood in (bf.Poisson(), bf.NegativeBinomial()):
            with pytest.raises(ValueError, match="targets: expected counts 0, 1, 2"):
                likelihood(outputs, counts)
    with pytest.raises(TypeError, match="targets: expected counts"):
        bf.Poisson()(outputs, y.bool())
    for likelihood in (bf.LaplaceNoise(), bf.StudentTNoise(), bf.Poisson(), bf.NegativeBinomial()):
        with pytest.raises(ValueError, match="outputs: expected"):
            likelihood(outputs, torch.zeros(3, 2))
        assert likelihood(outputs, y.long()).shape == (1, 3)  # counts may be integers
