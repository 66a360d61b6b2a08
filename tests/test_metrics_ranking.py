"""Metrics of scores and of rejecting, adaptive calibration, temperature: against scikit-learn, torchmetrics and definitions."""
from __future__ import annotations

import math

import pytest
import torch

from bnn_fast import metrics


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(500, generator=generator) < 0.3
    scores = torch.randn(500, generator=generator, dtype=torch.float64) + targets
    return (5 * scores).round() / 5, targets  # with ties


@pytest.fixture
def classes():
    """(probs [600, 4] that are too sure, targets)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 4, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return (3.0 * logits).softmax(-1), targets


def test_auroc_is_that_of_scikit_learn(scored):
    sk = pytest.importorskip("sklearn.metrics")
    scores, targets = scored
    assert metrics.auroc(scores, targets).item() == pytest.approx(sk.roc_auc_score(targets, scores))
    assert metrics.auroc(scores, targets.long()).item() == metrics.auroc(scores, targets).item()
    assert metrics.auroc(torch.zeros(6), torch.arange(6) % 2).item() == 0.5
    assert metrics.auroc(torch.arange(4.0), torch.tensor([0, 0, 1, 1])).item() == 1.0


def test_fpr95_by_scikit_learns_curve(scored):
    sk = pytest.importorskip("sklearn.metrics")
    scores, targets = scored
    fpr, tpr, _ = sk.roc_curve(targets, scores, drop_intermediate=False)
    assert metrics.fpr95(scores, targets).item() == pytest.approx(fpr[(tpr >= 0.95 - 1e-12).argmax()])
    assert metrics.fpr95(torch.arange(4.0), torch.tensor([0, 0, 1, 1])).item() == 0.0


def test_one_kind_alone_has_no_auroc():
    assert metrics.auroc(torch.rand(3), torch.ones(3)).isnan() and metrics.fpr95(torch.rand(3), torch.zeros(3)).isnan()


def test_risk_and_coverage(classes):
    probs, targets = classes
    coverage, risk = metrics.risk_coverage_curve(probs, targets)
    assert coverage[-1] == 1.0 and risk[-1].item() == pytest.approx((probs.argmax(-1) != targets).double().mean().item())
    for share in (0.1, 0.37, 0.8):
        at = math.ceil(share * 600 - 1e-9) - 1
        assert 1.0 - risk[at].item() == pytest.approx(metrics.selective_accuracy(probs, targets, share).item())
    area = metrics.area_under_risk_coverage(probs, targets).item()
    assert area == pytest.approx(risk.mean().item()) and area < risk[-1].item()
    perfect = metrics.area_under_risk_coverage(torch.eye(3), torch.arange(3))
    assert perfect.item() == 0.0


def test_adaptive_calibration_error(classes):
    probs, targets = classes
    confidence, guess = probs.max(-1)
    order = confidence.argsort(stable=True)
    expected = sum(abs(confidence[part].mean() - (guess == targets)[part].double().mean()) / 10 for part in order.chunk(10))
    assert metrics.adaptive_calibration_error(probs, targets, 10).item() == pytest.approx(expected.item())
    assert metrics.adaptive_calibration_error(probs[:4], targets[:4], 10) >= 0.0  # fewer rows than bins
    same = torch.full((8, 2), 0.5)
    assert metrics.adaptive_calibration_error(same, torch.tensor([0, 1] * 4), 2).item() == pytest.approx(0.0, abs=1e-6)


def test_temperature(classes):
    probs, targets = classes
    t = metrics.temperature(probs, targets)
    assert t.item() == pytest.approx(3.0, rel=0.25)
    cooled = metrics.tempered(probs, t)
    assert metrics.nll(cooled, targets) < metrics.nll(probs, targets)
    for other in (0.9, 1.1):
        assert metrics.nll(cooled, targets) <= metrics.nll(metrics.tempered(probs, other * t), targets)
    torch.testing.assert_close(metrics.tempered(probs, 1.0), probs)
    logits = probs.log()
    torch.testing.assert_close(metrics.tempered(probs, 2.0), (logits / 2.0).softmax(-1))
    assert metrics.expected_calibration_error(cooled, targets) < metrics.expected_calibration_error(probs, targets)


def test_temperature_of_a_probability():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, generator=generator, dtype=torch.float64)
    targets = (torch.rand(4000, generator=generator, dtype=torch.float64) < logits.sigmoid()).long()
    sure = (2.0 * logits).sigmoid()
    t = metrics.temperature(sure, targets)
    assert t.item() == pytest.approx(2.0, rel=0.1)
    torch.testing.assert_close(metrics.tempered(sure, 2.0, binary=True), logits.sigmoid())


def test_temperature_where_a_class_has_no_probability():
    probs, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    t = metrics.temperature(probs, targets)
    assert t.isfinite() and metrics.nll(metrics.tempered(probs, t), targets).isfinite()
    assert not metrics.tempered(probs, 0.5).isnan().any()


def test_bad_input():
    scores = torch.rand(4)
    for call, message in ((lambda: metrics.auroc(scores, torch.zeros(3)), "targets: expected"),
                          (lambda: metrics.auroc([1.0], torch.zeros(1)), "scores: expected"),
                          (lambda: metrics.fpr95(scores, torch.tensor([0, 1, 2, 0])), "targets: expected 0 and 1"),
                          (lambda: metrics.auroc(scores / 0.0 - scores / 0.0, torch.zeros(4)), "scores: expected numbers"),
                          (lambda: metrics.tempered(torch.rand(3, 2).softmax(-1), 0.0), "temperature: expected"),
                          (lambda: metrics.tempered(torch.arange(3), 1.0), "probs: expected"),
                          (lambda: metrics.adaptive_calibration_error(torch.full((2, 2), 0.5), torch.zeros(2).long(), 0), "bins: expected"),
                          (lambda: metrics.temperature(torch.rand(3, 2) + 2.0, torch.zeros(3).long()), "probs: expected")):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
