"""Whole networks with ReLU between their layers: a training step (zero_grad, forward, KL, backward, fused Adam) over that of the
deterministic network, ours by `ELBO`; a step with several draws over a step with one; and predictions from many draws, ours by
`predict`, against S calls of the plain network and of the deterministic one, as an ensemble of so many would take them.

A network of one output has a Gaussian likelihood, the deterministic one's being the mean squared error; others are classifiers.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnn_fast as bf

from .measure import Case, Run, compare
from .providers import Provider
from .step import NETWORK, POINTS

Sizes = tuple[int, ...]
SMALL, MIDDLE, LARGE = (13, 50, 1), (64, 256, 256, 10), (784, 400, 400, 10)
STEPS = [(SMALL, 32), (NETWORK, 128), (NETWORK, POINTS), (MIDDLE, 64), (LARGE, 128)]
SEVERAL = [(SMALL, 32), (MIDDLE, 64), (LARGE, 128)]
DRAWS = (10, 32)
PREDICTIONS = [(NETWORK, POINTS, 1000), (NETWORK, 100, 1000), (MIDDLE, 450, 100), (LARGE, 1000, 100), (LARGE, 1, 100)]
PREDICTED = ("nn.Linear", "bnn_fast", "plain PyTorch")    # loops of all would take an hour
ONE = "1 draw"
N_DATA = 50000


def data(sizes: Sizes, batch: int, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, sizes[0], device=device)
    if sizes[-1] == 1:
        return x, torch.randn(batch, 1, device=device)
    return x, torch.randint(sizes[-1], (batch,), device=device)


def likelihood(sizes: Sizes) -> nn.Module:
    return bf.Gaussian() if sizes[-1] == 1 else bf.Categorical()


def step(provider: Provider, sizes: Sizes, batch: int, device: str, draws: int = 1) -> Case:
    """draws: of ours, in one call."""
    model, (x, y) = provider.model(sizes, device=device), data(sizes, batch, device)
    if provider.kl is bf.kl_divergence:
        elbo = bf.ELBO(model, likelihood(sizes), N_DATA).to(device)
        loss = partial(elbo, x, y, n_samples=draws)
    else:
        nll = F.mse_loss if sizes[-1] == 1 else F.cross_entropy

        def loss():
            found = nll(model(x), y)
            return found if provider.kl is None else found + provider.kl(model) / N_DATA

    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=device == "cuda")

    def run():
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return run


def prediction(provider: Provider, sizes: Sizes, batch: int, draws: int, device: str) -> Case:
    model, (x, _) = provider.model(sizes, device=device), data(sizes, batch, device)
    if provider.kl is bf.kl_divergence:
        return partial(bf.predict, model, x, likelihood(sizes).to(device), n_samples=draws)

    @torch.no_grad()
    def run():
        outputs = torch.stack([model(x) for _ in range(draws)])
        return (outputs.mean(0), outputs.std(0)) if sizes[-1] == 1 else outputs.softmax(-1).mean(0)

    return run


def several(run: Run, sizes: Sizes, batch: int, draws: tuple[int, ...]) -> dict[str, dict]:
    provider = run.providers["bnn_fast"]
    cases = {ONE: 1, **{f"{n} draws": n for n in draws}}
    return compare({name: partial(step, provider, sizes, batch, run.device, n) for name, n in cases.items()}, run, base=ONE)


def name_of(sizes: Sizes, batch: int) -> str:
    return f"{'-'.join(map(str, sizes))}, batch {batch}"


def measure(run: Run, steps=STEPS, more=SEVERAL, draws=DRAWS, predictions=PREDICTIONS) -> dict[str, dict]:
    providers = run.providers.items()
    found = {name_of(sizes, batch): compare({name: partial(step, p, sizes, batch, run.device) for name, p in providers}, run)
             for sizes, batch in steps}
    if "bnn_fast" in run.providers:
        found |= {f"{name_of(sizes, batch)}: draws a step, over one draw's": several(run, sizes, batch, draws)
                  for sizes, batch in more}
    return found | {f"{name_of(sizes, batch)}: predict, {n} draws": compare(
        {name: partial(prediction, p, sizes, batch, n, run.device) for name, p in run.only(PREDICTED).providers.items()}, run)
        for sizes, batch, n in predictions}
