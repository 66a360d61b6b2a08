"""Metrics against scikit-learn, torchmetrics where it is installed, and their definitions."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributions

import bnn_fast as bf
from bnn_fast import metrics


@pytest.fixture
def classes():
    """(probs [200, 4], targets [200]), right more often than not."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1)
    return probs, torch.multinomial((0.7 * logits).softmax(-1), 1, generator=generator).squeeze(1)


@pytest.fixture
def regression():
    """(mean, std, targets) [50, 2]."""
    generator = torch.Generator().manual_seed(0)
    mean, targets = torch.randn(2, 50, 2, generator=generator, dtype=torch.float64)
    return mean, torch.rand(50, 2, generator=generator, dtype=torch.float64) + 0.2, targets


def test_against_scikit_learn(classes, regression):
    sk = pytest.importorskip("sklearn.metrics")
    probs, targets = classes
    assert metrics.nll(probs, targets).item() == pytest.approx(sk.log_loss(targets, probs))
    binary, first = probs[:, 0], targets == 0
    assert metrics.nll(binary, first).item() == pytest.approx(sk.log_loss(first, binary))
    assert metrics.brier_score(binary, first).item() == pytest.approx(sk.brier_score_loss(first, binary))
    by_class = [sk.brier_score_loss(targets == c, probs[:, c]) for c in range(4)]
    assert metrics.brier_score(probs, targets).item() == pytest.approx(sum(by_class))
    assert metrics.selective_accuracy(probs, targets).item() == pytest.approx(
        sk.accuracy_score(targets, probs.argmax(-1)))
    mean, _, y = regression
    assert metrics.rmse(mean, y).item() == pytest.approx(sk.mean_squared_error(y, mean) ** 0.5)


@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_bins_against_scikit_learn(classes, bins):
    calibration = pytest.importorskip("sklearn.calibration")
    probs, targets = classes
    hits = probs.argmax(-1) == targets
    accuracy, confidence = calibration.calibration_curve(hits, probs.max(-1).values, n_bins=bins)
    found = metrics.reliability_bins(probs, targets, bins)
    used = found[2] > 0
    np.testing.assert_allclose(found[0][used], confidence)
    np.testing.assert_allclose(found[1][used], accuracy)


def test_against_torchmetrics(classes, regression):
    functional = pytest.importorskip("torchmetrics.functional")
    probs, targets = classes
    for bins in (10, 15):
        in_float32 = functional.calibration_error(probs, targets, "multiclass", n_bins=bins, num_classes=4)
        torch.testing.assert_close(metrics.expected_calibration_error(probs, targets, bins), in_float32.double(),
                                   rtol=1e-5, atol=1e-6)
    mean, _, y = regression
    theirs = functional.mean_squared_error(mean.flatten(), y.flatten(), squared=False)
    torch.testing.assert_close(metrics.rmse(mean, y), theirs.double(), rtol=1e-5, atol=1e-6)


def test_reliability_bins_and_calibration_error():
    first = torch.tensor([0.92, 0.98, 0.3, 0.55, 0.0], dtype=torch.float64)
    probs, targets = torch.stack([first, 1 - first], dim=1), torch.tensor([0, 1, 1, 0, 1])
    confidence, accuracy, share = metrics.reliability_bins(probs, targets, bins=10)
    used = [5, 7, 9]
    torch.testing.assert_close(share[used], torch.tensor([0.2, 0.2, 0.6]).double())
    torch.testing.assert_close(accuracy[used], torch.tensor([1.0, 1.0, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(confidence[used], torch.tensor([0.55, 0.7, 2.9 / 3], dtype=torch.float64))
    empty = [0, 1, 2, 3, 4, 6, 8]
    assert share[empty].eq(0).all() and accuracy[empty].isnan().all() and confidence[empty].isnan().all()
    assert metrics.expected_calibration_error(probs, targets, 10).item() == pytest.approx(
        0.2 * 0.45 + 0.2 * 0.3 + 0.6 * 0.3)
    as_one_number = metrics.reliability_bins(first, 1 - targets, bins=10)
    torch.testing.assert_close(as_one_number[1], accuracy, equal_nan=True)


def test_selective_accuracy():
    probs = torch.tensor([0.9, 0.2, 0.55, 0.7, 0.55])   # confidences 0.9, 0.8, 0.55, 0.7, 0.55
    targets = torch.tensor([1, 0, 1, 0, 0])             # right: yes, yes, yes, no, no
    found = [metrics.selective_accuracy(probs, targets, c).item() for c in (0.2, 0.4, 0.6, 0.61, 0.8, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 2 / 3, 3 / 4, 3 / 4, 3 / 5])
    many = torch.linspace(0.9, 0.6, 100)
    labels = torch.cat([torch.ones(7), torch.zeros(93)]).long()
    assert metrics.selective_accuracy(many, labels, 0.07) == 1.0


def test_sure_and_wrong_is_infinitely_bad():
    assert metrics.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf
    assert metrics.nll(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])) == 0.0


def test_nll_sums_over_the_outputs_of_a_row(classes):
    probs, targets = classes
    torch.testing.assert_close(metrics.nll(probs.reshape(100, 2, 4), targets.reshape(100, 2)),
                               2 * metrics.nll(probs, targets))


def test_intervals(regression):
    mean, std, y = regression
    low, high = mean - std, mean + 2 * std
    inside = ((y >= low) & (y <= high)).double().mean()
    torch.testing.assert_close(metrics.interval_coverage(low, high, y), inside)
    assert metrics.interval_coverage(y, y, y) == 1.0
    torch.testing.assert_close(metrics.sharpness(low, high), 3 * std.mean())


def crps_by_integration(cdf, y: float) -> float:
    """integral (F(t) - [t >= y])^2 dt, the definition."""
    t = np.linspace(-12.0, 12.0, 480001)
    return float(np.sum((cdf(torch.from_numpy(t)).numpy() - (t >= y)) ** 2) * (t[1] - t[0]))


def test_crps_is_the_integral_that_defines_it():
    for mean, std, y in ((0.3, 0.7, 1.1), (-1.0, 1.5, -1.0), (0.0, 0.2, -2.0)):
        arguments = [torch.tensor([v], dtype=torch.float64) for v in (mean, std, y)]
        expected = crps_by_integration(distributions.Normal(mean, std).cdf, y)
        assert metrics.crps_gaussian(*arguments).item() == pytest.approx(expected, abs=1e-4)
    draws = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.5], dtype=torch.float64)
    for y in (0.0, 3.0, 0.5):
        expected = crps_by_integration(lambda t: (draws[:, None] <= t).double().mean(0), y)
        found = metrics.crps_samples(draws[:, None], torch.tensor([y], dtype=torch.float64))
        assert found.item() == pytest.approx(expected, abs=1e-4)


def test_crps_of_many_draws_is_that_of_their_distribution(regression):
    mean, std, y = regression
    torch.manual_seed(0)
    draws = mean + std * torch.randn(20000, 50, 2, dtype=torch.float64)
    torch.testing.assert_close(metrics.crps_samples(draws, y), metrics.crps_gaussian(mean, std, y), rtol=5e-3,
                               atol=0)
    torch.testing.assert_close(metrics.crps_samples(mean[None], y), (mean - y).abs().mean())
    torch.testing.assert_close(metrics.crps_gaussian(mean, torch.zeros_like(std), y), (mean - y).abs().mean())


P, T = torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 0])


@pytest.mark.parametrize("call, error, message", [
    (lambda: metrics.nll(P.log(), T), ValueError, r"probs: expected probabilities.*logits\?"),
    (lambda: metrics.nll(2 * P, T), ValueError, "probs: expected probabilities"),
    (lambda: metrics.brier_score(torch.tensor([1.5, 0.2]), T), ValueError, "probs: expected probabilities"),
    (lambda: metrics.nll(P, T + 1), ValueError, "targets: expected classes 0 to 1, given 1 to 2"),
    (lambda: metrics.nll(P[:, 0], torch.tensor([-1, 1])), ValueError, "targets: expected classes 0 to 1"),
    (lambda: metrics.nll(P, T.float()), TypeError, "targets: expected integer classes"),
    (lambda: metrics.nll(P, T[:, None]), ValueError, r"probs: expected .* for targets \[2, 1\]"),
    (lambda: metrics.brier_score([0.1], T), TypeError, "probs: expected a ClassPrediction or"),
    (lambda: metrics.expected_calibration_error(P, T, 0), ValueError, "bins: expected at least 1"),
    (lambda: metrics.selective_accuracy(P, T, 0.0), ValueError, "coverage: expected a share above 0"),
    (lambda: metrics.rmse(P, T), ValueError, "mean: expected tensors of one shape.*not broadcast"),
    (lambda: metrics.crps_gaussian(P, P[0], P), ValueError, "std: expected tensors of one shape"),
    (lambda: metrics.crps_samples(P, P), ValueError, r"samples: expected a tensor \['S', 2, 2\]"),
    (lambda: metrics.interval_coverage(P[0], P, P), ValueError, "low: expected tensors of one shape"),
    (lambda: metrics.sharpness(P, P[0]), ValueError, "high: expected tensors of one shape"),
])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_metrics_take_predictions():
    torch.manual_seed(0)
    layer, x = bf.VariationalLinear(3, 2), torch.randn(20, 3)
    classes, ones = torch.randint(2, (20,)), torch.randint(2, (20, 2))
    for likelihood, targets in ((bf.Categorical(), classes), (bf.Bernoulli(), ones)):
        prediction = bf.predict(layer, x, likelihood, 5)
        for metric in (metrics.nll, metrics.brier_score, metrics.expected_calibration_error,
                       metrics.selective_accuracy):
            assert metric(prediction, targets) == metric(prediction.probs, targets)
    prediction = bf.predict(layer, x, bf.Gaussian(0.5), 5)
    y = torch.randn(20, 2)
    assert metrics.rmse(prediction, y) == metrics.rmse(prediction.mean, y)
    by_draw = distributions.Normal(prediction.samples, 0.5).log_prob(y).sum(-1)
    torch.testing.assert_close(metrics.nll(prediction, y), -(by_draw.logsumexp(0) - math.log(5)).mean())
