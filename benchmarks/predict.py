"""S posterior draws of the output, without gradients: bnn_fast in one call, the others in S calls, since they
have none for several; nn.Linear in S calls too, as many as an ensemble of so many networks would take."""
from __future__ import annotations

from functools import partial

import torch

import bnn_fast as bf

from .measure import Case, Run, compare
from .providers import Provider
from .step import NETWORK

# sizes of the network, batch, draws
SETTINGS = [(NETWORK, 1000, 100), ((512, 512), 128, 16), ((2048, 2048), 32, 4)]


def draws(provider: Provider, sizes: tuple[int, ...], batch: int, samples: int, device: str) -> Case:
    model = provider.model(sizes, device=device)
    x = torch.randn(batch, sizes[0], device=device)

    @torch.no_grad()
    def run():
        if provider.kl is bf.kl_divergence:
            return bf.mc_forward(model, x, samples)
        return torch.stack([model(x) for _ in range(samples)])

    return run


def measure(run: Run, settings=SETTINGS) -> dict[str, dict]:
    return {f"{'-'.join(map(str, sizes))}, batch {batch}, {samples} draws": compare(
        {name: partial(draws, provider, sizes, batch, samples, run.device)
         for name, provider in run.providers.items()}, run) for sizes, batch, samples in settings}
