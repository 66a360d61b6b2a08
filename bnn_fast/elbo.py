"""The training objective: the evidence lower bound, its likelihoods, and weights for the KL."""
from __future__ import annotations

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .divergence import kl_divergence
from .sampling import mc_forward

__all__ = ["ELBO", "Gaussian", "HeteroscedasticGaussian", "Bernoulli", "Categorical", "blundell_weights",
           "linear_warmup"]


class ELBO(nn.Module):
    """The negative ELBO per row, as a loss:  mean NLL + kl_weight * KL / n_data.

    Args:
        model: any module, its variational layers giving the KL.
        likelihood: Gaussian, HeteroscedasticGaussian, Bernoulli or Categorical, or a module like them.
        n_data: rows of the whole training set, not of a batch: the KL belongs to all of them.
        kl_weight: 1 is the ELBO itself. A number, or a callable of the step (0, 1, 2, ...; `linear_warmup`,
            `blundell_weights`). The step counts the calls made with gradients on; `step` may be set.

    `elbo(x, y, n_samples=1)`: x [B, ...], y the targets [B, ...] -> scalar. The NLL is summed over the
    outputs of a row and averaged over rows and draws; one draw (of each sample) holds for a whole call.
    Afterwards `elbo.nll` and `elbo.kl` are the two parts, the KL undivided and unweighted, without their
    gradients. `elbo.parameters()` has those of the likelihood too.

    ValueError if outputs and targets differ in shape (they are not broadcast).
    """

    def __init__(self, model: nn.Module, likelihood: nn.Module, n_data: int,
                 kl_weight: float | Callable[[int], float] = 1.0):
        super().__init__()
        if isinstance(n_data, bool) or not isinstance(n_data, (int, float)) or not n_data > 0:
            raise ValueError("n_data: expected the positive number of training rows, "
                             f"given {checks.describe(n_data)}")
        is_number = isinstance(kl_weight, (int, float)) and not isinstance(kl_weight, bool)
        if not callable(kl_weight) and not is_number:
            raise TypeError("kl_weight: expected a number or a callable of the step, "
                            f"given {checks.describe(kl_weight)}")
        self.model, self.likelihood, self.n_data, self.kl_weight = model, likelihood, n_data, kl_weight
        self.step = 0
        self.nll = self.kl = None

    def forward(self, x: Tensor, y: Tensor, n_samples: int = 1) -> Tensor:
        nll = self.likelihood(mc_forward(self.model, x, n_samples), y).mean()
        kl = kl_divergence(self.model)
        self.nll, self.kl = nll.detach(), kl.detach()
        return nll + kl * (self._weight() / self.n_data)

    def _weight(self) -> float:
        if not callable(self.kl_weight):
            return self.kl_weight
        weight = self.kl_weight(self.step)
        if torch.is_grad_enabled():
            self.step += 1
        return weight

    def extra_repr(self) -> str:
        return f"n_data={self.n_data}, kl_weight={self.kl_weight}"


def linear_warmup(steps: int) -> Callable[[int], float]:
    """kl_weight growing from 1/steps at the first step to 1 at step number `steps`, and 1 ever after."""
    checks.positive_int("steps", steps)
    return lambda step: min(1.0, (step + 1) / steps)


def blundell_weights(n_batches: int) -> Callable[[int], float]:
    """kl_weight of the i-th of an epoch's M batches: M 2^-i / (1 - 2^-M), i = 1..M, of mean 1.

    Blundell et al., "Weight Uncertainty in Neural Networks", 2015, section 3.4: pi_i = 2^(M-i) / (2^M - 1) of
    the KL goes to batch i. Written without 2^M, which overflows.
    """
    checks.positive_int("n_batches", n_batches)
    total = -math.expm1(-n_batches * math.log(2.0))
    return lambda step: math.ldexp(n_batches, -(step % n_batches + 1)) / total


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
