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


def step(layer: nn.Module, kl: Callable[[], Tensor] | None, n_in: int, n_out: int, batch: int) -> Callable:
    """The step of layer. Its output meets a fixed gradient, so that no loss function is timed."""
    x, gradient = torch.randn(batch, n_in, requires_grad=True), torch.randn(batch, n_out)

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
    times = {}
    for n_in, n_out, batch in shapes:
        fused = bf.VariationalLinear(n_in, n_out)
        linear, plain = nn.Linear(n_in, n_out), PlainLinear(fused)
        times[f"{n_in} x {n_out}, batch {batch}"] = interleaved({
            name: step(layer, kl, n_in, n_out, batch) for name, layer, kl in (
                ("nn.Linear", linear, None),
                ("VariationalLinear", fused, lambda layer=fused: bf.kl_divergence(layer)),
                ("plain PyTorch", plain, lambda layer=plain: layer.kl))}, seconds)
    return times
