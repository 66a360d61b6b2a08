"""Handwritten digits: a Bayesian classifier against its deterministic twin.

Both have the same layers, optimiser and epochs. Compared are accuracy, NLL and calibration on held-out
digits, and how unsure each is of them and of the same images with their pixels scrambled. The images are
scikit-learn's (1,797 of 8 x 8), or with --data FOLDER those of MNIST.
"""
from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from . import digits_data
from .common import Progress, elbo_parts, panels, save, step_times, table

BINS = 10      # of the confidence, equally wide
FRACTIONS = (0.0, 0.5, 0.75, 0.95, 0.98)    # of the weights removed
NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200)   # of draws, out of DRAWS, whose means are held against that of LIMIT others
DRAWS, LIMIT = 1000, 4000
ROWS = 500      # images, at most, for which that is done


class Settings(NamedTuple):
    hidden: int
    batch: int
    epochs: int
    draws: int      # of the prediction


DIGITS = Settings(hidden=256, batch=64, epochs=40, draws=100)
MNIST = Settings(hidden=400, batch=128, epochs=5, draws=10)
EPOCHS = f"{DIGITS.epochs}, with --data {MNIST.epochs}"


def network(layer, n_in: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(layer(n_in, hidden), nn.ReLU(), layer(hidden, hidden), nn.ReLU(), layer(hidden, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, batch: int, epochs: int, label: str) -> None:
    """The same for both networks: the KL of one without variational layers is 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model: expected variational layers")  # the twin has none on purpose
        elbo = bf.ELBO(model, bf.Categorical(), n_data=len(x))
    optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-3)
    with Progress(epochs * -(-len(x) // batch), label) as progress:
        for _ in range(epochs):
            for rows in torch.randperm(len(x), device=x.device).split(batch):
                optimizer.zero_grad()
                parts = elbo_parts(elbo, x[rows], y[rows])
                parts["loss"].backward()
                optimizer.step()
                progress.step(**parts)


def predict(model: nn.Module, x: Tensor, draws: int, seed: int) -> Tensor:
    """Class probabilities [N, 10], the mean over the posterior draws."""
    return bf.predict(model, x, bf.Categorical(), draws, seed).probs


def entropy(probs: Tensor) -> Tensor:
    """[N] of probs [N, C], in nats: from 0, sure, to log C, no idea."""
    return torch.special.entr(probs).sum(-1)


def measure(probs: Tensor, scrambled: Tensor, y: Tensor) -> dict[str, float]:
    return {"accuracy": (probs.argmax(-1) == y).float().mean().item(),
            "nll": metrics.nll(probs, y).item(),
            "calibration": metrics.expected_calibration_error(probs, y, BINS).item(),
            "entropy": entropy(probs).mean().item(),
            "scrambled": entropy(scrambled).mean().item()}


def pictures(probs: Tensor, twin_probs: Tensor, x: Tensor, y: Tensor, out: str, name: str) -> list[str]:
    unsure = entropy(probs).argsort(descending=True)[:24]
    side = int(x.shape[1] ** 0.5)
    titles = [f"{y[i]}, said {probs[i].argmax()} ({probs[i].max():.0%})" for i in unsure]
    grid = plotting.image_grid(x[unsure].unflatten(1, (side, side)), titles)
    grid.set_title("The held-out digits that the Bayesian network is most unsure of")
    axes = plotting.reliability_diagram(probs, y, bins=BINS, label="Bayesian")
    plotting.reliability_diagram(twin_probs, y, bins=BINS, label="deterministic twin",
                                 color=plotting.VERMILION, marker="s", ax=axes)
    axes.set_title(f"Reliability on {len(y):,} held-out digits\n"
                   "(a dot grows with the share of them in its bin)")
    return [save(grid, out, f"{name}_unsure.png"), save(axes, out, f"{name}_reliability.png")]


def pruned_errors(model: nn.Module, x: Tensor, y: Tensor, draws: int, seed: int) -> dict[float, float]:
    """Error rate with each fraction of the weights removed from a copy of the model, the lowest |mu| / sigma first."""
    errors = {}
    for fraction in FRACTIONS:
        smaller = copy.deepcopy(model)
        bf.prune(smaller, fraction)
        errors[fraction] = (predict(smaller, x, draws, seed).argmax(-1) != y).double().mean().item()
    return errors


class Convergence(NamedTuple):
    """What S draws give, against a great many."""
    error: dict[int, float]     # S: root mean square of (mean probability of S draws) - (that of LIMIT others)
    nll: dict[int, float]       # S: NLL of the mean of S draws, and of LIMIT
    picture: str


def convergence(model: nn.Module, x: Tensor, y: Tensor, seed: int, out: str, name: str) -> Convergence:
    x, y = x[:ROWS], y[:ROWS]
    probs = bf.predict(model, x, bf.Categorical(), DRAWS + LIMIT, seed).samples
    limit = probs[DRAWS:].double().mean(0)
    error, nll = {}, {}
    for number in NUMBERS:
        means = probs[:DRAWS].double().unflatten(0, (-1, number)).mean(1)    # of each `number` draws in turn
        error[number] = (means - limit).square().mean().sqrt().item()
        nll[number] = sum(metrics.nll(mean, y).item() for mean in means) / len(means)
    nll[LIMIT] = metrics.nll(limit, y).item()
    left, right = panels(2, 10.0, 4.0)
    left.loglog(NUMBERS, list(error.values()), "o", color=plotting.BLUE, label="found")
    left.loglog(NUMBERS, [error[1] / number ** 0.5 for number in NUMBERS], "--", color=plotting.DARK, linewidth=1,
                label=r"one draw's over $\sqrt{S}$")
    left.set(xlabel="draws S", ylabel="Monte Carlo error of a probability", title="The error falls with the root of S")
    left.legend(frameon=False)
    right.semilogx(NUMBERS, [nll[number] for number in NUMBERS], "o-", color=plotting.BLUE, linewidth=1)
    right.axhline(nll[LIMIT], color=plotting.DARK, linestyle="--", linewidth=1, label=f"{LIMIT:,} draws")
    right.set(xlabel="draws S", ylabel="NLL on held-out digits", title="A good score needs fewer")
    right.legend(frameon=False)
    return Convergence(error, nll, save(left, out, f"{name}_draws.png"))


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures",
        data: str | None = None) -> dict[str, dict[str, float]]:
    """Train both, predict, draw, print; returns the numbers of the table."""
    name, images, settings = (("digits", digits_data.bundled(), DIGITS) if data is None else
                              ("mnist", digits_data.mnist(data), MNIST))
    train_x, train_y, test_x, test_y = (tensor.to(device) for tensor in images)
    epochs = epochs or settings.epochs
    torch.manual_seed(seed)
    bayesian = network(bf.VariationalLinear, train_x.shape[1], settings.hidden).to(device)
    twin = network(nn.Linear, train_x.shape[1], settings.hidden).to(device)
    train(bayesian, train_x, train_y, settings.batch, epochs, f"{name}, Bayesian")
    train(twin, train_x, train_y, settings.batch, epochs, f"{name}, twin")

    # each image by a permutation of its own
    scrambled_x = test_x.gather(1, torch.rand_like(test_x).argsort(1))
    probs, scrambled = (predict(bayesian, x, settings.draws, seed) for x in (test_x, scrambled_x))
    twin_probs, twin_scrambled = (predict(twin, x, 1, seed) for x in (test_x, scrambled_x))
    a, b = measure(probs, scrambled, test_y), measure(twin_probs, twin_scrambled, test_y)

    expected = "expected: at least 96.5 %" if data is None else "expected: at least 97.4 %"
    print(table(f"{name}: {len(test_x):,} held-out images, {epochs} epochs, {settings.draws} draws", [
        ("", "Bayesian", "twin", ""),
        ("accuracy", f"{a['accuracy']:.2%}", f"{b['accuracy']:.2%}", expected),
        ("NLL", f"{a['nll']:.4f}", f"{b['nll']:.4f}", "expected: at most 1.1 times the twin's"),
        (f"calibration error, {BINS} bins", f"{a['calibration']:.4f}", f"{b['calibration']:.4f}", ""),
        ("entropy, digits", f"{a['entropy']:.3f}", f"{b['entropy']:.3f}", ""),
        ("entropy, scrambled", f"{a['scrambled']:.3f}", f"{b['scrambled']:.3f}",
         "expected: above the twin's"),
    ]))
    errors = pruned_errors(bayesian, test_x, test_y, settings.draws, seed)
    print(table(f"{name}: error with weights removed, the lowest |mu| / sigma first, {settings.draws} draws", [
        ("removed", *(f"{fraction:.0%}" for fraction in errors)), ("error", *(f"{e:.2%}" for e in errors.values()))]))
    converged = convergence(bayesian, test_x, test_y, seed, out, name)
    print(table(f"{name}: what S draws give, against {LIMIT:,}", [
        ("S", *map(str, converged.nll)),
        ("Monte Carlo error of a probability", *(f"{e:.4f}" for e in converged.error.values()), ""),
        ("NLL", *(f"{value:.4f}" for value in converged.nll.values()))]))
    rows = slice(0, settings.batch)
    print(table(f"{name}: a step with {settings.batch} images",
                step_times(bayesian, bf.Categorical(), train_x[rows], train_y[rows], len(train_x))))
    print("figures:", *pictures(probs, twin_probs, test_x, test_y, out, name),
          converged.picture, sep="\n  ")
    return {"bayesian": a, "twin": b, "pruned": errors, "convergence": converged}
