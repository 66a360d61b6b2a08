"""A training step of one layer in float32: forward, KL, backward (of x too), without an optimiser; the three
alone; and a whole training step, with Adam, of the tutorial's network on all its points.

Forward is what a step's is, with gradients on, and where a library computes its KL with it, it is in it.
Backward alone goes through one graph again and again.
"""
from __future__ import annotations

from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnn_fast.demos import bayes_by_backprop

from .measure import Case, Run, cold, compare
from .providers import Provider

# in, out, batch
SHAPES = [(1, 20, 1000), (1024, 1024, 1), (1024, 1024, 8), (512, 512, 128), (1200, 1200, 128), (2048, 2048, 32), (4096, 4096, 16),
          (2048, 2048, 1024)]
PARTS = [(512, 512, 128), (2048, 2048, 32)]
NETWORK = (1, 20, 20, 20, 20, 1)
POINTS = 16000
TUTORIAL = f"tutorial network, {POINTS} points, with Adam"


def shape_name(n_in: int, n_out: int, batch: int) -> str:
    return f"{n_in} x {n_out}, batch {batch}"


def step(model: nn.Module, kl: Callable[[nn.Module], Tensor] | None, n_in: int, n_out: int, batch: int,
         **factory) -> Case:
    """The step of a model; returns its output, which meets a fixed gradient: no loss function is timed."""
    x = torch.randn(batch, n_in, requires_grad=True, **factory)
    gradient = torch.randn(batch, n_out, **factory)

    def run():
        x.grad = None
        model.zero_grad(set_to_none=True)
        y = model(x)
        if kl is None:
            y.backward(gradient)
        else:
            torch.autograd.backward([y, kl(model)], [gradient, None])
        return y

    return run


def part(which: str, provider: Provider, n_in: int, n_out: int, batch: int, device: str) -> Case:
    model = provider.model((n_in, n_out), device=device)
    x = torch.randn(batch, n_in, requires_grad=True, device=device)
    y = model(x)
    if which == "forward":
        return lambda: model(x)
    if which == "KL":
        return lambda: provider.kl(model)
    outputs = [y, provider.kl(model)] if provider.kl else [y]
    gradients = [torch.randn_like(y), None][:len(outputs)]

    def backward():
        x.grad = None
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(outputs, gradients, retain_graph=True)

    return backward


def training(provider: Provider, device: str) -> Case:
    """The tutorial's likelihood, which believes in a noise of 0.1."""
    x = torch.linspace(-3, 3, POINTS, device=device).unsqueeze(1)
    y = bayes_by_backprop.curve(x)
    model = provider.model(NETWORK, device=device)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)

    def run():
        optimiser.zero_grad()
        loss = F.mse_loss(model(x), y) / (2 * bayes_by_backprop.LIKELIHOOD ** 2)
        if provider.kl is not None:
            loss = loss + provider.kl(model) / POINTS
        loss.backward()
        optimiser.step()

    return run


def layer(provider: Provider, shape: tuple[int, int, int], run: Run) -> Case:
    n_in, n_out, _ = shape
    return cold(lambda: step(provider.model((n_in, n_out), device=run.device), provider.kl, *shape,
                             device=run.device), 4 * n_in * n_out, run)


def measure(run: Run, shapes=SHAPES, parted=PARTS) -> dict[str, dict]:
    providers = run.providers.items()
    found = {shape_name(*shape): compare({name: partial(layer, provider, shape, run)
                                          for name, provider in providers}, run) for shape in shapes}
    found[TUTORIAL] = compare({name: partial(training, p, run.device) for name, p in providers}, run)
    for shape in parted:
        for which in ("forward", "KL", "backward"):
            found[f"{shape_name(*shape)}: {which} alone"] = compare(
                {name: partial(part, which, provider, *shape, run.device)
                 for name, provider in providers if provider.kl or which != "KL"}, run)
    return found
