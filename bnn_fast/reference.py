"""The operators of `bnn_fast.functional` in plain PyTorch: same names, signatures, noise; nothing compiled.

Every kernel is held against this file, and it is what runs where the compiled extension is missing.
Gradients are autograd's own, of any order. Everything works on any device and under `torch.func`; the key is
never read on the host.
"""

from __future__ import annotations

import math
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .priors import Normal

__all__ = ["variational_linear", "sample_normal", "kl_normal"]

_WORD = 0xFFFFFFFF


def variational_linear(x, weight_mu, weight_rho, bias_mu, bias_rho, key, *, prior=Normal(0.0, 1.0),
                       bias_prior=None, scale="softplus", kl="analytic", n_samples=1, row_offset=0,
                       column_offset=0):
    """See `bnn_fast.functional.variational_linear`."""
    checks.positive_int("n_samples", n_samples)
    checks.weight(weight_mu, bias_mu, bias_rho)
    checks.parameter_pair("weight_", weight_mu, weight_rho, prior)
    checks.key(key, weight_mu)
    checks.linear_input(x, weight_mu, n_samples)
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
    posterior = _Posterior(mu, rho, scale)
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
    posterior = _Posterior(mu, rho, scale)
    rows, columns = (mu.shape[0], math.prod(mu.shape[1:])) if mu.dim() > 1 else (1, mu.numel())
    eps = standard_normal(key, samples, rows, columns, stream=stream, row_offset=row_offset,
                          column_offset=column_offset, dtype=posterior.mu.dtype)
    eps = eps.reshape(samples, *mu.shape)
    drawn = torch.where(posterior.alive, posterior.mu + posterior.sigma * eps, posterior.mu.detach())
    return posterior, drawn, eps


class _Posterior:
    """N(mu, sigma(rho)^2) in the type it is computed in: float32 for the 16-bit types, rounded at the end.

    A pruned weight (rho = -inf) has sigma 0, and neither mu nor rho has a gradient from it.
    """

    def __init__(self, mu: Tensor, rho: Tensor, scale: str):
        checks.choice("scale", scale, checks.SCALES)
        dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
        self.alive = rho != -math.inf
        self.mu = mu.to(dtype)
        self._rho = rho.to(dtype).masked_fill(~self.alive, 0.0)
        self._scale = scale
        self.sigma = sigma_of(self._rho, scale).masked_fill(~self.alive, 0.0)

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


def sigma_of(rho: Tensor, scale: str) -> Tensor:
    """The standard deviation that rho, any finite value, means under `scale`."""
    if scale == "softplus":
        return F.softplus(
            rho, threshold=40
        )  # exact beyond 40, where log(1 + e^rho) - rho is below float64's resolution
    return (rho if scale == "exp" else 0.5 * rho).exp()


def log_sigma_of(rho: Tensor, scale: str) -> Tensor:
    """log sigma(rho), right also where sigma itself has underflowed."""
    if scale != "softplus":
        return rho if scale == "exp" else 0.5 * rho
    # With z = e^rho, log(log(1 + z)) = rho - z/2 + 5 z^2 / 24 - ..., and below -12 z^3 is nothing beside rho.
    z = rho.clamp(max=-12.0).exp()
    return torch.where(
        rho < -12.0, rho - z * (0.5 - z * (5.0 / 24.0)), sigma_of(rho.clamp(min=-12.0), scale).log()
    )


def standard_normal(
    key: Tensor,
    samples: int,
    rows: int,
    columns: int,
    *,
    stream: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise [samples, rows, columns] (float32 or float64) that `key` = (seed, first sample) stands for.

    One Philox counter (column / 4, row, sample, stream) makes the four normals of columns 4c to 4c + 3.
    """

    def count(start, n, *shape):
        return ((start + torch.arange(n, dtype=torch.int64, device=key.device)) & _WORD).reshape(*shape)

    first, last = column_offset // 4, (column_offset + columns + 3) // 4
    words = philox4x32(
        (
            count(first, last - first, -1),
            count(row_offset, rows, -1, 1),
            count(key[1], samples, -1, 1, 1),
            torch.full((), stream, dtype=torch.int64, device=key.device),
        ),
        (key[0] & _WORD, (key[0] >> 32) & _WORD),
    )
    normals = torch.stack(normal4(*words, dtype), dim=-1).flatten(-2)
    skip = column_offset - 4 * first
    return normals[..., skip : skip + columns]


def philox4x32(counter, key, rounds: int = 10):
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    `counter` holds four and `key` two broadcastable int64 tensors of 32-bit words; returns four such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The products fill 64 bits; int64 wraps, and the masks make the bits unsigned again.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def normal4(x0, x1, x2, x3, dtype):
    """Four normals of one counter's words: Box and Muller, "A note on the generation of random normal
    deviates" (1958).

    The float32 steps are those of csrc/normal.h one by one, so the bits agree; float64 agrees to a few ulp.
    """
    normals = []
    for radius_word, angle_word in ((x0, x1), (x2, x3)):
        r = _radius64(radius_word) if dtype == torch.float64 else _radius32(radius_word)
        sine, cosine = _circle(angle_word, dtype)
        normals += [r * cosine, r * sine]
    return normals


def _float32(*values: float) -> list[float]:
    return [struct.unpack("f", struct.pack("f", v))[0] for v in values]


# The minimax coefficients of csrc/elementary.h and csrc/normal.h, highest power first.
_LOG1P = _float32(
    0.0873517096,
    -0.143077493,
    0.149179384,
    -0.165704682,
    0.199620739,
    -0.250017583,
    0.333339512,
    -0.499999911,
)
_SINE = _float32(-0.000195169341, 0.00833217520, -0.166666552)
_COSINE = _float32(2.44373332e-5, -0.00138873630, 0.0416666456)
_SQRT_HALF, _TWO_LOG_2, _TURN32 = _float32(0.707106769, 1.38629436, 2.0 * math.pi * 2.0**-32)


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c in float32, rounded once: in float64 the product is exact."""
    return (a.double() * b + c).float()


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = _fma(value, x, c)
    return value


def _radius64(x: Tensor) -> Tensor:
    return (-2.0 * ((x.double() + 0.5) * 2.0**-32).log()).sqrt()


def _radius32(x: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (x + 1/2) 2^-32. In the upper half u = 1 - v, and ln u is taken as log(1 - v)."""
    upper = x > _WORD // 2
    v = _fma(torch.where(upper, _WORD - x, x).float(), 2.0**-32, 2.0**-33)
    mantissa, exponent = torch.where(upper, 1.0 - v, v).frexp()
    small = mantissa < _SQRT_HALF
    exponent = exponent - small.to(exponent.dtype)
    f = torch.where(small, 2.0 * mantissa, mantissa) - 1.0  # u = 2^exponent (1 + f)
    f = torch.where(upper & (exponent == 0), -v, f)
    log1p = _fma(f * f, _polynomial(_LOG1P, f), f)
    # By way of float64: torch's float32 sqrt on CPU (MKL's) is not correctly rounded.
    return _fma(exponent.float(), -_TWO_LOG_2, -2.0 * log1p).double().sqrt().float()


def _circle(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sin 2 pi u and cos 2 pi u: the top two bits choose the quarter turn, the rest t in [-pi/4, pi/4]."""
    quarter = ((x + 0x20000000) >> 30) & 3
    rest = ((x + 0x20000000) & 0x3FFFFFFF) - 0x20000000
    if dtype == torch.float64:
        t = (rest.double() + 0.5) * (2.0 * math.pi * 2.0**-32)
        s, c = t.sin(), t.cos()
    else:
        t = _fma(rest.float(), _TURN32, 0.5 * _TURN32)
        z = t * t
        s = _fma(_polynomial(_SINE, z), z * t, t)
        c = _fma(_polynomial(_COSINE, z), z * z, _fma(z, -0.5, 1.0))
    odd = (quarter & 1) == 1
    sine = torch.where(odd, c, s) * (1 - (quarter & 2))
    cosine = torch.where(odd, s, c) * (1 - ((quarter + 1) & 2))
    return sine, cosine
