"""Peak extra memory of a step with S draws: one call of bnn_fast, S calls of the others before one backward.

With one draw it is what `step` says beside the times. No times are taken here.
"""
from __future__ import annotations

from functools import partial

import torch

import bnn_fast as bf

from .measure import Case, Run, watch
from .providers import Provider
from .step import shape_name

# in, out, batch
SHAPES = [(512, 512, 128), (2048, 2048, 32)]
DRAWS = (1, 4, 16)


def step(provider: Provider, n_in: int, n_out: int, batch: int, samples: int, device: str) -> Case:
    model = provider.model((n_in, n_out), device=device)
    x = torch.randn(batch, n_in, requires_grad=True, device=device)

    def forward():
        if provider.kl is bf.kl_divergence:
            return bf.mc_forward(model, x, samples), provider.kl(model)
        ys, kls = zip(*((model(x), provider.kl(model) if provider.kl else 0.0) for _ in range(samples)))
        return torch.stack(ys), sum(kls) / samples

    def run():
        x.grad = None
        model.zero_grad(set_to_none=True)
        y, kl = forward()
        (y.sum() + kl).backward()
        return y

    return run


def measure(run: Run, shapes=SHAPES, draws=DRAWS) -> dict[str, dict]:
    return {f"{shape_name(*shape)}, {samples} draws": watch(
        {name: partial(step, provider, *shape, samples, run.device)
         for name, provider in run.providers.items()}, run)[0] for shape in shapes for samples in draws}
