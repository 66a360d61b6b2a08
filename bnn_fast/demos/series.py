"""Forecasting a noisy seasonal series with a Bayesian LSTM: the next 24 values from the last 72, with both kinds of uncertainty.

The series is made here: a trend, a season of 24 steps whose height varies, and noise that is larger in one half of the season. The
network puts out a mean and a log-variance for each of the 24 steps; the spread of its draws adds what it does not know.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from .common import elbo_parts, minimise, panels, save, table

SEASON, PAST, AHEAD = 24, 72, 24
STEPS, TRAINED = 1600, 1200     # of the series, and how many of them training sees
EPOCHS = 400                    # steps of the optimizer, on the whole of the training windows
DRAWS = 200


class Forecaster(nn.Module):
    """x [B, PAST, 1] -> [B, 2 AHEAD]: means, then log-variances. The means are those of the past seasons and what the network adds."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.lstm = bf.VariationalLSTM(1, hidden, batch_first=True)
        self.head = bf.VariationalLinear(hidden, 2 * AHEAD)

    def forward(self, x: Tensor) -> Tensor:
        added, log_variances = self.head(self.lstm(x)[0][:, -1]).chunk(2, -1)
        return torch.cat([x.view(len(x), -1, SEASON).mean(1) + added, log_variances], -1)


def series(seed: int) -> Tensor:
    """[STEPS], of mean about 0 and size about 1."""
    t, noise = torch.arange(STEPS), torch.randn(STEPS, generator=torch.Generator().manual_seed(seed))
    phase = 2 * math.pi * t / SEASON
    height = 1.0 + 0.3 * torch.sin(2 * math.pi * t / 300)
    return 0.5 * (t / STEPS - 0.5) + height * (torch.sin(phase) + 0.3 * torch.sin(2 * phase)) + (0.1 + 0.2 * (phase.sin() > 0)) * noise


def windows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(past [N, PAST, 1], what follows [N, AHEAD])."""
    both = values.unfold(0, PAST + AHEAD, 1)
    return both[:, :PAST].unsqueeze(-1).contiguous(), both[:, PAST:].contiguous()


def picture(prediction, y: Tensor, out: str) -> str:
    left, right = panels(2, 12.0, 4.5)
    shown = slice(0, 8 * AHEAD, AHEAD)      # forecasts that follow each other
    low, high = (bound[shown].flatten() for bound in prediction.interval(0.9))
    x = torch.arange(len(low))
    plotting.regression_band(x, prediction.mean[shown].flatten(), low, high, data=(x, y[shown].flatten()), label="90 % band", ax=left)
    left.set(xlabel="step of the held-out series", ylabel="value", title=f"Forecasts of {AHEAD} steps, one after the other")
    ahead = range(1, AHEAD + 1)
    for variance, label, color in ((prediction.epistemic, "not knowing (the draws' spread)", plotting.BLUE),
                                   (prediction.aleatoric, "noise", plotting.ORANGE)):
        right.plot(ahead, variance.mean(0).sqrt().tolist(), color=color, label=label)
    right.set(xlabel="steps ahead", ylabel="standard deviation", title="The two parts of the uncertainty", ylim=(0, None))
    right.legend(frameon=False)
    return save(left, out, "series.png")


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures") -> dict[str, float]:
    """Train, predict, draw, print; returns the numbers of the table."""
    values = series(1996).to(device)
    (train_x, train_y), (test_x, test_y) = windows(values[:TRAINED]), windows(values[TRAINED - PAST:])
    torch.manual_seed(seed)
    model = Forecaster().to(device)
    elbo = bf.ELBO(model, bf.HeteroscedasticGaussian(), len(train_x), kl_weight=bf.linear_warmup(200))
    for _ in minimise(lambda: elbo_parts(elbo, *batch(train_x, train_y)), elbo.parameters(), steps=epochs or EPOCHS, lr=0.01,
                      label="series", decay=True):
        pass
    prediction = bf.predict(model, test_x, elbo.likelihood, n_samples=DRAWS, seed=seed)
    seasonal = test_x[:, PAST - SEASON:, 0]     # the forecast of who repeats the last season
    low, high = prediction.interval(0.9)
    found = {"rmse": metrics.rmse(prediction.mean, test_y).item(), "seasonal": metrics.rmse(seasonal, test_y).item(),
             "coverage": metrics.interval_coverage(low, high, test_y).item(), "width": metrics.sharpness(low, high).item(),
             "nll": metrics.nll(prediction, test_y).item() / AHEAD}
    print(table(f"series: {len(test_x)} held-out forecasts of {AHEAD} steps, {DRAWS} draws", [
        ("RMSE", f"{found['rmse']:.3f}", f"repeating the last season: {found['seasonal']:.3f}"),
        ("share inside the 90 % band", f"{found['coverage']:.1%}", "expected: 80 to 95 %"),
        ("mean width of the band", f"{found['width']:.3f}", ""),
        ("NLL a step", f"{found['nll']:.3f}", ""),
        ("standard deviation, not knowing", f"{prediction.epistemic.mean().sqrt():.3f}", ""),
        ("standard deviation, noise", f"{prediction.aleatoric.mean().sqrt():.3f}", "")]))
    print("figures:", picture(prediction, test_y, out), sep="\n  ")
    return found


def batch(x: Tensor, y: Tensor, size: int = 64) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(x), (size,), device=x.device)
    return x[rows], y[rows]
