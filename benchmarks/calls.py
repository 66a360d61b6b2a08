"""What a call costs beside its arithmetic: steps of networks so small that little else is left, on one thread.

A step is zero_grad, forward, KL, backward; of a network with Adam (fused) too, its loss written out or an ELBO. Beside the time
stands what a step launches. A KL is a second number to differentiate, which torch charges for: "and a number" is nn.Linear's step with one
that nothing was computed for.
"""
from __future__ import annotations

import contextlib
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

import bnn_fast as bf
from bnn_fast.operators import autograd

from . import launches
from .measure import Case, Run, compare
from .providers import BASE
from .step import shape_name, step

LAYERS = [(1, 20, 1000), (1, 20, 1), (64, 64, 32)]
DEPTH, WIDTH = 8, 20  # of a network whose step shows what each layer more costs
NETWORK, ROWS = (13, 50, 1), 32


@contextlib.contextmanager
def without_nodes():
    nodes, autograd.nodes = autograd.nodes, None
    try:
        yield
    finally:
        autograd.nodes = nodes


def network(layer: Callable[..., nn.Module]) -> nn.Sequential:
    first, hidden, last = NETWORK
    return nn.Sequential(layer(first, hidden), nn.ReLU(), layer(hidden, last))


def and_a_number(*shape: int, **factory) -> Case:
    number = torch.ones((), requires_grad=True, **factory)
    return step(nn.Linear(*shape[:2], **factory), lambda _: number, *shape, **factory)


def deep(layer: Callable[..., nn.Module]) -> nn.Sequential:
    return nn.Sequential(*[module for _ in range(DEPTH) for module in (layer(WIDTH, WIDTH), nn.ReLU())])


def training(model: nn.Module, loss: Callable, **factory) -> Case:
    x, y = torch.randn(ROWS, NETWORK[0], **factory), torch.randn(ROWS, NETWORK[-1], **factory)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def run():
        optimiser.zero_grad()
        loss(model, x, y).backward()
        optimiser.step()

    return run


def deterministic(model, x, y):
    return F.gaussian_nll_loss(model(x), y, torch.ones_like(y))


def written_out(model, x, y):
    return F.gaussian_nll_loss(model(x), y, torch.ones_like(y)) + bf.kl_divergence(model) / 1000


def elbo(elbo, x, y):
    return elbo(x, y)


def apart(make: Callable[[], Case]) -> Case:
    """A case that runs without the compiled nodes."""
    case = make()

    def run():
        with without_nodes():
            case()

    return run


def with_launches(makers: dict[str, Callable[[], Case]], run: Run) -> dict[str, dict]:
    found = compare(makers, run)
    for name, make in makers.items():
        if "error" not in found[name]:
            number = launches.count(make(), run.cuda)
            found[name]["note"] = f"{number} {'kernels' if run.cuda else 'operators'}"
    return found


def measure(run: Run) -> dict[str, dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(run)
    finally:
        torch.set_num_threads(threads)


def _measure(run: Run) -> dict[str, dict]:
    found, factory = {}, {"device": run.device}
    for shape in LAYERS:
        n_in, n_out, _ = shape
        linear = partial(step, nn.Linear(n_in, n_out, **factory), None, *shape, **factory)
        layer = partial(step, bf.VariationalLinear(n_in, n_out, **factory), bf.kl_divergence, *shape, **factory)
        makers = {BASE: linear, f"{BASE} and a number": partial(and_a_number, *shape, **factory), "bnn_fast": layer}
        if autograd.nodes is not None:
            makers["without nodes"] = partial(apart, layer)
        found[f"{shape_name(*shape)}, one thread"] = with_launches(makers, run)

    def variational(n_in, n_out):
        return bf.VariationalLinear(n_in, n_out, **factory)

    shape = (WIDTH, WIDTH, ROWS)
    makers = {BASE: lambda: step(deep(partial(nn.Linear, **factory)), None, *shape, **factory),
              "bnn_fast": lambda: step(deep(variational), bf.kl_divergence, *shape, **factory),
              "bnn_fast, Sequential": lambda: step(bf.fuse(deep(variational)), bf.kl_divergence, *shape, **factory)}
    found[f"{DEPTH} layers of {WIDTH} x {WIDTH}, batch {ROWS}, one thread"] = with_launches(makers, run)

    def whole():
        return bf.ELBO(network(variational), bf.Gaussian().to(run.device), n_data=1000)

    makers = {BASE: lambda: training(network(partial(nn.Linear, **factory)), deterministic, **factory),
              "bnn_fast, written out": lambda: training(network(variational), written_out, **factory),
              "bnn_fast, ELBO": lambda: training(whole(), elbo, **factory)}
    if autograd.nodes is not None:
        makers["ELBO without nodes"] = partial(apart, lambda: training(whole(), elbo, **factory))
    found[f"{'-'.join(map(str, NETWORK))}, batch {ROWS}, with Adam, one thread"] = with_launches(makers, run)
    return found
