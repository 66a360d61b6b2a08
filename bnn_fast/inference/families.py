"""Likelihoods whose targets have a distribution of torch.distributions: noise with heavier tails than a Gaussian's, and counts."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, StudentT
from torch.distributions import NegativeBinomial as _NegativeBinomial
from torch.distributions import Poisson as _Poisson

from .. import checks
from .likelihoods import _check_tensors, _checked, _hidden, _rows, shown

__all__ = ["StudentTNoise", "LaplaceNoise", "Poisson", "NegativeBinomial"]


class Family(nn.Module):
    """A likelihood that is a distribution of each target given the model's output for it.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`, summed over the outputs of a row.
    """

    counts = False  # whether targets are numbers 0, 1, 2, ...

    def distribution(self, outputs: Tensor) -> Distribution:
        """Of the targets that belong to these outputs, elementwise."""
        raise NotImplementedError

    def mean_and_variance(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of the targets, each of the outputs' shape."""
        distribution = self.distribution(outputs)
        return distribution.mean, distribution.variance

    def forward(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _check_tensors(outputs, targets)
        outputs = shown(_checked(outputs, targets, targets.shape), _hidden(weights, targets.shape))
        if self.counts:
            check_counts(targets)
        return _rows(self._nll(outputs, targets.to(outputs.dtype)), weights)

    def _nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.distribution(outputs).log_prob(targets)


class _Scaled(Family):
    """y = f(x) + noise of a scale that all outputs share."""

    def __init__(self, scale: float, learned: bool):
        super().__init__()
        _positive("scale", scale)
        self.learned = learned
        _keep(self, "log_scale", math.log(scale), learned)

    @property
    def scale(self) -> Tensor:
        """The noise's scale, 0-d: not its standard deviation."""
        return self.log_scale.exp().clamp(min=torch.finfo(self.log_scale.dtype).tiny)

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.6g}, learned={self.learned}"


class LaplaceNoise(_Scaled):
    """y = f(x) + noise, noise ~ Laplace(0, scale): its best point estimate is the median, as of an absolute error.

    Args:
        scale: positive; the standard deviation is sqrt(2) scale.
        learned: whether it is a parameter (`log_scale`), starting at `scale`.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`, summed over the outputs of a row. ValueError or TypeError if
    scale is not positive, or outputs and targets differ in shape.
    """

    def __init__(self, scale: float = 1.0, learned: bool = False):
        super().__init__(scale, learned)

    def distribution(self, outputs: Tensor) -> Laplace:
        return Laplace(outputs, self.scale.to(outputs), validate_args=False)


class StudentTNoise(_Scaled):
    """y = f(x) + noise, noise ~ scale * t with df degrees of freedom: outliers count little.

    Args:
        df: degrees of freedom, positive: 1 is a Cauchy distribution, infinitely many a Gaussian. The variance is infinite up to 2.
        scale: positive; the standard deviation is scale sqrt(df / (df - 2)).
        learned: whether scale is a parameter (`log_scale`), starting at `scale`.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`, summed over the outputs of a row. ValueError or TypeError if
    df or scale is not positive, or outputs and targets differ in shape.
    """

    def __init__(self, df: float = 4.0, scale: float = 1.0, learned: bool = False):
        super().__init__(scale, learned)
        self.df = _positive("df", df)

    def distribution(self, outputs: Tensor) -> StudentT:
        most = 1e-4 * math.sqrt(torch.finfo(outputs.dtype).max)  # so that the square of an error is a number
        return StudentT(outputs.new_tensor(self.df), outputs.clamp(-most, most), self.scale.to(outputs), validate_args=False)

    def mean_and_variance(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.scale.square() * self.df / (self.df - 2.0) if self.df > 2.0 else outputs.new_tensor(math.inf)
        return outputs, variance.to(outputs).expand_as(outputs)  # the middle, also where there is no mean (df up to 1)

    def extra_repr(self) -> str:
        return f"df={self.df:.6g}, {super().extra_repr()}"


class Poisson(Family):
    """Counts 0, 1, 2, ...; the model puts out the logarithm of their rate.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`, summed over the outputs of a row. ValueError or TypeError if
    outputs and targets differ in shape, or (on a CPU) a target is no count.
    """

    counts = True

    def distribution(self, outputs: Tensor) -> _Poisson:
        return _Poisson(_finite(outputs).exp(), validate_args=False)

    def _nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """From the logarithm of the rate, which may be too small for a rate."""
        return F.poisson_nll_loss(_finite(outputs), targets, log_input=True, reduction="none") + (targets + 1.0).lgamma()


class NegativeBinomial(Family):
    """Counts that vary more than a Poisson's: mean e^f, variance mean + mean^2 / total_count, where f is what the model puts out.

    Args:
        total_count: positive; the more, the closer to a Poisson distribution.
        learned: whether it is a parameter (`log_total_count`), starting at `total_count`.

    `likelihood(outputs [S, B, ...], targets [B, ...]) -> NLL [S, B]`, summed over the outputs of a row. ValueError or TypeError if
    total_count is not positive, outputs and targets differ in shape, or (on a CPU) a target is no count.
    """

    counts = True

    def __init__(self, total_count: float = 1.0, learned: bool = False):
        super().__init__()
        _positive("total_count", total_count)
        self.learned = learned
        _keep(self, "log_total_count", math.log(total_count), learned)

    @property
    def total_count(self) -> Tensor:
        """0-d."""
        return self.log_total_count.exp()

    def distribution(self, outputs: Tensor) -> _NegativeBinomial:
        log_total = self.log_total_count.to(outputs)
        return _NegativeBinomial(log_total.exp(), logits=_finite(outputs) - log_total, validate_args=False)

    def extra_repr(self) -> str:
        return f"total_count={self.total_count.item():.6g}, learned={self.learned}"


def check_counts(targets: Tensor) -> None:
    """On a GPU the values are not looked at, which would wait for it."""
    if targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets: expected counts 0, 1, 2, ..., given {checks.describe(targets)}")
    if torch.compiler.is_compiling() or not targets.is_cpu or not targets.numel():
        return
    wrong = (targets < 0) | ~targets.isfinite() | (targets != targets.round())
    if wrong.any():
        raise ValueError(f"targets: expected counts 0, 1, 2, ..., given {targets[wrong][0].item()}")


def _finite(log_rate: Tensor) -> Tensor:
    """Up to what has an exponential: above, its difference to y log_rate would be no number."""
    return log_rate.clamp(max=math.log(torch.finfo(log_rate.dtype).max) - 1.0)


def _positive(name: str, value) -> float:
    if value is None:
        raise TypeError(f"{name}: expected a positive number, given None")
    return checks.positive(name, value)


def _keep(module: nn.Module, name: str, value: float, learned: bool) -> None:
    checks.flags(learned=learned)
    if learned:
        module.register_parameter(name, nn.Parameter(torch.tensor(value)))
    else:
        module.register_buffer(name, torch.tensor(value))
