"""What `predict` returns of a new target that is a number: the mixture of what each draw says of it."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks, metrics
from . import scores
from .families import Family, LaplaceNoise, StudentTNoise
from .likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian
from .prediction import ClassPrediction, Prediction, like, quantiles

__all__ = ["MixturePrediction", "GaussianPrediction", "FamilyPrediction"]

_TOLERANCE = 1e-8       # of a quantile's last step, in the smallest standard deviation of the noise
_TARGETS = 1000         # drawn of a mixture, at least
_PARTS = 200            # of a mixture whose pairs are gone through: with more, drawing is much faster


class MixturePrediction(Prediction):
    """The distribution of a new target y: a mixture, of equal parts, of what the likelihood makes of each of S draws.

    mean: [B, ...].
    epistemic, aleatoric: [B, ...], the parts of the variance, which add up to std^2: that of the drawn means
        (dividing by S - 1), and the targets' own, averaged over the draws.
    std: [B, ...], with the targets' own variance.
    samples: [S, B, ...], the drawn means.

    `quantile`, `interval`, `cdf` and `crps` are those of the mixture.
    """

    @property
    def epistemic(self) -> Tensor:
        return super()._variance().to(self._dtype)

    @property
    def aleatoric(self) -> Tensor:
        return self._moments.spread.to(self._dtype)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) [B, ...] of a new target Y at y [B, ...], mean's shape."""
        return super().cdf(y)

    def log_prob(self, targets: Tensor) -> Tensor:
        """log p(targets) [B], the logarithm of the mixture's density (of counts: probability), jointly over the outputs of a row:
        log 1/S sum_s prod_d p(y_d | output_sd). targets as the likelihood takes them.
        """
        def of_rows(outputs: Tensor, y: Tensor) -> Tensor:
            return -self._likelihood(outputs.double(), y.double())

        targets = like(targets, self.mean, "targets")
        with torch.no_grad():
            by_draw = self._over_rows(of_rows, targets, dim=1)
        return (by_draw.logsumexp(0) - math.log(self.n_samples)).to(self._dtype)

    def crps(self, targets: Tensor) -> Tensor:
        """The continuous ranked probability score, mean over rows and outputs, in the targets' units.

        In closed form for up to 200 draws of a Gaussian likelihood or of LaplaceNoise (Grimit et al. 2006; Jordan, Krueger and Lerch
        2019: `inference.scores`), and for draws that are all alike (one, or mean=True) under StudentTNoise with df > 1. Otherwise
        `metrics.crps_samples` of targets drawn from the mixture, at least 1,000 of each, with noise that is the same at every call.
        """
        targets = like(targets, self.mean, "targets").double()

        def of_rows(outputs: Tensor, y: Tensor) -> Tensor:
            score = self._score(outputs, y)
            return metrics.crps_samples(self._targets(outputs), y, reduction="none") if score is None else score

        return self._over_rows(of_rows, targets).mean().to(self._dtype)

    def _score(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """The score [b, ...] of outputs [S, b, ...] at y, where it has a closed form."""
        return None

    @property
    def _made_of_one(self) -> int:
        return math.ceil(_TARGETS / self.n_samples)

    def _variance(self) -> Tensor:
        return super()._variance() + self._moments.spread

    def _targets(self, outputs: Tensor) -> Tensor:
        """[n, b, ...] targets of outputs [S, b, ...], as many of each draw."""
        distribution = self._distribution(outputs.double())
        devices = [outputs.device] if outputs.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            return distribution.sample((self._made_of_one,)).flatten(0, 1)


class FamilyPrediction(MixturePrediction):
    """The distribution of a new target under StudentTNoise, LaplaceNoise, Poisson or NegativeBinomial: see `MixturePrediction`.

    torch has no distribution function of such mixtures: `quantile`, `interval` and `cdf` are those of at least 1,000 targets drawn
    from the mixture, with noise that is the same at every call.
    """

    @staticmethod
    def terms(outputs: Tensor, likelihood: Family) -> tuple[Tensor, Tensor]:
        """Means and variances of the targets."""
        return likelihood.mean_and_variance(outputs)

    def _distribution(self, outputs: Tensor):
        return self._likelihood.distribution(outputs)

    def _score(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        likelihood, outputs = self._likelihood, outputs.double()
        if isinstance(likelihood, LaplaceNoise) and len(outputs) <= _PARTS:
            return scores.of_laplaces(outputs, likelihood.scale.detach().to(outputs), y)
        if isinstance(likelihood, StudentTNoise) and likelihood.df > 1.0 and (outputs == outputs[:1]).all():
            return scores.of_student_t(likelihood.df, outputs[0], likelihood.scale.detach().to(outputs), y)
        return None

    def _cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (self._targets(outputs) <= y).double().mean(0)

    def _quantiles(self, outputs: Tensor, levels: list[float]) -> Tensor:
        return quantiles(self._targets(outputs), levels)


class GaussianPrediction(MixturePrediction):
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

    def quantile(self, q: float | list[float] | Tensor) -> Tensor:
        """The q-quantile of a new target: [B, ...] for a number q, [Q, B, ...] for Q of them, each between 0
        and 1.

        The root of the mixture's distribution function, by Newton steps that fall back to bisection (Press et
        al., "Numerical Recipes", section 9.4), in float64.
        """
        return super().quantile(q)

    _open = ", the ends excluded"

    def _allowed(self, levels: Tensor) -> Tensor:
        return (levels > 0.0) & (levels < 1.0)

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

    def _score(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        return scores.of_gaussians(*self._components(outputs), y) if len(outputs) <= _PARTS else None

    def _distribution(self, outputs: Tensor):
        return torch.distributions.Normal(*self._components(outputs), validate_args=False)


def prediction_class(likelihood: nn.Module | None) -> type[Prediction]:
    if likelihood is None:
        return Prediction
    if isinstance(likelihood, (Gaussian, HeteroscedasticGaussian)):
        return GaussianPrediction
    if isinstance(likelihood, Family):
        return FamilyPrediction
    if isinstance(likelihood, (Bernoulli, Categorical)):
        return ClassPrediction
    raise TypeError("likelihood: expected None, Gaussian, HeteroscedasticGaussian, Bernoulli, Categorical, StudentTNoise, LaplaceNoise, "
                    f"Poisson or NegativeBinomial, given {checks.describe(likelihood)}")


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
