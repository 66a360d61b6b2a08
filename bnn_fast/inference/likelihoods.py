"""Likelihoods: the negative log-likelihood of targets under a model's outputs, for each draw and row."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks

__all__ = ["Gaussian", "HeteroscedasticGaussian", "Bernoulli", "Categorical"]


class Gaussian(nn.Module):
    """y = f(x) + noise, noise ~ N(0, scale^2), the same for all outputs.

    Args:
        scale: the noise's standard deviation, positive.
        learned: whether it is a parameter (`log_scale`), starting at `scale`.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`, summed over the outputs of a row.
    """

    def __init__(self, scale: float = 1.0, learned: bool = False):
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0.0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, given {checks.describe(scale)}")
        log_scale = torch.tensor(math.log(scale))
        self.learned = learned
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The noise's standard deviation, 0-d."""
        return self.log_scale.exp()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = _checked(outputs, targets, targets.shape)
        return _rows(_gaussian_nll(outputs, self.log_scale, targets))

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.6g}, learned={self.learned}"


class HeteroscedasticGaussian(nn.Module):
    """y = f(x) + noise, its variance given by the model too, which puts out [..., 2 D]: D means, then D
    log-variances.

    `likelihood(outputs [S, B, ..., 2 D], targets [B, ..., D]) -> NLL [S, B]`.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        expected = (*targets.shape[:-1], 2 * targets.shape[-1]) if targets.dim() > 1 else None
        outputs = _checked(outputs, targets, expected)
        mean, log_variance = outputs.chunk(2, dim=-1)
        return _rows(_gaussian_nll(mean, 0.5 * log_variance, targets))


class Bernoulli(nn.Module):
    """Independent yes/no targets, 0 or 1 (or between); the model puts out logits.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = _checked(outputs, targets, targets.shape)
        # -log p = softplus(f) - y f, where softplus is stable
        return _rows(F.softplus(outputs) - targets.to(outputs.dtype) * outputs)


class Categorical(nn.Module):
    """One of C classes; the model puts out [..., C] logits, or log-probabilities if log_probs.

    `likelihood(outputs [S, B, ..., C], targets [B, ...] integers) -> NLL [S, B]`.
    """

    def __init__(self, log_probs: bool = False):
        super().__init__()
        self.log_probs = log_probs

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(f"targets: expected integer classes, given {checks.describe(targets)}")
        outputs = _checked(outputs, targets, (*targets.shape, outputs.shape[-1]))
        log_probs = outputs if self.log_probs else outputs.log_softmax(-1)
        index = targets.long().expand(outputs.shape[:-1]).unsqueeze(-1)
        return _rows(-log_probs.gather(-1, index).squeeze(-1))

    def extra_repr(self) -> str:
        return f"log_probs={self.log_probs}"


def _checked(outputs: Tensor, targets: Tensor, expected) -> Tensor:
    """outputs, in float32 at least, if they have the expected shape behind the dimension of the draws."""
    if expected is None or tuple(outputs.shape[1:]) != tuple(expected):
        wanted = f"{list(expected)} for each draw" if expected else "at least two dimensions in the targets"
        raise ValueError(f"outputs: expected {wanted}, given outputs {list(outputs.shape[1:])} for each draw "
                         f"and targets {list(targets.shape)}; they are not broadcast")
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def _gaussian_nll(mean: Tensor, log_scale: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((targets - mean) * (-log_scale).exp()).square() + log_scale + 0.5 * math.log(2.0 * math.pi)


def _rows(nll: Tensor) -> Tensor:
    """[S, B, ...] summed to [S, B]."""
    return nll.flatten(2).sum(2) if nll.dim() > 2 else nll
