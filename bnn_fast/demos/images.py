"""A small convolutional network on handwritten digits: Bayesian against its deterministic twin.

Compared are accuracy, NLL and calibration on held-out digits, and the accuracy that is left where a network answers only for the
share of them that it is surest of. The images are scikit-learn's (1,797 of 8 x 8), or with --data FOLDER those of MNIST.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from . import digits, digits_data
from .common import panels, save, table
from .digits import Settings

DIGITS = Settings(hidden=32, batch=64, epochs=60, draws=100)    # hidden: channels of the first convolution
MNIST = Settings(hidden=16, batch=128, epochs=3, draws=20)
EPOCHS = f"{DIGITS.epochs}, with --data {MNIST.epochs}"
COVERAGES = torch.linspace(0.3, 1.0, 29)


def network(convolution, linear, channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(convolution(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         convolution(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         linear(2 * channels * (side // 4) ** 2, 10))


def pictures(probs: Tensor, twin_probs: Tensor, y: Tensor, out: str, name: str) -> str:
    left, right = panels(2, 10.0, 5.0)
    plotting.reliability_diagram(probs, y, bins=digits.BINS, label="Bayesian", ax=left)
    plotting.reliability_diagram(twin_probs, y, bins=digits.BINS, label="deterministic twin", color=plotting.VERMILION, marker="s",
                                 ax=left)
    for given, label, color in ((probs, "Bayesian", plotting.BLUE), (twin_probs, "deterministic twin", plotting.VERMILION)):
        errors = [1 - metrics.selective_accuracy(given, y, c.item()).item() for c in COVERAGES]
        right.plot(COVERAGES.tolist(), errors, color=color, label=label)
    right.set(xlabel="share of the digits that are answered, the surest first", ylabel="error on these",
              title="What doubting is worth", ylim=(0, None))
    right.legend(frameon=False)
    return save(left, out, f"{name}.png")


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures",
        data: str | None = None) -> dict[str, dict[str, float]]:
    """Train both, predict, draw, print; returns the numbers of the table."""
    name, images, settings = (("images", digits_data.bundled(), DIGITS) if data is None else
                              ("images_mnist", digits_data.mnist(data), MNIST))
    train_x, train_y, test_x, test_y = (tensor.to(device) for tensor in images)
    side = round(train_x.shape[1] ** 0.5)
    train_x, test_x = (x.view(-1, 1, side, side) for x in (train_x, test_x))
    epochs = epochs or settings.epochs
    torch.manual_seed(seed)
    bayesian = network(bf.VariationalConv2d, bf.VariationalLinear, settings.hidden, side).to(device)
    twin = network(nn.Conv2d, nn.Linear, settings.hidden, side).to(device)
    digits.train(bayesian, train_x, train_y, settings.batch, epochs, f"{name}, Bayesian")
    digits.train(twin, train_x, train_y, settings.batch, epochs, f"{name}, twin")
    probs, twin_probs = (digits.predict(model, test_x, draws, seed) for model, draws in ((bayesian, settings.draws), (twin, 1)))
    found = {"bayesian": measure(probs, test_y), "twin": measure(twin_probs, test_y)}
    a, b = found["bayesian"], found["twin"]
    print(table(f"{name}: {len(test_x):,} held-out images, {epochs} epochs, {settings.draws} draws", [
        ("", "Bayesian", "twin"),
        ("accuracy", f"{a['accuracy']:.2%}", f"{b['accuracy']:.2%}"),
        ("NLL", f"{a['nll']:.4f}", f"{b['nll']:.4f}"),
        (f"calibration error, {digits.BINS} bins", f"{a['calibration']:.4f}", f"{b['calibration']:.4f}"),
        ("accuracy on the surest 90 %", f"{a['surest']:.2%}", f"{b['surest']:.2%}")]))
    print("figures:", pictures(probs, twin_probs, test_y, out, name), sep="\n  ")
    return found


def measure(probs: Tensor, y: Tensor) -> dict[str, float]:
    return {"accuracy": (probs.argmax(-1) == y).float().mean().item(), "nll": metrics.nll(probs, y).item(),
            "calibration": metrics.expected_calibration_error(probs, y, digits.BINS).item(),
            "surest": metrics.selective_accuracy(probs, y, 0.9).item()}
