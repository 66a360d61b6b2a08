"""A deterministic network made Bayesian after its training: the last layer alone, then all of it, by MOPED (Krishnan et al. 2020).

The means begin at the trained weights, sigmas at a share of their size; a few epochs of the ELBO follow. Compared are accuracy, NLL,
calibration, the accuracy that is left where a network answers only what it is sure of, and what a prediction costs. The images
are scikit-learn's digits (1,797 of 8 x 8), or with --data FOLDER those of MNIST.
"""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from . import digits, digits_data, images, timing
from .common import panels, save, table
from .digits import Settings

DIGITS = Settings(hidden=16, batch=64, epochs=60, draws=100)    # hidden: channels of the first convolution
MNIST = Settings(hidden=16, batch=128, epochs=3, draws=20)
EPOCHS = f"{DIGITS.epochs}, with --data {MNIST.epochs}"
AFTER = 3   # times fewer epochs of the ELBO than before the conversion
DELTA = 0.1
COLORS = {"deterministic": plotting.VERMILION, "last layer": plotting.GREEN, "all layers": plotting.BLUE}
MARKERS = {"deterministic": "s", "last layer": "^", "all layers": "o"}


def converted(model: nn.Module, layers, x: Tensor, y: Tensor, batch: int, epochs: int, label: str) -> nn.Module:
    """A copy with these layers variational, trained on; what stays deterministic stays as it is."""
    model = bf.to_variational(copy.deepcopy(model).requires_grad_(False), layers, init="moped", delta=DELTA,
                              prior=bf.Normal(0.0, 0.5))
    for parameter in (p for m in model.modules() if isinstance(m, bf.VariationalLayer) for p in m.parameters()):
        parameter.requires_grad_(True)
    digits.train(model, x, y, batch, epochs, label)
    return model


def pictures(probs: dict[str, Tensor], y: Tensor, out: str, name: str) -> str:
    left, right = panels(2, 11.0, 5.0)
    for kind, given in probs.items():
        plotting.reliability_diagram(given, y, bins=digits.BINS, label=kind, color=COLORS[kind], marker=MARKERS[kind], ax=left)
        coverage, risk = metrics.risk_coverage_curve(given, y)
        shown = coverage >= 0.3
        right.plot(coverage[shown].tolist(), risk[shown].tolist(), color=COLORS[kind], label=kind)
    right.set(xlabel="share of the digits that are answered, the surest first", ylabel="error on these", title="What rejecting is worth",
              ylim=(0, None))
    right.legend(frameon=False)
    return save(left, out, f"{name}.png")


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures",
        data: str | None = None) -> dict[str, dict[str, float]]:
    """Train, convert, train on, predict, draw, print; returns the numbers of the table."""
    name, given, settings = (("pretrained", digits_data.bundled(), DIGITS) if data is None else
                             ("pretrained_mnist", digits_data.mnist(data), MNIST))
    train_x, train_y, test_x, test_y = (tensor.to(device) for tensor in given)
    side = round(train_x.shape[1] ** 0.5)
    train_x, test_x = (x.view(-1, 1, side, side) for x in (train_x, test_x))
    epochs = epochs or settings.epochs
    after = max(1, epochs // AFTER)
    torch.manual_seed(seed)
    plain = images.network(nn.Conv2d, nn.Linear, settings.hidden, side).to(device)
    digits.train(plain, train_x, train_y, settings.batch, epochs, f"{name}, deterministic")
    models = {"deterministic": plain}
    for kind, layers in (("last layer", "last"), ("all layers", None)):
        models[kind] = converted(plain, layers, train_x, train_y, settings.batch, after, f"{name}, {kind}")
    draws = {kind: 1 if kind == "deterministic" else settings.draws for kind in models}
    probs = {kind: digits.predict(model, test_x, draws[kind], seed) for kind, model in models.items()}
    times = timing.interleaved({kind: lambda model=model, kind=kind: digits.predict(model, test_x, draws[kind], seed)
                                for kind, model in models.items()}, synchronize=timing.synchronizer(test_x.device))
    found = {kind: {**images.measure(given, test_y), "area": metrics.area_under_risk_coverage(given, test_y).item(),
                    "seconds": times[kind].median} for kind, given in probs.items()}

    def across(key: str, form: str) -> tuple:
        return tuple(format(found[kind][key], form) for kind in models)

    print(table(f"{name}: {len(test_x):,} held-out images, {epochs} epochs, then {after} of the ELBO; {settings.draws} draws", [
        ("", *models),
        ("accuracy", *across("accuracy", ".2%")),
        ("NLL", *across("nll", ".4f")),
        (f"calibration error, {digits.BINS} bins", *across("calibration", ".4f")),
        ("accuracy on the surest 90 %", *across("surest", ".2%")),
        ("area under risk and coverage", *across("area", ".5f")),
        ("a prediction of all, ms", *(f"{1e3 * found[kind]['seconds']:.1f}" for kind in models))]))
    print("figures:", pictures(probs, test_y, out, name), sep="\n  ")
    return found
