"""The mean NLL of a pass: the first part of the ELBO."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..layers.chain import is_plain
from .likelihoods import Bernoulli, Categorical, Gaussian, shown
from .structure import sizes, with_rows


def mean_nll(likelihood, outputs, targets, weights: Tensor | None = None) -> Tensor:
    """The mean over draws and rows of likelihood(outputs [S, B, ...], targets), which has to be [S, B].

    weights: [B] for a weighted mean over the rows; or [B, ...], which the likelihood is given. Targets of no weight are not
        looked at: they may be anything, also nan, and so may the outputs for them, whose gradient is 0.
    """
    if weights is None and (found := _by_torch(likelihood, outputs, targets)) is not None:
        return found
    size = sizes(outputs)
    if weights is not None:
        _check_weights(weights, size[-1])
        if isinstance(targets, Tensor) and targets.shape[:weights.dim()] == weights.shape:
            where = weights.reshape(*weights.shape, *(1,) * (targets.dim() - weights.dim()))
            targets = torch.where(where == 0.0, torch.zeros((), dtype=targets.dtype, device=targets.device), targets)
        if weights.dim() == 1:
            outputs = with_rows(lambda t: shown(t, weights == 0.0) if tuple(t.shape[:2]) == size else t, outputs)
    of_elements = weights is not None and weights.dim() > 1
    nll = likelihood(outputs, targets, weights) if of_elements else likelihood(outputs, targets)
    if not isinstance(nll, Tensor) or tuple(nll.shape) != size:
        given = f"outputs {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"outputs {checks.describe(outputs)}"
        raise ValueError(f"likelihood: expected it to give the NLL {list(size)} of each draw and row, for {given}, "
                         f"given {checks.describe(nll)}")
    if weights is None or of_elements:
        return nll.mean()
    weights = weights.to(nll.dtype)
    return torch.where(weights == 0.0, 0.0, nll.mean(0) * weights).sum() / weights.sum().clamp(min=torch.finfo(nll.dtype).tiny)


def _check_weights(weights, rows: int) -> None:
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(f"weights: expected a real tensor [{rows}], or of the targets' shape, given {checks.describe(weights)}")
    if weights.dim() == 0 or weights.shape[0] != rows:
        raise ValueError(f"weights: expected a tensor [{rows}], or of the targets' shape, given {checks.describe(weights)}")
    if weights.is_cpu and not torch.compiler.is_compiling() and not (weights >= 0).all():  # on a GPU it would have to be waited for
        raise ValueError(f"weights: expected no negative ones and no nan, given the least {weights.min().item()}")


def _by_torch(likelihood, outputs, targets) -> Tensor | None:
    """The same by torch's own loss, one operator each way where the likelihoods here have up to ten; None where it is not the same."""
    loss = _LOSSES.get(type(likelihood))
    if loss is None or torch.compiler.is_compiling() or not is_plain(likelihood):
        return None
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.numel() == 0:
        return None
    if outputs.dtype not in (torch.float32, torch.float64):
        return None
    return loss(likelihood, outputs, targets)


def _gaussian(likelihood: Gaussian, outputs: Tensor, targets: Tensor) -> Tensor | None:
    fixed = likelihood.fixed()
    if fixed is None or outputs.shape[1:] != targets.shape or outputs.dtype != targets.dtype:
        return None
    (square, offset), of_row = fixed, targets.shape[1:].numel()
    if not 0.25 < square < 1e30:  # the bare square of an error overflows before its NLL, or that is no number
        return None
    mean = torch._C._nn.mse_loss(outputs, targets.expand_as(outputs), _MEAN)  # F's looks at the shapes once more
    return torch.add(offset if of_row == 1 else offset * of_row, mean, alpha=square * of_row)


def _bernoulli(likelihood: Bernoulli, outputs: Tensor, targets: Tensor) -> Tensor | None:
    if outputs.shape[1:] != targets.shape:
        return None
    of_row = targets.shape[1:].numel()
    mean = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype).expand_as(outputs))
    return mean if of_row == 1 else mean * of_row


def _categorical(likelihood: Categorical, outputs: Tensor, targets: Tensor) -> Tensor | None:
    if (outputs.shape[1:-1] != targets.shape or targets.dtype != torch.int64 or likelihood.class_dim != -1
            or likelihood.ignore_index is not None):
        return None
    loss = F.nll_loss if likelihood.log_probs else F.cross_entropy
    labels = targets.expand(outputs.shape[:-1]).flatten()
    try:
        mean = loss(outputs.flatten(0, -2), labels, ignore_index=_NO_LABEL)
    except (IndexError, RuntimeError):
        return None  # at a label that is no class: the likelihood says so
    of_row = targets.shape[1:].numel()
    return mean if of_row == 1 else mean * of_row


_MEAN = F._Reduction.get_enum("mean")
_NO_LABEL = 1 - 2 ** 61  # torch's losses leave out one label and refuse all others that are no class: one that nothing is cast to
_LOSSES = {Gaussian: _gaussian, Bernoulli: _bernoulli, Categorical: _categorical}
