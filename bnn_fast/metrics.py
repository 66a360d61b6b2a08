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
           "adaptive_calibration_error", "temperature", "tempered", "selective_accuracy", "risk_coverage_curve",
           "area_under_risk_coverage", "auroc", "fpr95", "interval_coverage", "sharpness", "crps_gaussian", "crps_samples"]


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


def adaptive_calibration_error(probs, targets: Tensor, bins: int = 15) -> Tensor:
    """The same as `expected_calibration_error` with bins of equally many rows (to one), in the order of their confidence, of which none is
    empty and none decides alone (Nguyen and O'Connor, "Posterior calibration and exploratory analysis for natural language
    processing models", 2015).
    """
    checks.positive_int("bins", bins)
    confidence, hits = _guesses(probs, targets)
    order = confidence.argsort(stable=True)
    parts = zip(confidence[order].tensor_split(bins), hits[order].tensor_split(bins))
    gaps = [(c.mean() - h.mean()).abs() * len(c) for c, h in parts if len(c)]
    return torch.stack(gaps).sum() / len(hits) if gaps else confidence.new_tensor(math.nan)


def temperature(probs, targets: Tensor) -> Tensor:
    """The temperature, 0-d and positive, at which `tempered` probabilities have the least NLL on held-out targets (Guo et al., "On
    calibration of modern neural networks", 2017): above 1 where the model was too sure. From 1/1000 to 1000, in float64.
    """
    probs, binary = _probs(probs, targets)
    log_p = _log_probs(probs.detach().double(), binary).reshape(-1, 2 if binary else probs.shape[-1])
    index = targets.reshape(-1, 1).long()
    low, high = log_p.new_tensor(-math.log(1000.0)), log_p.new_tensor(math.log(1000.0))

    def slope(log_t: Tensor) -> Tensor:
        scaled = log_p * (-log_t).exp()
        p = scaled.softmax(-1)  # the NLL is convex in 1 / T: its derivative there is mean(E log p - log p[target])
        return ((p * log_p).sum(-1) - log_p.gather(-1, index).squeeze(-1)).mean()

    for _ in range(60):
        middle = 0.5 * (low + high)
        hotter = slope(middle) > 0.0  # less NLL at a smaller 1 / T
        low, high = torch.where(hotter, middle, low), torch.where(hotter, high, middle)
    return (0.5 * (low + high)).exp().to(probs.dtype)


def tempered(probs, temperature: float | Tensor, binary: bool = False) -> Tensor:
    """Class probabilities p^(1 / temperature), normalised: those of logits divided by it. probs: a `ClassPrediction` or a tensor
    [N, ..., C]; or, if binary, [N, ...], the probability of 1.
    """
    checks.flags(binary=binary)
    probs = getattr(probs, "probs", probs)
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        raise TypeError(f"probs: expected a ClassPrediction or a floating-point tensor, given {checks.describe(probs)}")
    value = temperature.item() if isinstance(temperature, Tensor) and temperature.numel() == 1 else temperature
    if not checks.is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"temperature: expected a positive number, given {checks.describe(temperature)}")
    found = (_log_probs(probs.double(), binary) / value).softmax(-1)
    return (found[..., 1] if binary else found).to(probs.dtype)


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


def risk_coverage_curve(probs, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(coverage, risk) [N]: the share of the rows that are answered, the surest first, and the share of those that is wrong (El-Yaniv and
    Wiener 2010). The largest coverage whose risk is at most the wanted one tells below which confidence to reject.
    """
    confidence, hits = _guesses(probs, targets)
    wrong = 1.0 - hits[confidence.argsort(descending=True, stable=True)]
    number = torch.arange(1, len(wrong) + 1, dtype=wrong.dtype, device=wrong.device)
    return number / max(len(wrong), 1), wrong.cumsum(0) / number


def area_under_risk_coverage(probs, targets: Tensor) -> Tensor:
    """The mean risk over all coverages, from 0 to 1, less being better (Geifman et al., "Bias-reduced uncertainty estimation for deep
    neural classifiers", 2019).
    """
    return risk_coverage_curve(probs, targets)[1].mean()


def auroc(scores: Tensor, targets: Tensor) -> Tensor:
    """The probability that a positive has a higher score than a negative, one half where they are equal: the area under the receiver
    operating characteristic (Hanley and McNeil 1982). scores [N] are higher where the row is rather positive, as the entropy
    of a prediction is out of distribution; targets [N] are 0 or 1, or bool. nan unless there are both.
    """
    scores, positive = _scored(scores, targets)
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - 0.5 * (count - 1)).double()[place]  # from 1, those of equal scores averaged
    p, n = positive.sum().double(), (~positive).sum().double()
    return ((ranks[positive].sum() - 0.5 * p * (p + 1.0)) / (p * n)).to(scores.dtype)


def fpr95(scores: Tensor, targets: Tensor) -> Tensor:
    """The share of the negatives that score at least as high as the threshold which 95 % of the positives reach (Liang et al.,
    "Enhancing the reliability of out-of-distribution image detection in neural networks", 2018). Arguments as of `auroc`.
    """
    scores, positive = _scored(scores, targets)
    ordered = scores[positive].sort(descending=True).values
    if not len(ordered):
        return scores.new_tensor(math.nan)
    threshold = ordered[math.ceil(0.95 * len(ordered) - 1e-9) - 1]
    return (scores[~positive] >= threshold).to(scores.dtype).mean()


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
    return (mean_absolute(targets - mean, std) - std / math.sqrt(math.pi)).mean()


def mean_absolute(mean: Tensor, std: Tensor) -> Tensor:
    """E|X| of X ~ N(mean, std^2), elementwise: with z = mean / std, std (z (2 Phi(z) - 1) + 2 phi(z))."""
    z = mean / std.clamp(min=torch.finfo(std.dtype).tiny)
    density = (-0.5 * z.square()).exp() / math.sqrt(2.0 * math.pi)
    return mean * torch.erf(z * math.sqrt(0.5)) + 2.0 * std * density


def crps_samples(samples: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Continuous ranked probability score of the empirical distribution of S draws, mean over all rows and
    outputs, or with reduction="none" each; samples [S, N, ...], targets [N, ...].

    1/S sum_i |x_i - y| - 1/(2 S^2) sum_ij |x_i - x_j|  (Gneiting and Raftery 2007, equation 21), the double
    sum taken over the sorted draws as 2 sum_i (2 i - S - 1) x_(i).
    """
    checks.choice("reduction", reduction, {"mean": 0, "none": 1})
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor [N, ...], given {checks.describe(targets)}")
    if not isinstance(samples, Tensor) or samples.dim() == 0 or samples.shape[1:] != targets.shape:
        raise ValueError(f"samples: expected a tensor {['S', *targets.shape]}, "
                         f"given {checks.describe(samples)}")
    n = len(samples)
    weights = torch.arange(1 - n, n, 2, dtype=samples.dtype, device=samples.device) / n ** 2
    spread = torch.tensordot(weights, samples.sort(0).values, dims=1)
    score = (samples - targets).abs().mean(0) - spread
    return score.mean() if reduction == "mean" else score


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


def _log_probs(probs: Tensor, binary: bool) -> Tensor:
    """[..., C], the logarithms; of a class without any probability that of the smallest number, which is not infinite."""
    both = torch.stack([1.0 - probs, probs], dim=-1) if binary else probs
    return both.clamp(min=torch.finfo(both.dtype).tiny).log()


def _scored(scores, targets) -> tuple[Tensor, Tensor]:
    """(scores [N], which are positive)."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating-point tensor [N], given {checks.describe(scores)}")
    if not isinstance(targets, Tensor) or targets.shape != scores.shape or scores.dim() != 1:
        raise ValueError(f"targets: expected a tensor of 0 and 1 in the shape [N] of scores {list(scores.shape)}, "
                         f"given {checks.describe(targets)}")
    if scores.isnan().any():
        raise ValueError("scores: expected numbers, given nan among them")
    if targets.dtype != torch.bool and not ((targets == 0) | (targets == 1)).all():
        raise ValueError("targets: expected 0 and 1 alone, given others")
    return scores, targets.bool()


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
