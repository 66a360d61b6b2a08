"""Likelihoods: the negative log-likelihood of targets under a model's outputs, for each draw and row.

Any callable of (outputs [S, B, ...], targets [B, ...]) that gives [S, B] may stand in for one in `ELBO`. The third argument of
those here, weights [B, ...] of the targets' elements, multiplies the NLL of each before a row's are added up: 0 leaves it out.
"""
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

    _made = None    # what `fixed` gave, and of what

    def __init__(self, scale: float = 1.0, learned: bool = False):
        super().__init__()
        if not checks.is_number(scale) or not 0.0 < scale < math.inf:
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

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _check_tensors(outputs, targets)
        outputs = shown(_checked(outputs, targets, targets.shape), _hidden(weights, targets.shape))
        half = _half(self.log_scale).clamp(max=math.log(torch.finfo(outputs.dtype).max) - 1.0)
        return _rows(_gaussian_nll(targets - outputs, self.log_scale, half), weights)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}  # a copy's versions begin anew

    def fixed(self) -> tuple[float, Tensor] | None:
        """(1 / (2 scale^2), log scale + log(2 pi) / 2) of a fixed scale, made once for all calls; None where its tensor has to be
        looked at.
        """
        scale = self.log_scale
        if (torch.compiler.is_compiling() or type(scale) is not Tensor or not scale.is_cpu or scale.is_inference()
                or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None):
            return None
        made = self._made
        if made is None or made[0] is not scale or made[1] != scale._version:
            square = _half(scale).exp().double().item() ** 4
            made = self._made = (scale, scale._version, (square, _offset(scale)))
        return made[2]

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.6g}, learned={self.learned}"


class HeteroscedasticGaussian(nn.Module):
    """y = f(x) + noise, its variance given by the model too, which puts out [..., 2 D]: D means, then D
    log-variances.

    `likelihood(outputs [S, B, ..., 2 D], targets [B, ..., D]) -> NLL [S, B]`.
    """

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _check_tensors(outputs, targets)
        expected = (*targets.shape[:-1], 2 * targets.shape[-1]) if targets.dim() > 1 else None
        outputs = _checked(outputs, targets, expected)
        hidden = _hidden(weights, targets.shape)
        mean, log_variance = (shown(part, hidden) for part in outputs.chunk(2, dim=-1))
        error, log_scale = targets - mean, 0.5 * log_variance
        # where there is no error its factor does not matter, and must not be infinite
        half = torch.where(error == 0.0, 0.0, _half(log_scale))
        return _rows(_gaussian_nll(error, log_scale, half), weights)


class Bernoulli(nn.Module):
    """Independent yes/no targets, 0 or 1 (or between); the model puts out logits.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`.
    """

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _check_tensors(outputs, targets)
        outputs = shown(_checked(outputs, targets, targets.shape), _hidden(weights, targets.shape))
        # -log p = softplus(f) - y f, where softplus is stable
        return _rows(F.softplus(outputs) - targets.to(outputs.dtype) * outputs, weights)


class Categorical(nn.Module):
    """One of C classes; the model puts out C logits, or log-probabilities if log_probs.

    Args:
        log_probs: whether the outputs are log-probabilities.
        class_dim: the dimension of the model's outputs [B, ...] that has the classes: -1, the last one, or as in
            nn.CrossEntropyLoss 1, for [B, C, H, W] and targets [B, H, W]. Not 0, which is the batch.
        ignore_index: targets of this value add nothing to their row's NLL (padding; the row counts among the B all the same).

    `likelihood(outputs [S, B, ..., C, ...], targets [B, ...] integers from 0 to C - 1) -> NLL [S, B]`. On a GPU the
    values of the targets are not looked at. Targets in floating point, of the shape of a draw's outputs, are soft labels: the
    probability of each class, whose cross-entropy is the NLL.
    """

    def __init__(self, log_probs: bool = False, class_dim: int = -1, ignore_index: int | None = None):
        super().__init__()
        self.log_probs = log_probs
        self.ignore_index = None if ignore_index is None else checks.integer("ignore_index", ignore_index)
        self.class_dim = checks.integer("class_dim", class_dim)
        if self.class_dim == 0:
            raise ValueError("class_dim: expected a dimension of the outputs behind the batch, which is 0, given 0")

    def classes_last(self, outputs: Tensor) -> Tensor:
        """outputs [S, B, ..., C, ...] as [S, B, ..., C]."""
        if self.class_dim == -1:
            return outputs
        dim = self.class_dim + (1 if self.class_dim > 0 else outputs.dim())  # behind the draws, too
        if not 2 <= dim < outputs.dim():
            raise ValueError(f"class_dim: expected a dimension of the outputs {list(outputs.shape[1:])} behind the "
                             f"batch, given {self.class_dim}")
        return outputs.movedim(dim, -1)

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _check_tensors(outputs, targets)
        if outputs.dim() < 3:
            raise ValueError(f"outputs: expected [S, B, ..., C], given {checks.describe(outputs)}")
        soft = targets.is_floating_point() and targets.shape == outputs.shape[1:]
        if not soft and (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool):
            raise TypeError(f"targets: expected integer classes, or probabilities {list(outputs.shape[1:])}, "
                            f"given {checks.describe(targets)}")
        outputs = self.classes_last(outputs)
        hint = "" if self.class_dim != -1 or outputs.dim() < 4 else "; classes in another dimension need class_dim"
        targets = self.classes_last(targets.unsqueeze(0)).squeeze(0) if soft else targets
        outputs = _checked(outputs, targets, targets.shape if soft else (*targets.shape, outputs.shape[-1]), hint)
        ignored = None if soft or self.ignore_index is None else targets == self.ignore_index
        outputs = shown(shown(outputs, _hidden(weights, outputs.shape[1:-1])), ignored)
        log_probs = outputs if self.log_probs else outputs.log_softmax(-1)
        if soft:
            return _rows(-torch.where(targets == 0.0, 0.0, targets * log_probs).sum(-1), weights)
        targets = targets if ignored is None else targets.masked_fill(ignored, 0)
        index = targets.long().expand(outputs.shape[:-1]).unsqueeze(-1)
        try:
            chosen = log_probs.gather(-1, index).squeeze(-1)
        except RuntimeError:
            _check_labels(targets, outputs.shape[-1])
            raise
        return _rows(-chosen if ignored is None else -chosen.masked_fill(ignored, 0.0), weights)

    def extra_repr(self) -> str:
        return (f"log_probs={self.log_probs}" + (f", class_dim={self.class_dim}" if self.class_dim != -1 else "")
                + (f", ignore_index={self.ignore_index}" if self.ignore_index is not None else ""))


def _check_tensors(outputs, targets) -> None:
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, given {checks.describe(value)}")


def _checked(outputs: Tensor, targets: Tensor, expected, hint: str = "") -> Tensor:
    """outputs, in float32 at least, if they have the expected shape behind the dimension of the draws."""
    if expected is None or tuple(outputs.shape[1:]) != tuple(expected):
        wanted = f"{list(expected)} for each draw" if expected else "at least two dimensions in the targets"
        raise ValueError(f"outputs: expected {wanted}, given outputs {list(outputs.shape[1:])} for each draw "
                         f"and targets {list(targets.shape)}; they are not broadcast{hint}")
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def _check_labels(targets: Tensor, classes: int) -> None:
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"targets: expected classes 0 to {classes - 1}, given {low} to {high}")


def _half(log_scale: Tensor) -> Tensor:
    """Half the logarithm of 1 / (sqrt(2) scale)."""
    return torch.rsub(log_scale, -0.25 * math.log(2.0), alpha=0.5)


def _gaussian_nll(error: Tensor, log_scale: Tensor, half: Tensor) -> Tensor:
    """(error / (sqrt(2) scale))^2 + log scale + log(2 pi) / 2. 1 / scale may overflow where error / scale does not, and
    0 times infinity is no number: it is multiplied in two halves, e^half each.
    """
    root = half.exp()
    z = error * root * root
    return torch.addcmul(_offset(log_scale), z, z)


def _offset(log_scale: Tensor) -> Tensor:
    return log_scale + 0.5 * math.log(2.0 * math.pi)


def _hidden(weights: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Which of the targets of this shape have no weight."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != shape:
        raise ValueError(f"weights: expected a tensor {list(shape)}, one for each target, given {checks.describe(weights)}")
    return weights == 0.0


def shown(outputs: Tensor, hidden: Tensor | None) -> Tensor:
    """outputs [S, B, ...], 0 where they are hidden [B, ...]: their gradient is 0 then, also if they are nan, which 0 times them is too."""
    if hidden is None:
        return outputs
    hidden = hidden.reshape(*hidden.shape, *(1,) * (outputs.dim() - 1 - hidden.dim()))
    return torch.where(hidden, torch.zeros((), dtype=outputs.dtype, device=outputs.device), outputs)


def _rows(nll: Tensor, weights: Tensor | None) -> Tensor:
    """[S, B, ...], each times its weight [B, ...], summed to [S, B]."""
    if weights is not None:
        nll = torch.where(weights == 0.0, 0.0, nll * weights.to(nll.dtype))
    return nll.sum(tuple(range(2, nll.dim()))) if nll.dim() > 2 else nll
