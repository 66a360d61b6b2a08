"""A chain of linear layers for the tests of its operators, and the reference that these are held against."""
from __future__ import annotations

import torch
from judging import judge
from kernels import random

from bnn_fast import Normal, checks
from bnn_fast.operators import arguments as packing
from bnn_fast.operators import reference

NUMBERS = {"leaky_relu": (0.2,), "elu": (0.7,), "softplus": (1.5, 2.0)}


def links_of(sizes, fixed=(), without_bias=(), activation="relu", dtype=torch.float32, tensors=False, last=False) -> list[packing.Link]:
    links = []
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        shapes = [(outputs, inputs)] + [(outputs,)] * (i not in without_bias)
        behind = activation if i + 2 < len(sizes) or last else "identity"
        numbers = (*map(float, NUMBERS.get(behind, ())), 0.0, 0.0)[:2]
        code = checks.ACTIVATIONS[behind], *numbers
        sd = max(inputs, 1) ** -0.5
        own = [random(*shape, dtype=dtype, seed=7 * i + k, sd=sd) for k, shape in enumerate(shapes)]
        if i in fixed:
            links.append(packing.Link(own, None, None, code))
            continue
        pairs = [t for k, mu in enumerate(own) for t in (mu, random(*mu.shape, dtype=dtype, seed=50 + 7 * i + k, mean=-2.0))]
        priors = [_prior(mu, (i + k) % 3) if tensors else Normal(0.1, 1.5) for k, mu in enumerate(own)]
        key = torch.tensor([1234567 + i, 5])
        links.append(packing.Link(pairs, key, packing.pack_priors(*priors), code))
    return links


def _prior(mu, kind):
    """loc, scale or both of them tensors."""
    loc, scale = random(*mu.shape, dtype=mu.dtype, seed=4), random(*mu.shape, dtype=mu.dtype, seed=5).abs() + 0.5
    return Normal(loc if kind != 1 else 0.1, scale if kind != 0 else 1.5)


def in_dtype(links, dtype):
    """Detached, in another type, with gradients wanted."""
    to = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
    return [link._replace(tensors=[to(t) for t in link.tensors], prior=link.prior and link.prior._replace(
        tensors=[t.to(dtype) for t in link.prior.tensors])) for link in links]


def plain(x, links, kl, samples, shared, scale="softplus"):
    y, value = reference.variational_chain(x, links, scale=scale, kl=kl, n_samples=samples, shared=shared)
    return y, torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32)) if value is None else value


def gradients(y, dtype):
    """Of y and the KL."""
    return random(*y.shape, seed=3, dtype=dtype), 0.3


def all_of(run, x, links, dtype, *options):
    """[y, KL, gradients of x and of all tensors]"""
    x, links = x.detach().to(dtype).requires_grad_(), in_dtype(links, dtype)
    y, kl = run(x, links, *options)
    grad_y, grad_kl = gradients(y, dtype)
    inputs = [x, *(t for link in links for t in link.tensors)]
    found = torch.autograd.grad((y * grad_y).sum() + grad_kl * kl, inputs, allow_unused=True)
    return [y, kl, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found))]


def compare(results, shape, activation="relu", kl="analytic", dtype=torch.float32, **options):
    """results(x, links, kl, samples, shared) as all_of gives them; shape: sizes, rows, samples, shared, which layers are not drawn, which
    have no bias.
    """
    sizes, rows, samples, shared, fixed, without = shape
    links = links_of(sizes, fixed, without, activation, dtype, **options)
    x = random(rows if shared else samples * rows, sizes[0], dtype=dtype, seed=9)
    got = results(x, links, kl, samples, shared)
    own, truth = (all_of(plain, x, links, of, kl, samples, shared) for of in (dtype, torch.float64))
    names = ["y", "kl", "grad x", *(f"grad {i}" for i in range(len(got) - 3))]
    for name, *three in zip(names, got, own, truth):
        largest = three[-1].abs().max() if three[-1].numel() else 0
        judge(f"{sizes} {activation} {name} {str(dtype)[6:]}", *three, largest + 1)
