"""What `predict` returns: means, spreads, quantiles and probabilities of the predictive distribution."""
from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, metrics
from .likelihoods import Bernoulli
from .stored import Stored

__all__ = ["Prediction", "ClassPrediction"]

_BLOCK = 2 ** 20        # outputs of draws that are looked at together


class Prediction(Stored):
    """The distribution of the model's output under the posterior, from S draws.

    n_samples: S.
    mean: [B, ...], over the draws.
    std: [B, ...], over the draws, dividing by S - 1; nan for one draw.
    samples: [S, B, ...], the drawn outputs.

    All are in the outputs' dtype (float32 at least) and on their device. `samples`, `quantile`, `interval`
    and `cdf` need the draws, which `predict` keeps up to 1 GiB: beyond, RuntimeError. `len(p)` is B, `p[rows]` the
    prediction of some rows, `Prediction.cat` that of several; `to`, `save` and `Prediction.load` are below.
    """

    def __init__(self, outputs: Tensor | None, moments, likelihood: nn.Module | None, dtype: torch.dtype):
        self.n_samples = moments.count
        self._outputs, self._moments, self._dtype = outputs, moments, dtype
        self._likelihood = copy.deepcopy(likelihood)  # a learned one may go on learning

    @staticmethod
    def terms(outputs: Tensor, likelihood: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """(values, spread) of drawn outputs: what is averaged over the draws, and what spread each has."""
        return outputs, None

    @property
    def mean(self) -> Tensor:
        return self._moments.mean.to(self._dtype)

    @property
    def std(self) -> Tensor:
        return self._variance().sqrt().to(self._dtype)

    @property
    def samples(self) -> Tensor:
        return self.terms(self._kept(), self._likelihood)[0].to(self._dtype)

    def quantile(self, q: float | list[float] | Tensor) -> Tensor:
        """The q-quantile: [B, ...] for a number q, [Q, B, ...] for Q of them, each from 0 to 1.

        That of the draws, exact, interpolated linearly between neighbours as torch.quantile does.
        """
        try:
            levels = torch.as_tensor(q, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"q: expected one or several numbers, given {checks.describe(q)}") from None
        if levels.dim() > 1 or not levels.numel() or not self._allowed(levels).all():
            raise ValueError(f"q: expected one or several numbers from 0 to 1{self._open}, "
                             f"given {checks.describe(q)}")
        found = self._over_rows(lambda y: self._quantiles(y, levels.reshape(-1).tolist()), dim=1)
        return (found if levels.dim() else found[0]).to(self._dtype)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """(low, high) [B, ...] of the central interval: the quantiles (1 - level) / 2 and (1 + level) / 2."""
        if not checks.is_number(level) or not 0.0 < level < 1.0:
            raise ValueError(f"level: expected a number between 0 and 1, given {checks.describe(level)}")
        low, high = self.quantile([0.5 * (1.0 - level), 0.5 * (1.0 + level)])
        return low, high

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of the predictive distribution [B, ...] at y [B, ...], mean's shape: the share of the
        draws up to y.
        """
        return self._over_rows(self._cdf, like(y, self.mean)).to(self._dtype)

    _open = ""
    _made_of_one = 1    # numbers that are made of one output at a time

    def _allowed(self, levels: Tensor) -> Tensor:
        return (levels >= 0.0) & (levels <= 1.0)

    def _variance(self) -> Tensor:
        squares, n = self._moments.squares, self.n_samples
        return squares / (n - 1) if n > 1 else torch.full_like(squares, math.nan)

    def _quantiles(self, outputs: Tensor, levels: list[float]) -> Tensor:
        """[Q, B, ...] of outputs [S, B, ...]."""
        return quantiles(self.terms(outputs, self._likelihood)[0], levels)

    def _cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (self.terms(outputs, self._likelihood)[0] <= y).double().mean(0)

    def _kept(self) -> Tensor:
        if self._outputs is None:
            shape = tuple(self._moments.mean.shape)
            raise RuntimeError(
                f"the {self.n_samples} draws of {list(shape)} were not kept, as they take more than 1 GiB: "
                "mean and std are all there is. Predict fewer rows at a time, and take the quantiles of each "
                "part: with the same seed the draws are the same networks")
        return self._outputs

    def _over_rows(self, function, *beside: Tensor, dim: int = 0) -> Tensor:
        """function(outputs [S, b, ...], *beside [b, ...]) for some rows at a time, joined at `dim`."""
        outputs = self._kept()
        rows = outputs.shape[1]
        step = max(1, _BLOCK * rows // max(outputs.numel() * self._made_of_one, 1))
        return torch.cat([function(outputs[:, i:i + step], *(t[i:i + step] for t in beside))
                          for i in range(0, max(rows, 1), step)], dim=dim)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_samples={self.n_samples}, shape={list(self._moments.mean.shape)})"


class ClassPrediction(Prediction):
    """The distribution of a class: Categorical, or for each output Bernoulli.

    probs: the mean over the draws, also `mean`: of a Categorical [B, ..., C], the classes last whatever its
        class_dim, as `metrics` takes them; of a Bernoulli [B, ...], the probability of 1.
    entropy: [B, ...] of `probs`, in nats: how unsure the prediction is, for whatever reason.
    mutual_information: [B, ...] between class and weights, entropy less the mean entropy of the draws: the
        epistemic part, what more data could take away (Houlsby et al., "Bayesian active learning for
        classification and preference learning", 2011).
    std, samples, quantile, interval, cdf: of the drawn probabilities.
    """

    @staticmethod
    def terms(outputs: Tensor, likelihood: nn.Module) -> tuple[Tensor, Tensor]:
        """Probabilities and their entropies."""
        outputs = outputs.double()
        if isinstance(likelihood, Bernoulli):
            probs = outputs.sigmoid()
        elif outputs.dim() < 3:
            raise ValueError(f"model: expected outputs [B, ..., C], given {list(outputs.shape[1:])}")
        else:
            outputs = likelihood.classes_last(outputs)
            probs = (outputs if likelihood.log_probs else outputs.log_softmax(-1)).exp()
        return probs, _entropy(probs, likelihood)

    @property
    def probs(self) -> Tensor:
        return self.mean

    @property
    def entropy(self) -> Tensor:
        return _entropy(self._moments.mean, self._likelihood).to(self._dtype)

    @property
    def mutual_information(self) -> Tensor:
        entropy = _entropy(self._moments.mean, self._likelihood)
        return (entropy - self._moments.spread).clamp(min=0.0).to(self._dtype)

    def selective_accuracy(self, targets: Tensor, coverage: float) -> Tensor:
        """Accuracy on the given share of the rows, the most confident ones: see
        `metrics.selective_accuracy`.
        """
        return metrics.selective_accuracy(self.probs, targets, coverage)


def _entropy(probs: Tensor, likelihood: nn.Module) -> Tensor:
    if isinstance(likelihood, Bernoulli):
        return torch.special.entr(probs) + torch.special.entr(1.0 - probs)
    return torch.special.entr(probs).sum(-1)


def quantiles(values: Tensor, levels: list[float]) -> Tensor:
    """[Q, ...] of values [n, ...], interpolated linearly between neighbours."""
    values = values.movedim(0, -1).contiguous()
    # numpy's sort is many times faster than torch's on a CPU
    ordered = torch.from_numpy(np.sort(values.numpy())) if values.is_cpu else values.sort(-1).values
    found = []
    for level in levels:
        position = level * (values.shape[-1] - 1)
        low, high = ordered[..., math.floor(position)], ordered[..., math.ceil(position)]
        found.append(torch.lerp(low, high, position - math.floor(position)))
    return torch.where(ordered[..., -1].isnan(), math.nan, torch.stack(found))  # nan is sorted to the end


def like(y: Tensor, mean: Tensor, name: str = "y") -> Tensor:
    if not isinstance(y, Tensor) or y.shape != mean.shape:
        raise ValueError(f"{name}: expected a tensor {list(mean.shape)}, given {checks.describe(y)}")
    return y.to(mean.device)
