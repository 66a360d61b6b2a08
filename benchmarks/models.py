"""Whole models, each beside its deterministic twin: a training step of a ResNet-20 and of an LSTM whose layers are all variational, and
100 draws of a ResNet-20 with a variational head over one forward pass of the deterministic one; and embeddings (tables.py).

The deterministic twin has the name of the base. Of the other libraries, those that have the layers.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnn_fast as bf

from . import tables
from .measure import Case, Run, compare
from .providers import BASE, RHO, kept
from .resnet import ResNet20

BATCH, DRAWS = 128, 100
LSTM = (256, 64, 32)    # features, steps, batch


def step(model: nn.Module, kl: Callable[[nn.Module], Tensor] | None, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Case:
    """Loss, backward and a step of Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def training():
        optimiser.zero_grad()
        loss = run(model, x)
        (loss if kl is None else loss + kl(model) / 50000).backward()
        optimiser.step()

    return training


def with_kl(layer: type[nn.Module]) -> type[nn.Module]:
    """bayesian-torch's layer, whose KL is kept as `providers.kept` reads it."""
    class Layer(layer):
        def forward(self, x):
            *y, self.kl = super().forward(x)
            return y[0]

    return Layer


def networks() -> dict[str, Callable[[], tuple[nn.Module, Callable | None]]]:
    """ResNet-20s by provider, and where their KL is read."""
    def bayesian_torch():
        from bayesian_torch import layers

        return ResNet20(conv=partial(with_kl(layers.Conv2dReparameterization), posterior_rho_init=RHO),
                        linear=partial(with_kl(layers.LinearReparameterization), posterior_rho_init=RHO)), kept

    def blitz():
        from blitz.losses import kl_divergence_from_nn
        from blitz.modules import BayesianConv2d, BayesianLinear

        def conv(n_in, n_out, size, **options):
            return BayesianConv2d(n_in, n_out, (size, size), prior_sigma_1=1.0, posterior_rho_init=RHO, **options)

        return ResNet20(conv=conv, linear=partial(BayesianLinear, prior_sigma_1=1.0, posterior_rho_init=RHO)), kl_divergence_from_nn

    return {BASE: lambda: (ResNet20(), None),
            "bnn_fast": lambda: (ResNet20(conv=bf.VariationalConv2d, linear=bf.VariationalLinear), bf.kl_divergence),
            "bayesian-torch": bayesian_torch, "blitz": blitz}


class Stacked(nn.Module):
    """Recurrences one after the other, each of which gives what the next takes, alone or first of a tuple."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x if isinstance(x, Tensor) else x[0]
        return x


def recurrences(size: int) -> dict[str, Callable[[], tuple[nn.Module, Callable | None]]]:
    """Two layers of an LSTM by provider, batch first."""
    def bayesian_torch():
        from bayesian_torch.layers import LSTMReparameterization

        return Stacked(*(with_kl(LSTMReparameterization)(size, size, posterior_rho_init=RHO) for _ in range(2))), kept

    def blitz():
        from blitz.losses import kl_divergence_from_nn
        from blitz.modules import BayesianLSTM

        return Stacked(*(BayesianLSTM(size, size, prior_sigma_1=1.0, posterior_rho_init=RHO) for _ in range(2))), kl_divergence_from_nn

    return {BASE: lambda: (Stacked(nn.LSTM(size, size, 2, batch_first=True)), None),
            "bnn_fast": lambda: (Stacked(bf.VariationalLSTM(size, size, 2, batch_first=True)), bf.kl_divergence),
            "bayesian-torch": bayesian_torch, "blitz": blitz}


def makers(found: dict, run: Run, x: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Callable[[], Case]]:
    def make(name: str) -> Case:
        model, kl = found[name]()
        return step(model.to(run.device), kl, x, loss)

    return {name: partial(make, name) for name in found if name in run.providers}


def head(run: Run, x: Tensor, draws: int) -> dict[str, Callable[[], Case]]:
    """One forward pass of the deterministic network, and `predict` of that with a variational head."""
    model = ResNet20().to(run.device).eval()
    made = bf.to_variational(model, "fc", init="moped")

    @torch.no_grad()
    def once():
        return model(x)

    return {BASE: lambda: once,
            "bnn_fast": lambda: lambda: bf.predict(made, x, bf.Categorical(), n_samples=draws, seed=0, head="fc")}


def measure(run: Run, batch: int = BATCH, lstm: tuple[int, int, int] = LSTM, draws: int = DRAWS,
            of_tables: tuple[tuple[int, bool], ...] = tables.TABLES) -> dict[str, dict]:
    images = torch.randn(batch, 3, 32, 32, device=run.device)
    labels = torch.randint(10, (batch,), device=run.device)
    size, steps, rows = lstm
    series = torch.randn(rows, steps, size, device=run.device)
    return {
        f"ResNet-20, all layers, batch {batch}": compare(
            makers(networks(), run, images, lambda model, x: F.cross_entropy(model(x), labels)), run),
        f"LSTM 2 x {size}, {steps} steps, batch {rows}": compare(
            makers(recurrences(size), run, series, lambda model, x: model(x).square().mean()), run),
        f"ResNet-20, variational head, {draws} draws, batch {batch}": compare(head(run, images, draws), run),
        **tables.measure(run, of_tables),
    }
