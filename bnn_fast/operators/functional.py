"""The operators as functions. `bnn_fast.reference` has the same names and signatures in plain PyTorch.

A key is an int64 tensor [2], (seed, first sample), on the parameters' device; the same key gives the same
noise. A prior's tensors get no gradient. The KL is a scalar in float32 (float64 for float64 parameters).
Where rho is -inf the weight is pruned: it is mu, its KL is 0 and so are its gradients. 16-bit parameters are
computed in float32 and rounded once.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..priors import Normal, as_normal
from . import arguments as packing
from . import autograd, raw, reference

__all__ = ["variational_linear", "noisy_linear", "sample_normal", "kl_normal"]


def variational_linear(
        x: Tensor, weight_mu: Tensor, weight_rho: Tensor, bias_mu: Tensor | None, bias_rho: Tensor | None,
        key: Tensor, *, prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None,
        scale: str = "softplus", kl: str | None = "analytic", n_samples: int = 1, row_offset: int = 0,
        column_offset: int = 0, estimator: str = "weight") -> tuple[Tensor, Tensor | None]:
    """x W^T + b with W ~ N(weight_mu, sigma(weight_rho)^2), b likewise, and the KL divergence to the prior.

    One draw of W and b is shared by the batch (Blundell et al., "Weight Uncertainty in Neural Networks",
    2015), unless another estimator is asked for: of the same mean and variance for every example (dimension 0 of x), with less
    in common between them.

    Args:
        x: [..., in]; with n_samples > 1 dimension 0 is the batch repeated, [n_samples * B, ..., in],
            sample-major. The parameters' dtype, or bfloat16 or float16 where they are float32.
        weight_mu, weight_rho: [out, in].
        bias_mu, bias_rho: [out], or None.
        key: int64 [2], (seed, first sample): draw s has the noise of sample first + s.
        prior, bias_prior: `Normal`, or torch.distributions.Normal; a prior's tensors have the parameter's
            shape. bias_prior is prior by default, and has to be given where that holds tensors.
        scale: what rho means: "softplus" sigma = log(1 + e^rho), "exp" e^rho, "sqrt_exp" e^(rho/2), "square" rho^2 or "identity" rho, of
            either sign. At rho = 0 the last two have sigma 0 and an infinite KL, whose derivative is that of -log |sigma|: -1/rho or
            -2/rho, infinite too; that of the draws is 2 rho eps and eps.
        kl: "analytic", "sampled" (log q(w) - log p(w), mean over the draws), or None, for no KL.
        row_offset, column_offset: where this weight begins in a larger one, for the noise.
        estimator: "weight"; "local", which draws outputs, N(x weight_mu^T, x^2 (sigma^2)^T), instead (Kingma, Salimans,
            Welling, "Variational dropout and the local reparameterization trick", 2015); or "flipout", x weight_mu^T +
            ((x s) (sigma eps)^T) r with signs s and r of every example (Wen et al., "Flipout: efficient pseudo-independent
            weight perturbations on mini-batches", 2018). They count their noise by the number of the example: a key [3] has
            that of the first of x in a whole batch as its third number. A sampled KL is that of the weights that
            estimator="weight" would draw.

    Returns:
        y [..., out] in x's dtype (the autocast dtype under autocast), and the KL or None.

    Raises ValueError or TypeError naming the argument, what was given and what was expected.
    """
    checks.choice("scale", scale, checks.SCALES)
    checks.choice("kl", kl, checks.KLS)
    checks.estimator(estimator, row_offset, column_offset)
    n_samples = checks.positive_int("n_samples", n_samples)
    prior, bias_prior = priors_of(prior, bias_prior, weight_mu, bias_mu)
    checks.parameter_pair("weight_", weight_mu, weight_rho, prior)
    checks.weight(weight_mu, bias_mu, bias_rho)
    if bias_mu is not None:
        checks.parameter_pair("bias_", bias_mu, bias_rho, bias_prior, "bias_prior")
    checks.key(key, weight_mu)
    n_samples, _, row_offset, column_offset = checks.noise_place(*weight_mu.shape, n_samples, 0, row_offset, column_offset)
    x = autocast(x)
    checks.linear_input(x, weight_mu, n_samples)
    if not raw.compiled_for(x.device):
        return plain_linear(
            x, weight_mu, weight_rho, bias_mu, bias_rho, key, prior=prior, bias_prior=bias_prior, scale=scale,
            kl=kl, n_samples=n_samples, row_offset=row_offset, column_offset=column_offset, estimator=estimator)
    pairs = [(weight_mu, weight_rho, prior)] if bias_mu is None else [
        (weight_mu, weight_rho, prior), (bias_mu, bias_rho, bias_prior)]
    arguments = packing.to_draw([t for mu, rho, _ in pairs for t in (mu, rho)], key, packing.pack_priors(*(p for _, _, p in pairs)),
                                scale, kl, n_samples, 0, row_offset, column_offset, estimator)

    def kl_apart():
        places = ((0, row_offset, column_offset), (1, 0, row_offset))
        return sum(_kl_apart(mu, rho, key, p, scale, kl, n_samples, place) for (mu, rho, p), place in zip(pairs, places))

    return _differentiable(autograd.LINEAR if estimator == "weight" else autograd.ESTIMATED, x, arguments, kl, kl_apart)


def noisy_linear(x: Tensor, weight_mu: Tensor, weight_sigma: Tensor, bias_mu: Tensor | None, bias_sigma: Tensor | None, key: Tensor, *,
                 row_offset: int = 0, column_offset: int = 0) -> Tensor:
    """x W^T + b with factorised noise, W = weight_mu + weight_sigma f(e_out) f(e_in)^T and b = bias_mu + bias_sigma f(e_out), where
    f(e) = sign(e) sqrt |e| of as many standard normals as there are inputs and outputs (Fortunato et al., "Noisy Networks for
    Exploration", 2018, equations 10 and 11).

    Arguments as in `variational_linear`; a sigma has either sign, and -inf marks a weight without noise and gradients. The normals
    are those of streams 5 and 6 of the key, from the offsets on. Returns y [..., out] in x's dtype (the autocast dtype under autocast).
    """
    x = autocast(x)
    checks.noisy(x, weight_mu, weight_sigma, bias_mu, bias_sigma, key)
    outputs, inputs = weight_mu.shape
    _, _, row_offset, column_offset = checks.noise_place(outputs, inputs, 1, 0, row_offset, column_offset)
    given = x, weight_mu, weight_sigma, bias_mu, bias_sigma
    if not raw.compiled_for(x.device):
        return without_autocast(x.device.type, reference.noisy_linear, *given, key, row_offset=row_offset, column_offset=column_offset)
    posterior = [t for t in given[1:] if t is not None]
    arguments = packing.to_draw(posterior, key, packing.pack_priors(*(Normal(),) * (len(posterior) // 2)), "identity", None, 1,
                                reference.NOISY_STREAM, row_offset, column_offset)
    return _differentiable(autograd.NOISY, x, arguments, None, None)[0]


def sample_normal(
        mu: Tensor, rho: Tensor, key: Tensor, *, prior: Normal = Normal(0.0, 1.0), scale: str = "softplus",
        kl: str | None = "analytic", n_samples: int | None = None, stream: int = 0, row_offset: int = 0,
        column_offset: int = 0) -> tuple[Tensor, Tensor | None]:
    """Draws w ~ N(mu, sigma(rho)^2) and the KL divergence to the prior; arguments as in `variational_linear`.

    mu and rho have any shape; more than two dimensions count as [rows, everything else], one as a single row.
    stream: 0 is a weight's noise, 1 a bias's. Returns w, of mu's shape, or [n_samples, *mu.shape] if
    n_samples is given, and the KL or None.
    """
    checks.choice("scale", scale, checks.SCALES)
    checks.choice("kl", kl, checks.KLS)
    samples = 1 if n_samples is None else checks.positive_int("n_samples", n_samples)
    prior = as_normal("prior", prior, mu)
    checks.parameter_pair("", mu, rho, prior)
    checks.key(key, mu)
    rows = mu.shape[0] if mu.dim() > 1 else 1
    columns = mu.numel() // max(rows, 1)
    samples, stream, row_offset, column_offset = checks.noise_place(rows, columns, samples, stream, row_offset, column_offset)
    if not raw.compiled_for(mu.device):
        return reference.sample_normal(
            mu, rho, key, prior=prior, scale=scale, kl=kl, n_samples=n_samples, stream=stream,
            row_offset=row_offset, column_offset=column_offset)
    place = stream, row_offset, column_offset
    arguments = packing.to_draw([mu, rho], key, packing.pack_priors(prior), scale, kl, samples, *place)

    def kl_apart():
        return _kl_apart(mu, rho, key, prior, scale, kl, samples, place)

    w, kl = _differentiable(autograd.SAMPLE, None, arguments, kl, kl_apart)
    return (w.squeeze(0) if n_samples is None else w), kl


def kl_normal(mu: Tensor, rho: Tensor, *, prior: Normal = Normal(0.0, 1.0), scale: str = "softplus",
              reduction: str = "sum") -> Tensor:
    """KL(N(mu, sigma^2) || N(m, t^2)) = log(t / sigma) + (sigma^2 + (mu - m)^2) / (2 t^2) - 1/2.

    The prior is N(m, t^2).

    reduction: "sum", "mean" (over the weights that are not pruned), or "none" (elementwise, in mu's shape and
    dtype).
    """
    checks.choice("scale", scale, checks.SCALES)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    prior = as_normal("prior", prior, mu)
    checks.parameter_pair("", mu, rho, prior)
    if not raw.compiled_for(mu.device):
        return reference.kl_normal(mu, rho, prior=prior, scale=scale, reduction=reduction)
    arguments = packing.to_compare([mu, rho], packing.pack_priors(prior), scale, reduction != "none")
    if autograd.nodes is None or autograd.transformed():
        kl = autograd.KL.apply(*arguments)
    else:
        kl = autograd.read([autograd.kl_call(arguments)])
    return kl / alive(rho).clamp(min=1) if reduction == "mean" else kl


def plain_linear(x: Tensor, *arguments, **options) -> tuple[Tensor, Tensor | None]:
    """The reference, without autocast, which would have it compute in x's type what belongs in float32."""
    return without_autocast(x.device.type, reference.variational_linear, x, *arguments, **options)


def without_autocast(device: str, function, *arguments, **options):
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(*arguments, **options)
    with torch.autocast(device, enabled=False):
        return function(*arguments, **options)


def alive(rho: Tensor) -> Tensor:
    """How many weights are not pruned, 0-d."""
    return (rho != -torch.inf).sum()


def priors_of(prior: Normal, bias_prior: Normal | None, weight_mu: Tensor,
              bias_mu: Tensor | None) -> tuple[Normal, Normal]:
    """(prior, bias_prior), the bias's being the weight's unless another is given, as it has to be where the
    weight's holds tensors.
    """
    prior = as_normal("prior", prior, weight_mu)
    if bias_prior is not None:
        return prior, as_normal("bias_prior", bias_prior, bias_mu)
    if not prior.has_tensors:
        return prior, prior
    if bias_mu is not None:
        raise ValueError("bias_prior: expected a prior for the bias, as the weight's holds tensors, "
                         "given None")
    return prior, Normal(0.0, 1.0)


def autocast(x: Tensor) -> Tensor:
    """x as autocast would have it. The parameters stay as they are, and so do noise and KL."""
    if isinstance(x, Tensor) and x.dtype in checks.AUTOCAST and autocasting(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return torch._C._is_any_autocast_enabled() and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _differentiable(operator, x: Tensor | None, arguments: tuple, kl: str | None, kl_apart):
    """(result, KL or None); kl_apart computes the KL in a pass of its own."""
    if autograd.transformed():
        y, value = operator.apply(*(() if x is None else (x,)), *arguments)
        return y, value if kl is not None else None
    y, call = autograd.draw(operator, x, arguments)
    if kl is None:
        return y, None
    return y, kl_apart() if call is None else autograd.read([call])


def _kl_apart(mu: Tensor, rho: Tensor, key: Tensor, prior: Normal, scale: str, kl: str, n_samples: int, place: tuple) -> Tensor:
    """The KL of a tensor, at the weights that the key stands for if it is sampled, with a node of its own."""
    packed = packing.pack_priors(prior)
    if kl == "analytic":
        return autograd.KL.apply(*packing.to_compare([mu, rho], packed, scale, True))
    return autograd.SAMPLE.apply(*packing.to_draw([mu, rho], key, packed, scale, kl, n_samples, *place))[1]
