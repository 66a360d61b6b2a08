"""The operators of `bnn_fast.functional` in plain PyTorch: same names, signatures, noise; nothing compiled.

Every kernel is held against this file, and it is what runs where the compiled extension is missing.
Gradients are autograd's own, of any order. Everything works on any device and under `torch.func`; the key is
never read on the host.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..priors import Normal
from ..priors.scales import log_sigma_of, sigma_of
from .noise import first_row, random_signs, standard_normal, standard_normal_of

__all__ = ["variational_linear", "noisy_linear", "sample_normal", "kl_normal"]

NOISY_STREAM = 5  # of the inputs' noise; the outputs' is the next

def variational_linear(x, weight_mu, weight_rho, bias_mu, bias_rho, key, *, prior=Normal(0.0, 1.0),
                       bias_prior=None, scale="softplus", kl="analytic", n_samples=1, row_offset=0,
                       column_offset=0, estimator="weight"):
    """See `bnn_fast.functional.variational_linear`."""
    checks.positive_int("n_samples", n_samples)
    checks.estimator(estimator, row_offset, column_offset)
    checks.weight(weight_mu, bias_mu, bias_rho)
    checks.parameter_pair("weight_", weight_mu, weight_rho, prior)
    checks.key(key, weight_mu)
    checks.linear_input(x, weight_mu, n_samples)
    if estimator != "weight":
        bias_prior = prior if bias_prior is None else bias_prior
        pairs = [(weight_mu, weight_rho, prior)] + ([] if bias_mu is None else [(bias_mu, bias_rho, bias_prior)])
        return _estimated_linear(x, pairs, key, scale, kl, n_samples, estimator)
    w, total_kl = _draw(weight_mu, weight_rho, key, prior, scale, kl, n_samples, 0, row_offset, column_offset)
    w, b = w.to(x.dtype), None
    if bias_mu is not None:
        bias_prior = prior if bias_prior is None else bias_prior
        checks.parameter_pair("bias_", bias_mu, bias_rho, bias_prior, "bias_prior")
        b, bias_kl = _draw(bias_mu, bias_rho, key, bias_prior, scale, kl, n_samples, 1, 0, row_offset)
        b = b.to(x.dtype)
        total_kl = None if kl is None else total_kl + bias_kl
    if n_samples == 1:
        return F.linear(x, w[0], None if b is None else b[0]), total_kl
    out_features, in_features = weight_mu.shape
    stacked = x.reshape(n_samples, math.prod(x.shape[:-1]) // n_samples, in_features)
    y = stacked @ w.mT if b is None else stacked @ w.mT + b.unsqueeze(1)
    return y.reshape(*x.shape[:-1], out_features), total_kl


_ACTIVATIONS = {
    "identity": lambda z, a, b: z, "relu": lambda z, a, b: F.relu(z), "leaky_relu": lambda z, a, b: F.leaky_relu(z, a),
    "elu": lambda z, a, b: F.elu(z, a), "gelu": lambda z, a, b: F.gelu(z), "gelu_tanh": lambda z, a, b: F.gelu(z, approximate="tanh"),
    "silu": lambda z, a, b: F.silu(z), "tanh": lambda z, a, b: z.tanh(), "sigmoid": lambda z, a, b: z.sigmoid(),
    "softplus": lambda z, a, b: F.softplus(z, a, b)}


def variational_chain(x, links, *, scale="softplus", kl="analytic", n_samples=1, shared=False):
    """A chain of linear layers with activations (arguments.Link), one after the other, and the sum of the KLs of those that are
    drawn. shared: x [B, ...] is that of all samples.
    """
    if shared:
        x = x.repeat(n_samples, *(1,) * (x.dim() - 1))
    names, total = list(checks.ACTIVATIONS), None
    for link in links:
        if link.key is None:
            x = F.linear(x, *link.tensors)
        else:
            tensors = iter(link.prior.tensors)
            values = [next(tensors) if link.prior.places >> i & 1 else n for i, n in enumerate(link.prior.numbers)]
            priors = [Normal.unchecked(*values[i:i + 2]) for i in range(0, len(values), 2)]
            parameters = [*link.tensors, None, None][:4]
            x, value = variational_linear(x, *parameters, link.key, prior=priors[0], bias_prior=priors[-1], scale=scale, kl=kl,
                                          n_samples=n_samples)
            total = value if total is None or value is None else total + value
        code, a, b = link.activation
        x = _ACTIVATIONS[names[code]](x, a, b)
    return x, total


def noisy_linear(x, weight_mu, weight_sigma, bias_mu, bias_sigma, key, *, row_offset=0, column_offset=0):
    """See `bnn_fast.functional.noisy_linear`."""
    checks.noisy(x, weight_mu, weight_sigma, bias_mu, bias_sigma, key)
    dtype = torch.promote_types(weight_mu.dtype, torch.float32)

    def factors(n, stream, offset):
        e = standard_normal(key, 1, 1, n, stream=stream, column_offset=offset, dtype=dtype).flatten()
        return e.sign() * e.abs().double().sqrt().to(e.dtype)

    outputs, inputs = weight_mu.shape
    of_inputs, of_outputs = factors(inputs, NOISY_STREAM, column_offset), factors(outputs, NOISY_STREAM + 1, row_offset)
    w = Posterior(weight_mu, weight_sigma, "identity").draw(of_outputs.unsqueeze(1) * of_inputs)
    b = None if bias_mu is None else Posterior(bias_mu, bias_sigma, "identity").draw(of_outputs)
    return F.linear(x, *(None if t is None else t.to(weight_mu.dtype).to(x.dtype) for t in (w, b)))


def _estimated_linear(x, pairs, key, scale, kl, samples, estimator):
    """The layer by the estimators "local" and "flipout" (csrc/cpu/estimators.h), of pairs (mu, rho, prior) of the weight and, where
    there is one, the bias."""
    posteriors = [Posterior(mu, rho, scale) for mu, rho, _ in pairs]
    weight, bias = posteriors[0], posteriors[1] if len(pairs) > 1 else None
    dtype, (outputs, inputs) = weight.mu.dtype, weight.mu.shape
    examples = x.shape[0] // samples if x.dim() > 1 else 1
    rest = math.prod(x.shape[1:-1])
    x_ = x.to(dtype).reshape(samples, examples, rest, inputs)
    place, shape = dict(row_offset=first_row(key), dtype=dtype), (samples, examples, rest, outputs)
    if estimator == "local":
        y, v = x_ @ weight.mean.mT, x_.square() @ weight.variance.mT
        if bias is not None:
            y, v = y + bias.mean, v + bias.variance
        eps = standard_normal(key, samples, examples, rest * outputs, stream=2, **place).reshape(shape)
        some = v >= torch.finfo(dtype).tiny  # the square root has no derivative at 0
        y = y + torch.where(some, torch.where(some, v, 1.0).sqrt() * eps, 0.0)
    else:
        s = random_signs(key, samples, examples, rest * inputs, stream=3, **place).reshape(x_.shape)
        r = random_signs(key, samples, examples, rest * outputs, stream=4, **place).reshape(shape)
        perturbation = weight.sigma * standard_normal(key, samples, outputs, inputs, dtype=dtype)
        y = x_ @ weight.mean.mT + ((x_ * s).flatten(1, 2) @ perturbation.mT).reshape(shape) * r
        if bias is not None:
            eps = standard_normal(key, samples, 1, outputs, stream=1, dtype=dtype)
            y = y + bias.draw(eps).unsqueeze(1)
    y = y.reshape(*x.shape[:-1], outputs).to(x.dtype)
    if kl is None:
        return y, None
    if kl == "analytic":
        return y, sum(_sum(posterior.analytic_kl(prior)) for posterior, (*_, prior) in zip(posteriors, pairs))
    return y, sum(_draw(mu, rho, key, prior, scale, kl, samples, stream, 0, 0)[1] for stream, (mu, rho, prior) in enumerate(pairs))


def sample_normal(mu, rho, key, *, prior=Normal(0.0, 1.0), scale="softplus", kl="analytic", n_samples=None,
                  stream=0, row_offset=0, column_offset=0):
    """See `bnn_fast.functional.sample_normal`."""
    samples = 1 if n_samples is None else checks.positive_int("n_samples", n_samples)
    checks.parameter_pair("", mu, rho, prior)
    checks.key(key, mu)
    w, value = _draw(mu, rho, key, prior, scale, kl, samples, stream, row_offset, column_offset)
    return (w[0] if n_samples is None else w), value


def kl_normal(mu, rho, *, prior=Normal(0.0, 1.0), scale="softplus", reduction="sum"):
    """See `bnn_fast.functional.kl_normal`."""
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.parameter_pair("", mu, rho, prior)
    posterior = Posterior(mu, rho, scale)
    elements = posterior.analytic_kl(prior)
    if reduction == "none":
        return elements.to(mu.dtype)
    if reduction == "sum":
        return _sum(elements)
    return _sum(elements) / posterior.alive.sum().clamp(min=1)


def sampled_kl(mu, rho, key, *, prior=Normal(0.0, 1.0), scale="softplus", n_samples=1, stream=0):
    """log q(w) - log p(w) of each element, the mean over the draws that `key` stands for; mu's shape and dtype."""
    posterior, drawn, eps = _sample(mu, rho, key, scale, n_samples, stream, 0, 0)
    return posterior.sampled_kl(prior, drawn, eps).mean(0).to(mu.dtype)


def sample_rows(mu, rho, rows, samples, key, *, scale="softplus", stream=0, look_up=F.embedding):
    """Rows of a drawn table [V, D], without the rest of it: row rows[i] of the draw of number samples[i] that `key` stands for,
    [..., D] in mu's dtype. A row asked for twice is the same twice.

    rows, samples: int64 [...] that broadcast. look_up(rows, table) gives the rows of a table, and by its gradient decides on that.
    """
    return _sample_rows(mu, rho, rows, samples, key, scale, stream, look_up)[1].to(mu.dtype)


def rows_kl(mu, rho, rows, samples, key, *, prior=Normal(0.0, 1.0), scale="softplus", kl="analytic", stream=0,
            look_up=F.embedding):
    """The KL of these rows [...], each summed over its columns; of "sampled" at what `sample_rows` gives."""
    prior = Normal.unchecked(*(look_up(rows, p) if isinstance(p, Tensor) else p for p in (prior.loc, prior.scale)))
    if kl == "analytic":
        elements = Posterior(look_up(rows, mu), look_up(rows, rho), scale).analytic_kl(prior)
    else:
        posterior, drawn, eps = _sample_rows(mu, rho, rows, samples, key, scale, stream, look_up)
        elements = posterior.sampled_kl(prior, drawn, eps)
    return elements.sum(-1)


def _sample_rows(mu, rho, rows, samples, key, scale, stream, look_up):
    posterior = Posterior(look_up(rows, mu), look_up(rows, rho), scale)
    eps = standard_normal_of(key, samples, rows, mu.shape[1], stream=stream, dtype=posterior.mu.dtype)
    return posterior, posterior.draw(eps), eps


def _draw(mu, rho, key, prior, scale, kl, samples, stream, row_offset, column_offset):
    """Draws [samples, *mu.shape] in mu's type, and their KL."""
    checks.choice("kl", kl, checks.KLS)
    posterior, drawn, eps = _sample(mu, rho, key, scale, samples, stream, row_offset, column_offset)
    w = drawn.to(mu.dtype)
    if kl is None:
        return w, None
    if kl == "analytic":
        return w, _sum(posterior.analytic_kl(prior))
    return w, _sum(posterior.sampled_kl(prior, drawn, eps)) / samples


def _sample(mu, rho, key, scale, samples, stream, row_offset, column_offset):
    """The posterior, and its draws and their noise, both [samples, *mu.shape] in the type computed in."""
    posterior = Posterior(mu, rho, scale)
    rows, columns = (mu.shape[0], math.prod(mu.shape[1:])) if mu.dim() > 1 else (1, mu.numel())
    eps = standard_normal(key, samples, rows, columns, stream=stream, row_offset=row_offset,
                          column_offset=column_offset, dtype=posterior.mu.dtype)
    eps = eps.reshape(samples, *mu.shape)
    return posterior, posterior.draw(eps), eps


class Posterior:
    """N(mu, sigma(rho)^2) in the type it is computed in: float32 for the 16-bit types, rounded at the end.

    A pruned weight (rho = -inf) has sigma 0, and neither mu nor rho has a gradient from it.
    """

    def __init__(self, mu: Tensor, rho: Tensor, scale: str):
        checks.choice("scale", scale, checks.SCALES)
        dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
        self.alive = rho != -math.inf
        self.mu = mu.to(dtype)
        self._rho = rho.to(dtype).masked_fill(~self.alive, 1.0)
        self._scale = scale
        self.sigma = sigma_of(self._rho, scale).masked_fill(~self.alive, 0.0)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.alive, self.mu, self.mu.detach())

    @property
    def variance(self) -> Tensor:
        """The largest number where it overflows: times an input of 0 that is 0."""
        return self.sigma.clamp(max=math.sqrt(torch.finfo(self.mu.dtype).max) * (1 - 1e-7)).square()

    def draw(self, eps: Tensor) -> Tensor:
        return torch.where(self.alive, self.mu + self.sigma * eps, self.mu.detach())

    def analytic_kl(self, prior: Normal) -> Tensor:
        """KL(N(mu, sigma^2) || N(m, t^2)) = log(t / sigma) + (sigma^2 + (mu - m)^2) / (2 t^2) - 1/2."""
        loc, t = self._prior(prior)
        square = (self.sigma / t).square() + ((self.mu - loc) / t).square()
        return (self._log_ratio(t) + 0.5 * square - 0.5).masked_fill(~self.alive, 0.0)

    def sampled_kl(self, prior: Normal, drawn: Tensor, eps: Tensor) -> Tensor:
        """log q(w) - log p(w) = log(t / sigma) - eps^2 / 2 + (w - m)^2 / (2 t^2) at w = mu + sigma eps.

        Blundell et al., "Weight uncertainty in neural networks" (2015), equation 2.
        """
        loc, t = self._prior(prior)
        elements = self._log_ratio(t) - 0.5 * eps.square() + 0.5 * ((drawn - loc) / t).square()
        return elements.masked_fill(~self.alive, 0.0)

    def _prior(self, prior: Normal) -> tuple[Tensor, Tensor]:
        return tuple(
            p.to(self.mu.dtype) if isinstance(p, Tensor) else self.mu.new_tensor(p)
            for p in (prior.loc, prior.scale)
        )

    def _log_ratio(self, t: Tensor) -> Tensor:
        # sigma = inf must make the KL inf, not inf - inf
        log_sigma = log_sigma_of(self._rho, self._scale).clamp(max=torch.finfo(self.mu.dtype).max)
        return t.log() - log_sigma


def _sum(elements: Tensor) -> Tensor:
    return elements.sum(dtype=torch.float64).to(elements.dtype)
