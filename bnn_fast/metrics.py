"""How good predictions are: errors, calibration, sharpness.

Targets are [N, ...] and every metric is a 0-d tensor. Where a function takes probs it also takes a
`ClassPrediction`, where it takes a mean a `Prediction`. Class probabilities are [N, ..., C] for integer
targets [N, ...] (classes last, as `ClassPrediction.probs` has them), or, for two classes, [N, ...], the probability
of 1, for targets 0 or 1 of that shape. ValueError or TypeError if shapes do not match (nothing is broadcast), or if probs are none.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks

__all__ = ["nll", "rmse", "brier_score", "expected_calibration_error", "reliability_bins",
           "selective_accuracy", "interval_coverage", "sharpness", "crps_gaussian", "crps_samples"]


def nll(prediction, targets: Tensor) -> Tensor:
    """-log p(targets) in nats, summed over the outputs of a row, mean over the rows.

    prediction: class probabilities, where a class of probability 0 gives inf; or a `GaussianPrediction`: the
    density of its mixture of draws, joint over the outputs of a row.
    """
    if hasattr(prediction, "log_prob"):
        return -prediction.log_prob(targets).mean()
    probs, binary = _probs(prediction, targets)
    if binary:
        y = targets.to(probs.dtype)
        log_p = torch.xlogy(y, probs) + torch.xlogy(1.0 - y, 1.0 - probs)
    else:
        log_p = probs.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1).log()
    return -log_p.reshape(len(targets), -1).sum(1).mean()


def rmse(mean, targets: Tensor) -> Tensor:
    """sqrt(mean (mean - targets)^2) over all rows and outputs; mean and targets [N, ...]."""
    mean = _same("mean", mean if isinstance(mean, Tensor) else getattr(mean, "mean", mean), targets)
    return (mean - targets).square().mean().sqrt()


def brier_score(probs, targets: Tensor) -> Tensor:
    """Mean of sum_c (p_c - [target = c])^2, from 0 to 2; where probs are those of 1 against 0, of
    (p - target)^2, from 0 to 1 (Brier, "Verification of forecasts expressed in terms of probability", 1950).
    """
    probs, binary = _probs(probs, targets)
    if binary:
        return (probs - targets.to(probs.dtype)).square().mean()
    one_hot = torch.nn.functional.one_hot(targets.long(), probs.shape[-1])
    return (probs - one_hot).square().sum(-1).mean()


def expected_calibration_error(probs, targets: Tensor, bins: int = 15) -> Tensor:
    """sum over bins of (share of the rows) |accuracy - mean confidence|: see `reliability_bins`."""
    confidence, accuracy, share = reliability_bins(probs, targets, bins)
    return (share * (accuracy - confidence).abs()).nansum()


def reliability_bins(probs, targets: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """(confidence, accuracy, share of the rows) [bins] in equally wide bins [i / bins, (i + 1) / bins) of the
    confidence, the largest probability of a row; the last holds 1 too.

    An empty bin has share 0 and confidence and accuracy nan (Guo et al., "On calibration of modern neural
    networks", 2017).
    """
    checks.positive_int("bins", bins)
    confidence, hits = _guesses(probs, targets)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    zeros = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    count, confidences, accuracies = (zeros.index_add(0, bin_of, value)
                                      for value in (torch.ones_like(hits), confidence, hits))
    return confidences / count, accuracies / count, count / max(len(hits), 1)


def selective_accuracy(probs, targets: Tensor, coverage: float = 1.0) -> Tensor:
    """Accuracy on the ceil(coverage N) rows of the largest confidence, 0 < coverage <= 1: what is right where
    the model answers only when it is sure (El-Yaniv and Wiener, "On the foundations of noise-free selective
    classification", 2010). Of rows equally sure the earlier ones come first.
    """
    if not checks.is_number(coverage) or not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage: expected a share above 0, up to 1, given {checks.describe(coverage)}")
    confidence, hits = _guesses(probs, targets)
    surest = confidence.argsort(descending=True, stable=True)
    # 1e-9: a coverage of 0.07 of 100 rows is 7, not 8
    return hits[surest[:math.ceil(coverage * len(hits) - 1e-9)]].mean()


def interval_coverage(low: Tensor, high: Tensor, targets: Tensor) -> Tensor:
    """The share of the targets with low <= target <= high; all [N, ...]."""
    low, high = _same("low", low, targets), _same("high", high, targets)
    return ((low <= targets) & (targets <= high)).to(low.dtype).mean()


def sharpness(low: Tensor, high: Tensor) -> Tensor:
    """The mean width of the intervals [low, high], both [N, ...]: of two predictions with the right coverage
    the sharper one says more (Gneiting et al., "Probabilistic forecasts, calibration and sharpness", 2007).
    """
    return (_same("high", high, low) - low).mean()


def crps_gaussian(mean: Tensor, std: Tensor, targets: Tensor) -> Tensor:
    """Continuous ranked probability score of N(mean, std^2), mean over all rows and outputs; all [N, ...].

    With z = (target - mean) / std:  std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt pi)  (Gneiting and Raftery,
    "Strictly proper scoring rules, prediction, and estimation", 2007, section 4.2), in the targets' units.
    """
    mean, std = _same("mean", mean, targets), _same("std", std, targets)
    error = targets - mean
    z = error / std.clamp(min=torch.finfo(std.dtype).tiny)
    density = (-0.5 * z.square()).exp() / math.sqrt(2.0 * math.pi)
    return (error * torch.erf(z * math.sqrt(0.5)) + std * (2.0 * density - 1.0 / math.sqrt(math.pi))).mean()


def crps_samples(samples: Tensor, targets: Tensor) -> Tensor:
    """Continuous ranked probability score of the empirical distribution of S draws, mean over all rows and
    outputs; samples [S, N, ...], targets [N, ...].

    1/S sum_i |x_i - y| - 1/(2 S^2) sum_ij |x_i - x_j|  (Gneiting and Raftery 2007, equation 21), the double
    sum taken over the sorted draws as 2 sum_i (2 i - S - 1) x_(i).
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor [N, ...], given {checks.describe(targets)}")
    if not isinstance(samples, Tensor) or samples.dim() == 0 or samples.shape[1:] != targets.shape:
        raise ValueError(f"samples: expected a tensor {['S', *targets.shape]}, "
                         f"given {checks.describe(samples)}")
    n = len(samples)
    weights = torch.arange(1 - n, n, 2, dtype=samples.dtype, device=samples.device) / n ** 2
    spread = torch.tensordot(weights, samples.sort(0).values, dims=1)
    return ((samples - targets).abs().mean(0) - spread).mean()


def _probs(prediction, targets: Tensor) -> tuple[Tensor, bool]:
    """(probabilities, whether they are those of 1 against 0)."""
    probs = getattr(prediction, "probs", prediction)
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        raise TypeError(f"probs: expected a ClassPrediction or a floating-point tensor, "
                        f"given {checks.describe(probs)}")
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        raise TypeError(f"targets: expected a tensor [N, ...], given {checks.describe(targets)}")
    binary = probs.shape == targets.shape
    if not binary and probs.shape[:-1] != targets.shape:
        raise ValueError(f"probs: expected {[*targets.shape, 'C']} or {list(targets.shape)} for targets "
                         f"{list(targets.shape)}, given {checks.describe(probs)}")
    if not binary and probs.shape[-1] == 1:
        raise ValueError(f"probs: expected at least two classes, or for two the probability of 1 in the targets' shape "
                         f"{list(targets.shape)} (probs.squeeze(-1)), given {checks.describe(probs)}")
    wrong = probs > 1.001 if binary else (probs.sum(-1) - 1.0).abs() > 1e-3
    if (probs < 0.0).any() or wrong.any():
        raise ValueError("probs: expected probabilities, from 0 to 1 and with sum 1, given others (logits?)")
    highest = 1 if binary else probs.shape[-1] - 1
    if not binary and (targets.is_floating_point() or targets.dtype == torch.bool):
        raise TypeError(f"targets: expected integer classes, given {checks.describe(targets)}")
    if targets.numel() and not (0 <= targets.min() and targets.max() <= highest):
        raise ValueError(f"targets: expected classes 0 to {highest}, "
                         f"given {targets.min().item()} to {targets.max().item()}")
    return probs, binary


def _guesses(prediction, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of every single target: the confidence in the likeliest class, and whether that is right, 1 or 0."""
    probs, binary = _probs(prediction, targets)
    if binary:
        probs = torch.stack([1.0 - probs, probs], dim=-1)
    confidence, guess = probs.max(dim=-1)
    return confidence.flatten(), (guess == targets).to(probs.dtype).flatten()


def _same(name: str, value, targets: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not isinstance(targets, Tensor) or value.shape != targets.shape:
        raise ValueError(f"{name}: expected tensors of one shape, given {checks.describe(value)} beside "
                         f"{checks.describe(targets)}; they are not broadcast")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, given {checks.describe(value)}")
    return value
