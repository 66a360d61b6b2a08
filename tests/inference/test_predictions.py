"""What a prediction tells: quantiles, intervals, the parts of its variance, classes."""
from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from common import network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast.inference import prediction as prediction_module


@pytest.fixture
def x():
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_quantiles_of_the_draws(x, monkeypatch):
    found = bf.predict(network(), x, n_samples=20, seed=1)
    levels = [0.0, 0.05, 0.5, 0.77, 1.0]
    expected = found.samples.quantile(torch.tensor(levels, dtype=torch.float64), dim=0)
    torch.testing.assert_close(found.quantile(levels), expected)
    torch.testing.assert_close(found.quantile(torch.tensor(levels)), expected)
    torch.testing.assert_close(found.quantile(0.77), expected[3])
    low, high = found.interval(0.8)
    torch.testing.assert_close(low, found.quantile(0.1))
    torch.testing.assert_close(high, found.quantile(0.9))
    monkeypatch.setattr(prediction_module, "_BLOCK", 1)
    torch.testing.assert_close(found.quantile(levels), expected)
    y = found.quantile(0.52)  # between the 10th and the 11th draw
    torch.testing.assert_close(found.cdf(y), torch.full_like(y, 0.5))
    assert found.cdf(found.samples.amax(0)).eq(1.0).all()


class Outputs(nn.Module):
    """Gives these outputs [S, B, ...], draw by draw."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.at = outputs, 0

    def forward(self, x):
        n = len(x) // self.outputs.shape[1]
        self.at += n
        return self.outputs[self.at - n:self.at].flatten(0, 1)


def of_outputs(outputs, likelihood):
    return bf.predict(Outputs(outputs), torch.zeros(outputs.shape[1], 1), likelihood, len(outputs))


def test_a_nan_among_the_draws_is_seen():
    found = of_outputs(torch.tensor([[[1.0], [1.0]], [[math.nan], [2.0]], [[3.0], [3.0]]]), None)
    assert found.quantile(0.1).isnan().flatten().tolist() == [True, False]
    assert found.mean.isnan().flatten().tolist() == [True, False]


OUTPUTS = 2 * torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mixture(likelihood):
    """(means, standard deviations) [S, B, ...] of OUTPUTS."""
    if isinstance(likelihood, bf.HeteroscedasticGaussian):
        return OUTPUTS[..., :2], (0.5 * OUTPUTS[..., 2:]).exp()
    return OUTPUTS, torch.full_like(OUTPUTS, likelihood.scale.item())


GAUSSIANS = [bf.Gaussian(0.5), bf.Gaussian(0.1, learned=True), bf.HeteroscedasticGaussian()]


@pytest.mark.parametrize("likelihood", GAUSSIANS, ids=["fixed", "learned", "heteroscedastic"])
def test_epistemic_and_aleatoric(likelihood):
    found = of_outputs(OUTPUTS, likelihood)
    mean, scale = mixture(likelihood)
    assert type(found) is bf.GaussianPrediction
    torch.testing.assert_close(found.samples, mean)
    torch.testing.assert_close(found.mean, mean.mean(0))
    torch.testing.assert_close(found.epistemic, mean.var(0))
    torch.testing.assert_close(found.aleatoric, scale.square().mean(0))
    torch.testing.assert_close(found.std.square(), found.epistemic + found.aleatoric)


@pytest.mark.parametrize("level", [1e-7, 0.05, 0.5, 0.83, 0.999])
@pytest.mark.parametrize("likelihood", GAUSSIANS, ids=["fixed", "learned", "heteroscedastic"])
def test_predictive_quantiles_are_those_of_the_mixture(likelihood, level, monkeypatch):
    monkeypatch.setattr(prediction_module, "_BLOCK", 100)
    found = of_outputs(OUTPUTS, likelihood)
    mean, scale = (t.detach().numpy() for t in mixture(likelihood))
    quantile = found.quantile(level)
    for at in np.ndindex(quantile.shape):
        one = scipy.stats.norm(mean[(slice(None), *at)], scale[(slice(None), *at)])
        exact = scipy.optimize.brentq(lambda t: one.cdf(t).mean() - level, -300, 300, xtol=1e-12)
        assert quantile[at].item() == pytest.approx(exact, abs=1e-7)
    torch.testing.assert_close(found.cdf(quantile), torch.full_like(quantile, level), rtol=1e-6, atol=0)


def test_predictive_interval_covers_new_targets():
    torch.manual_seed(0)
    found = of_outputs(OUTPUTS, bf.Gaussian(0.5))
    targets = found.samples[torch.randint(9, (40000,))] + 0.5 * torch.randn(40000, 5, 4)
    low, high = found.interval(0.9)
    inside = ((targets >= low) & (targets <= high)).double().mean(0)
    assert (inside - 0.9).abs().max() < 0.008
    narrow, _ = of_outputs(OUTPUTS, None).interval(0.9)
    assert (low < narrow).all()


def test_quantiles_where_the_parts_are_far_apart_or_without_noise():
    far = torch.tensor([[[-1e4]], [[0.0]], [[1e4]]], dtype=torch.float64)
    found = of_outputs(far, bf.Gaussian(1e-3))
    assert found.quantile([0.1, 0.5, 0.9]).flatten().tolist() == pytest.approx([-1e4, 0.0, 1e4], abs=0.01)
    silent = torch.tensor([[[1.0, -1e4]], [[3.0, -1e4]]])
    found = of_outputs(silent, bf.HeteroscedasticGaussian())
    assert found.quantile([0.2, 0.8]).flatten().tolist() == pytest.approx([1.0, 3.0])
    assert found.cdf(torch.tensor([[1.0]])).item() == pytest.approx(0.25)
    assert found.aleatoric.item() == 0.0 and found.std.item() == pytest.approx(math.sqrt(2))


def test_quantiles_where_newton_alone_does_not_arrive():
    """Parts of different widths: steps that stay inside the bracket may go to and fro."""
    generator = torch.Generator().manual_seed(0)
    mean = 10.0 * torch.randn(15, 2000, 1, generator=generator, dtype=torch.float64)
    log_variance = 4.0 * torch.randn(15, 2000, 1, generator=generator, dtype=torch.float64)
    found = of_outputs(torch.cat([mean, log_variance], -1), bf.HeteroscedasticGaussian())
    for level in (1e-9, 0.01, 0.3, 0.9):
        quantile = found.quantile(level)
        torch.testing.assert_close(found.cdf(quantile), torch.full_like(quantile, level), rtol=1e-5, atol=0)


def test_log_prob_is_that_of_the_mixture():
    y = torch.randn(5, 4, dtype=torch.float64)
    by_draw = scipy.stats.norm(OUTPUTS.numpy(), 0.5).logpdf(y.numpy()).sum(-1)
    expected = scipy.special.logsumexp(by_draw, axis=0) - math.log(9)
    np.testing.assert_allclose(of_outputs(OUTPUTS, bf.Gaussian(0.5)).log_prob(y), expected, rtol=1e-6)


def test_a_likelihood_that_goes_on_learning_does_not_change_a_prediction():
    likelihood = bf.Gaussian(0.5, learned=True)
    found = of_outputs(OUTPUTS, likelihood)
    before = found.quantile(0.9)
    with torch.no_grad():
        likelihood.log_scale += 1.0
    assert torch.equal(found.quantile(0.9), before)


@pytest.mark.parametrize("log_probs", [False, True])
def test_classes(log_probs):
    outputs = OUTPUTS.log_softmax(-1) if log_probs else OUTPUTS
    found = of_outputs(outputs, bf.Categorical(log_probs))
    probs = OUTPUTS.softmax(-1)
    mean = probs.mean(0)

    def entropy(p):
        return -(p * p.log()).sum(-1)

    assert type(found) is bf.ClassPrediction
    torch.testing.assert_close(found.probs, mean)
    torch.testing.assert_close(found.samples, probs)
    torch.testing.assert_close(found.std, probs.std(0))
    torch.testing.assert_close(found.entropy, entropy(mean))
    torch.testing.assert_close(found.mutual_information, entropy(mean) - entropy(probs).mean(0))
    torch.testing.assert_close(found.quantile(0.3), probs.quantile(0.3, dim=0))
    targets = torch.tensor([0, 1, 2, 3, 0])
    right, sure = mean.argmax(-1) == targets, mean.max(-1).values.argsort(descending=True)
    assert found.selective_accuracy(targets, 0.6) == right[sure[:3]].double().mean()


def test_yes_or_no():
    found = of_outputs(OUTPUTS, bf.Bernoulli())
    probs = OUTPUTS.sigmoid()
    both = torch.stack([probs, 1 - probs], -1)
    torch.testing.assert_close(found.probs, probs.mean(0))
    entropy = torch.special.entr(both.mean(0)).sum(-1)
    torch.testing.assert_close(found.entropy, entropy)
    torch.testing.assert_close(found.mutual_information,
                               entropy - torch.special.entr(both).sum(-1).mean(0))


def test_draws_that_agree_have_no_mutual_information():
    agreed = OUTPUTS[:1].expand(9, 5, 4).float()
    found = of_outputs(agreed, bf.Categorical())
    assert found.mutual_information.abs().max() < 1e-12 and found.entropy.min() > 0.01
    sure = of_outputs(1000 * agreed, bf.Categorical())
    assert sure.entropy.isfinite().all() and sure.mutual_information.eq(0).all()
