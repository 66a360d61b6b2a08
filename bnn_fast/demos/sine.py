"""The sine of the demo bayesian_neural_networks: its data, training by the tutorial's rule, its picture."""
from __future__ import annotations

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from .common import minimise, save

DRAWS = 10
NOISE = 0.1


def data(device: str) -> tuple[Tensor, Tensor]:
    """x, y [500, 1]. The tutorial trains against the labels of iris, left over from before, by mistake."""
    x = torch.linspace(-math.pi, math.pi, 500).unsqueeze(1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1996))
    return x.to(device), (x.sin() + NOISE * noise).to(device)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> int:
    """Squared error plus KL / (step + 1), the KL averaged over the weights; keeps the parameters of the step
    with the smallest loss and returns its number.

    That is the tutorial's rule. It compares losses between which the weight of the KL has fallen, and so
    favours late steps even where the fit is no better.
    """
    counter = itertools.count()

    def objective():
        error, kl = F.mse_loss(model(x), y), bf.kl_divergence(model, "mean")
        return {"mse": error, "kl": kl, "loss": error + kl / (next(counter) + 1)}

    smallest = math.inf
    for step, parts in minimise(objective, model.parameters(), steps=steps, lr=0.01, label="sine"):
        if parts["loss"] < smallest:
            smallest, best, state = parts["loss"], step, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best


def measure(model: nn.Module, x: Tensor, y: Tensor, draws: int, seed: int) -> dict[str, float]:
    """RMSE of the mean of the draws to the sine, the share of the points within 3 sd of it, the width of
    that band."""
    prediction = bf.predict(model, x, n_samples=draws, seed=seed)
    low, high = prediction.mean - 3 * prediction.std, prediction.mean + 3 * prediction.std
    return {"rmse": metrics.rmse(prediction.mean, x.sin()).item(),
            "inside": metrics.interval_coverage(low, high, y).item(),
            "width": metrics.sharpness(low, high).item()}


def draw(model: nn.Module, x: Tensor, y: Tensor, seed: int, out: str) -> str:
    grid = torch.linspace(-3.4, 3.4, 400, device=x.device)
    prediction = bf.predict(model, grid.unsqueeze(1), n_samples=DRAWS, seed=seed)
    mean, sd = prediction.mean.squeeze(1), prediction.std.squeeze(1)
    ax = plotting.regression_band(grid, mean, mean - 3 * sd, mean + 3 * sd, data=(x.squeeze(1), y.squeeze(1)),
                                  curve=grid.sin(), label=r"mean $\pm$ 3 sd")
    lines = ax.plot(grid.cpu(), prediction.samples.squeeze(2).T.cpu(), color=plotting.DARK, linewidth=0.5,
                    zorder=1.5)
    lines[0].set_label("draws")
    ax.legend(frameon=False)
    ax.set_title(f"{DRAWS} draws. The band narrows the longer one trains, as the KL's weight falls")
    return save(ax, out, "bayesian_neural_networks_sine.png")
