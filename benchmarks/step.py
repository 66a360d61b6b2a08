"""A training step of one layer in float32: forward, KL, backward (of x too); the optimiser is not in it."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast.demos.plain import PlainLinear
from bnn_fast.demos.timing import Times, interleaved

# in, out, batch
SHAPES = [(1, 20, 1000), (512, 512, 128), (1200, 1200, 128), (2048, 2048, 32), (4096, 4096, 16)]


def candidates(n_in: int, n_out: int, **factory) -> dict[str, tuple[nn.Module, Callable[[], Tensor] | None]]:
    """(layer, its KL after a call) by name. factory: device and dtype."""
    fused = bf.VariationalLinear(n_in, n_out, **factory)
    linear, plain = nn.Linear(n_in, n_out, **factory), PlainLinear(fused)
    return {"nn.Linear": (linear, None),
            "VariationalLinear": (fused, lambda: bf.kl_divergence(fused)),
            "plain PyTorch": (plain, lambda: plain.kl)}


def step(layer: nn.Module, kl: Callable[[], Tensor] | None, n_in: int, n_out: int, batch: int,
         **factory) -> Callable[[], None]:
    """The step of layer. Its output meets a fixed gradient, so that no loss function is timed."""
    x = torch.randn(batch, n_in, requires_grad=True, **factory)
    gradient = torch.randn(batch, n_out, **factory)

    def run():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        if kl is None:
            y.backward(gradient)
        else:
            torch.autograd.backward([y, kl()], [gradient, None])

    return run


def measure(shapes=SHAPES, seconds: float = 5.0) -> dict[str, dict[str, Times]]:
    return {f"{n_in} x {n_out}, batch {batch}": interleaved(
        {name: step(layer, kl, n_in, n_out, batch) for name, (layer, kl) in candidates(n_in, n_out).items()},
        seconds) for n_in, n_out, batch in shapes}
