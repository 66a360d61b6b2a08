"""What `predict` returns: means, spreads, quantiles and probabilities of the predictive distribution."""
from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, metrics
from .likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian
from .stored import Stored

__all__ = ["Prediction", "GaussianPrediction", "ClassPrediction"]

_BLOCK = 2 ** 20        # outputs of draws that are looked at together
_TOLERANCE = 1e-8       # of a quantile's last step, in the smallest standard deviation of the noise


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
        return self._over_rows(self._cdf, _like(y, self.mean)).to(self._dtype)

    _open = ""

    def _allowed(self, levels: Tensor) -> Tensor:
        return (levels >= 0.0) & (levels <= 1.0)

    def _variance(self) -> Tensor:
        squares, n = self._moments.squares, self.n_samples
        return squares / (n - 1) if n > 1 else torch.full_like(squares, math.nan)

    def _quantiles(self, outputs: Tensor, levels: list[float]) -> Tensor:
        """[Q, B, ...] of outputs [S, B, ...]."""
        values = self.terms(outputs, self._likelihood)[0].movedim(0, -1).contiguous()
        # numpy's sort is many times faster than torch's on a CPU
        ordered = torch.from_numpy(np.sort(values.numpy())) if values.is_cpu else values.sort(-1).values
        found = []
        for level in levels:
            position = level * (self.n_samples - 1)
            low, high = ordered[..., math.floor(position)], ordered[..., math.ceil(position)]
            found.append(torch.lerp(low, high, position - math.floor(position)))
        return torch.where(ordered[..., -1].isnan(), math.nan, torch.stack(found))  # nan is sorted to the end

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
        step = max(1, _BLOCK * rows // max(outputs.numel(), 1))
        return torch.cat([function(outputs[:, i:i + step], *(t[i:i + step] for t in beside))
                          for i in range(0, max(rows, 1), step)], dim=dim)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_samples={self.n_samples}, shape={list(self._moments.mean.shape)})"


class GaussianPrediction(Prediction):
    """The distribution of a new target y under a Gaussian likelihood: a mixture of S Gaussians.

    mean: [B, ...].
    epistemic, aleatoric: [B, ...], the parts of the variance, which add up to std^2: that of the drawn means
        (dividing by S - 1), and the noise's, averaged over the draws.
    std: [B, ...], with the noise.
    samples: [S, B, ...], the drawn means, without the noise.

    `quantile`, `interval` and `cdf` are those of the mixture, with the noise.
    """

    @staticmethod
    def terms(outputs: Tensor, likelihood: nn.Module) -> tuple[Tensor, Tensor]:
        """Means and variances of the Gaussians."""
        if isinstance(likelihood, Gaussian):
            variance = likelihood.scale.detach().double().square().to(outputs.device)
            return outputs, variance.expand_as(outputs)
        if outputs.dim() < 3 or outputs.shape[-1] % 2:
            raise ValueError("model: expected outputs [B, ..., 2 D], means and then log-variances, "
                             f"given {list(outputs.shape[1:])}")
        mean, log_variance = outputs.chunk(2, dim=-1)
        return mean, log_variance.double().exp()

    @property
    def epistemic(self) -> Tensor:
        return super()._variance().to(self._dtype)

    @property
    def aleatoric(self) -> Tensor:
        return self._moments.spread.to(self._dtype)

    def quantile(self, q: float | list[float] | Tensor) -> Tensor:
        """The q-quantile of a new target: [B, ...] for a number q, [Q, B, ...] for Q of them, each between 0
        and 1.

        The root of the mixture's distribution function, by Newton steps that fall back to bisection (Press et
        al., "Numerical Recipes", section 9.4), in float64.
        """
        return super().quantile(q)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) [B, ...] of a new target Y at y [B, ...], mean's shape."""
        return super().cdf(y)

    def log_prob(self, targets: Tensor) -> Tensor:
        """log p(targets) [B], the logarithm of the mixture's density, jointly over the outputs of a row:
        log 1/S sum_s prod_d N(y_d; mean_sd, sd_sd^2). targets as the likelihood takes them.
        """
        def of_rows(outputs: Tensor, y: Tensor) -> Tensor:
            return -self._likelihood(outputs.double(), y.double())

        targets = _like(targets, self.mean, "targets")
        with torch.no_grad():
            by_draw = self._over_rows(of_rows, targets, dim=1)
        return (by_draw.logsumexp(0) - math.log(self.n_samples)).to(self._dtype)

    _open = ", the ends excluded"

    def _allowed(self, levels: Tensor) -> Tensor:
        return (levels > 0.0) & (levels < 1.0)

    def _variance(self) -> Tensor:
        return super()._variance() + self._moments.spread

    def _components(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations [S, b, ...], in float64; an underflowed one is not quite 0."""
        mean, variance = self.terms(outputs, self._likelihood)
        return mean.double(), variance.sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def _cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        mean, scale = self._components(outputs)
        return _normal_cdf((y - mean) / scale).mean(0)

    def _quantiles(self, outputs: Tensor, levels: list[float]) -> Tensor:
        mean, scale = self._components(outputs)
        return torch.stack([_mixture_quantile(mean, scale, level) for level in levels])


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


def prediction_class(likelihood: nn.Module | None) -> type[Prediction]:
    if likelihood is None:
        return Prediction
    if isinstance(likelihood, (Gaussian, HeteroscedasticGaussian)):
        return GaussianPrediction
    if isinstance(likelihood, (Bernoulli, Categorical)):
        return ClassPrediction
    raise TypeError("likelihood: expected None, Gaussian, HeteroscedasticGaussian, Bernoulli or Categorical, "
                    f"given {checks.describe(likelihood)}")


def _entropy(probs: Tensor, likelihood: nn.Module) -> Tensor:
    if isinstance(likelihood, Bernoulli):
        return torch.special.entr(probs) + torch.special.entr(1.0 - probs)
    return torch.special.entr(probs).sum(-1)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))  # faster than ndtr, as accurate in the tails


def _mixture_quantile(mean: Tensor, scale: Tensor, level: float) -> Tensor:
    """The root t [...] of 1/S sum_s Phi((t - mean_s) / scale_s) = level, for mean and scale [S, ...]."""
    ends = mean + torch.special.ndtri(torch.tensor(level, dtype=torch.float64)).item() * scale
    low, high = ends.amin(0), ends.amax(0)  # the mixture's quantile lies between those of its parts
    t, step, smallest = ends.mean(0), high - low, _TOLERANCE * scale.amin(0)
    for _ in range(200):  # enough for bisection alone
        z = (t - mean) / scale
        excess = _normal_cdf(z).mean(0) - level
        density = ((-0.5 * z.square()).exp() / scale).mean(0) / math.sqrt(2.0 * math.pi)
        low, high = torch.where(excess < 0.0, t, low), torch.where(excess < 0.0, high, t)
        newton = t - excess / density
        bisect = ~((newton >= low) & (newton <= high) & ((newton - t).abs() <= 0.5 * step))
        following = torch.where(bisect, 0.5 * (low + high), newton)
        step, t = (following - t).abs(), following
        if (step <= smallest + 1e-15 * t.abs()).all():
            break
    return t


def _like(y: Tensor, mean: Tensor, name: str = "y") -> Tensor:
    if not isinstance(y, Tensor) or y.shape != mean.shape:
        raise ValueError(f"{name}: expected a tensor {list(mean.shape)}, given {checks.describe(y)}")
    return y.to(mean.device)
