"""Judges the compiled operators against the reference in float64.

As flash-attention does: a kernel may err at most twice as much as the reference in the kernel's own types, and a
little more. Errors count twice: the largest beside the largest element of a result, and each beside the terms that
its element is the sum of (magnitudes.py), so that small elements have to be as right as large ones.
"""

from __future__ import annotations

import functools
import math
from unittest import mock

import torch
from kernels import (
    KEY,
    OPS,
    cast,
    expected_regime,
    kl_arguments,
    make_prior,
    posterior,
    random,
    raw_linear,
    raw_sample,
    regime_of,
)
from magnitudes import elements, sampled

from bnn_fast import Normal, reference
from bnn_fast.operators import noise


@functools.lru_cache(maxsize=32)
def _noise(key: tuple[int, ...], sizes: tuple[int, ...], **place) -> torch.Tensor:
    return noise.standard_normal(torch.tensor(key), *sizes, **place)


# The reference's noise, made once for the tests one after the other that ask for the same.
with_kept_noise = mock.patch.object(
    reference, "standard_normal", lambda key, *sizes, **place: _noise(tuple(key.tolist()), sizes, **place)
)


def judge(what: str, got, plain, truth, magnitude) -> None:
    """The rule at the top of this file. `what` ends with the parameters' type, that of the computation."""
    assert got.shape == truth.shape and got.dtype == plain.dtype, what
    if got.numel() == 0:
        return
    lowest = torch.finfo(got.dtype)
    got, plain, truth = got.double(), plain.double(), truth.double()
    size = truth.abs().max()
    slack = 1e-13 if what.endswith("float64") else 1e-6
    error, plain_error = (got - truth).abs(), (plain - truth).abs()
    allowed = 2 * plain_error.max() + slack * (1 + size)
    assert error.max() <= allowed, f"{what}: error {error.max():.3g}, allowed {allowed:.3g}, largest element {size:.3g}"
    # element by element; below the smallest normal number there are only multiples of one number
    floor, tiny = 2 * lowest.smallest_normal * lowest.eps, 1e-300
    share = (plain_error / (magnitude + tiny)).max()
    allowed = (2 * share + max(slack, lowest.eps)) * magnitude + floor
    wrong = error > allowed
    if wrong.any():
        i = (error / (magnitude + tiny)).where(wrong, 0.0).argmax()
        numbers = [f"{t.flatten()[i]:.3g}" for t in (error, allowed, truth, magnitude)]
        raise AssertionError("{}: element {}: error {}, allowed {}, true {}, terms of {}".format(what, i, *numbers))


def plain_sample(mu, rho, *, prior, scale, kl, n_samples, grad_w, grad_kl, offsets=(0, 0)):
    """What raw_sample gives, of the reference, by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (mu, rho)]
    w, value = reference.sample_normal(
        *leaves,
        KEY,
        prior=prior,
        scale=scale,
        kl=kl,
        n_samples=n_samples,
        row_offset=offsets[0],
        column_offset=offsets[1],
    )
    outputs, grads = ([w], [grad_w]) if value is None else ([w, value], [grad_w, grad_kl])
    return (w.detach(), None if value is None else value.detach()), torch.autograd.grad(
        outputs, leaves, grads
    )


@with_kept_noise
def check_sample(*shape, dtype, tensors=False, kl="analytic", ops=OPS, **options):
    """Judges the draws, their KL and their gradients of a tensor of this shape."""
    mu, rho = posterior(*shape, dtype=dtype)
    prior = make_prior(tensors, *shape, dtype=dtype)
    grad_kl = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad_w = random(options["n_samples"], *shape, dtype=dtype, seed=5)
    what = f"{list(shape)}, tensors {tensors}, {kl}, {options}, {dtype}"
    options["kl"] = kl
    got = raw_sample(mu, rho, prior=prior, grad_w=grad_w, grad_kl=grad_kl if kl else None, **options, ops=ops)
    plain = plain_sample(mu, rho, prior=prior, grad_w=grad_w, grad_kl=grad_kl, **options)
    true = plain_sample(
        mu.double(),
        rho.double(),
        prior=cast(prior, torch.float64),
        grad_w=grad_w.double(),
        grad_kl=grad_kl.double(),
        **options,
    )
    offsets, scale = options.get("offsets", (0, 0)), options["scale"]
    magnitudes = sampled(
        mu, rho, prior, scale, kl, KEY, options["n_samples"], 0, offsets, grad_w, grad_kl if kl else 0
    )
    for name, a, b, c, magnitude in zip(
        ("w", "kl", "mu", "rho"), (*got[0], *got[1]), (*plain[0], *plain[1]), (*true[0], *true[1]), magnitudes
    ):
        if b is None:
            assert a == 0
        else:
            judge(f"{name}: {what}", a, b, c, magnitude)


def check_kl(*shape, dtype, tensors, reduction, scale, ops=OPS):
    """Judges the analytic KL of a tensor of this shape, and its gradients."""
    mu, rho = posterior(*shape, dtype=dtype)
    prior = make_prior(tensors, *shape, dtype=dtype)
    results = []
    for mu_, rho_, prior_ in ((mu, rho, prior), (mu.double(), rho.double(), cast(prior, torch.float64))):
        leaves = mu_.clone().requires_grad_(), rho_.clone().requires_grad_()
        value = reference.kl_normal(*leaves, prior=prior_, scale=scale, reduction=reduction)
        grad = random(*value.shape, dtype=value.dtype, seed=6)
        results.append((value.detach(), *torch.autograd.grad(value, leaves, grad)))
    arguments = kl_arguments(mu, rho, prior=prior, scale=scale, reduce=reduction == "sum")
    value = ops._kl_normal(*arguments)
    grad = random(*value.shape, dtype=value.dtype, seed=6)
    of_kl, of_mu, of_rho = elements(mu, rho, prior, scale)
    magnitudes = (of_kl.sum() if reduction == "sum" else of_kl, *(grad.double().abs() * d for d in (of_mu, of_rho)))
    for name, a, b, c, magnitude in zip(
        ("kl", "mu", "rho"), (value, *ops._kl_normal_backward([grad], *arguments)), *results, magnitudes
    ):
        judge(f"{name}: {list(shape)} tensors {tensors} {reduction} {scale} {dtype}", a, b, c, magnitude)


def plain_linear(x, mu, rho, bias_mu, bias_rho, key, *, grad_y, grad_kl, **options):
    """What raw_linear gives, of the reference, by autograd."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (x, mu, rho, bias_mu, bias_rho)
    ]
    y, value = reference.variational_linear(*leaves, key, **options)
    outputs, grads = [], []
    for output, grad in ((y, grad_y), (value, grad_kl)):
        if output is not None and grad is not None:
            outputs.append(output)
            grads.append(grad.to(output.dtype))
    given = [leaf for leaf in leaves if leaf is not None]
    return y.detach(), value, torch.autograd.grad(outputs, given, grads, materialize_grads=True)


def linear_magnitudes(x, mu, rho, bias_mu, bias_rho, *, prior, bias_prior, scale, kl, n_samples, row_offset,
                      column_offset, grad_y, grad_kl):
    """Of y, the KL and the gradients."""
    rows = x.shape[:-1].numel() // n_samples
    inputs = x.double().abs().reshape(n_samples, rows, mu.shape[1])
    outputs = grad_y.double().abs().reshape(n_samples, rows, mu.shape[0])
    common = (scale, kl, KEY, n_samples)
    weight = sampled(
        mu, rho, prior, *common, 0, (row_offset, column_offset), outputs.mT @ inputs, grad_kl
    )
    y, value, of_bias = inputs @ weight.w.mT, weight.kl, ()
    if bias_mu is not None:
        bias = sampled(bias_mu, bias_rho, bias_prior, *common, 1, (0, row_offset), outputs.sum(1), grad_kl)
        y, value, of_bias = y + bias.w.unsqueeze(1), value + bias.kl, (bias.mu, bias.rho)
    grad_x = (outputs @ weight.w).reshape(x.shape)
    return y.reshape(*x.shape[:-1], mu.shape[0]), value, (grad_x, weight.mu, weight.rho, *of_bias)


@with_kept_noise
def check_linear(
    x,
    mu,
    rho,
    bias_mu=None,
    bias_rho=None,
    *,
    prior=Normal(0.25, 0.5),
    bias_prior=Normal(-0.5, 2.0),
    scale="softplus",
    kl="analytic",
    n_samples=1,
    row_offset=0,
    column_offset=0,
    grad_y=None,
    regime=None,
    ops=OPS,
):
    """Judges the operators' results and gradients on these arguments, in the regime that is named."""
    if regime is not None:
        expected = expected_regime(regime, x.dtype, ops, mu.numel())
        assert regime_of(x, mu, n_samples, ops) == expected, f"x {list(x.shape)}, weight {list(mu.shape)}"
    options = dict(
        prior=prior,
        bias_prior=bias_prior,
        scale=scale,
        kl=kl,
        n_samples=n_samples,
        row_offset=row_offset,
        column_offset=column_offset,
    )
    what = f"x {list(x.shape)} {x.dtype}, weight {list(mu.shape)}, bias {bias_mu is not None}, {options}, "
    what += str(mu.dtype)
    if grad_y is None:
        grad_y = random(*x.shape[:-1], mu.shape[0], dtype=x.dtype, seed=7)
    grad_kl = torch.tensor(0.3, dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)
    arguments = (x, mu, rho, bias_mu, bias_rho)
    y, value, gradients = raw_linear(
        *arguments, KEY, **options, grad_y=grad_y, grad_kl=grad_kl if kl else None, ops=ops
    )
    plain_y, plain_value, plain_gradients = plain_linear(
        *arguments, KEY, **options, grad_y=grad_y, grad_kl=grad_kl
    )
    wide = {name: cast(option, torch.float64) for name, option in options.items()}
    true_y, true_value, true_gradients = plain_linear(
        *(cast(a, torch.float64) for a in arguments),
        KEY,
        **wide,
        grad_y=grad_y.double(),
        grad_kl=grad_kl.double(),
    )
    of_y, of_kl, of_gradients = linear_magnitudes(
        *arguments, **options, grad_y=grad_y, grad_kl=grad_kl if kl else 0
    )
    judge(f"y: {what}", y, plain_y, true_y, of_y)
    if kl is None:
        assert value == 0
    else:
        judge(f"kl: {what}", value, plain_value.detach(), true_value.detach(), of_kl)
    names = ("x", "weight_mu", "weight_rho", "bias_mu", "bias_rho")[: len(of_gradients)]
    for name, *of in zip(names, gradients, plain_gradients, true_gradients, of_gradients, strict=True):
        judge(f"gradient of {name}: {what}", *of)


def overflowing(rows: int, columns: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """rho where every second element's sigma is infinite, of "exp" and "sqrt_exp" in every type; which those are."""
    rho = random(rows, columns, dtype=dtype, mean=-1.0)
    large = (torch.arange(rows * columns) % 2 == 0).reshape(rows, columns)
    rho[large] = 3e4
    return rho, large


def check_overflow(scale, outputs, inputs, batch, kl, n_samples, ops=OPS):
    """The gradients that finite gradients of y, and one of the KL, give where sigma is infinite."""
    rho, large = overflowing(outputs, inputs)
    mu, x = random(outputs, inputs, seed=1), random(n_samples * batch, inputs, seed=2)
    grad_y = random(n_samples * batch, outputs, seed=3)
    options = dict(prior=Normal(), bias_prior=Normal(), row_offset=0, column_offset=0, ops=ops)
    options |= dict(scale=scale, kl=kl, n_samples=n_samples)

    def by_rho(grad_y=grad_y, grad_kl=None):
        gradients = dict(grad_y=grad_y, grad_kl=grad_kl, need_grad_x=False)
        return raw_linear(x, mu, rho, None, None, KEY, **options, **gradients)[2][1:3]

    # The KL grows as sigma^2, what comes through the weights as sigma: the first decides.
    d_mu, d_rho = by_rho(grad_kl=torch.tensor(0.3))
    assert (d_rho[large] == math.inf).all() and d_rho[~large].isfinite().all()
    assert kl == "sampled" or d_mu.isfinite().all()
    d_rho = by_rho(grad_kl=torch.tensor(-0.3))[1]
    assert (d_rho[large] == -math.inf).all()
    # A KL of weight 0, as at the start of a warm-up, adds nothing; through the weights both signs come.
    for nothing in (None, torch.tensor(0.0)):
        d_mu, d_rho = by_rho(grad_kl=nothing)
        assert d_mu.isfinite().all() and d_rho[large].isinf().all() and d_rho[~large].isfinite().all()
        assert (d_rho == math.inf).any() and (d_rho == -math.inf).any()
    # No gradient at all, as behind an activation that an infinite input has switched off
    d_mu, d_rho = by_rho(torch.zeros_like(grad_y))
    assert (d_mu == 0).all() and (d_rho == 0).all()


def check_zero_sigma(scale, outputs, inputs, batch, kl, ops=OPS):
    """Where rho is 0 a weight has sigma 0 and is not pruned: an infinite KL, and its gradient that of -log |sigma|."""
    mu, rho = posterior(outputs, inputs)
    zero, minus, pruned = (random(outputs, inputs, seed=seed) > 1.5 for seed in (6, 7, 8))
    rho[zero], rho[minus], rho[pruned] = 0.0, -0.0, -math.inf
    zero, minus = zero & ~minus & ~pruned, minus & ~pruned
    x, grad_y = random(2 * batch, inputs, seed=2), random(2 * batch, outputs, seed=3)
    options = dict(prior=Normal(), bias_prior=Normal(), scale=scale, kl=kl, n_samples=2, ops=ops, grad_y=grad_y)
    y, value, (_, d_mu, d_rho) = raw_linear(x, mu, rho, None, None, KEY, **options, grad_kl=torch.tensor(0.3))
    assert zero.any() and minus.any() and y.isfinite().all() and d_mu.isfinite().all() and value == math.inf
    assert (d_rho[zero] == -math.inf).all() and (d_rho[minus] == math.inf).all() and d_rho[~(zero | minus)].isfinite().all()
    for nothing in (None, torch.tensor(0.0)):
        d_rho = raw_linear(x, mu, rho, None, None, KEY, **options, grad_kl=nothing)[2][2]
        assert d_rho.isfinite().all() and (scale == "identity" or (d_rho[zero | minus] == 0).all())
    rho[zero | minus] = -math.inf
    assert raw_linear(x, mu, rho, None, None, KEY, **options)[1].isfinite()
