"""Bayes by Backprop (Blundell et al., "Weight Uncertainty in Neural Networks", 2015) on one input.

The well-known tutorial: five variational layers learn a cubic from 20,000 noisy points, with a likelihood far
narrower than the noise. Prints the losses, draws the predictive band, and says how well it holds the curve.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import plotting

from .common import Progress, draws_by_piece, save, step_times, table

EPOCHS = 5000
NOISE = 1.5         # standard deviation of the noise in the data
LIKELIHOOD = 0.1    # and the one that the likelihood believes in
DRAWS = 1000


def curve(x):
    return 0.2 * x ** 3 - 2 * x ** 3 + 8 * x


def data(points: int, device: str) -> list[Tensor]:
    """x of training [0.8 points, 1] and validation [0.2 points, 1], then y of both."""
    from sklearn.model_selection import train_test_split

    x = np.linspace(-3.0, 3.0, points)
    y = curve(x) + np.random.default_rng(1996).normal(0.0, NOISE, points)
    return [torch.tensor(part, dtype=torch.float32, device=device).unsqueeze(1)
            for part in train_test_split(x, y, test_size=0.2, random_state=1996)]


def network() -> nn.Sequential:
    layers = []
    for n_in, n_out in ((1, 20), (20, 20), (20, 20), (20, 20), (20, 1)):
        layer = bf.VariationalLinear(n_in, n_out, prior=bf.Normal(0.0, 1.0), kl="sampled", init="tutorial")
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(elbo: bf.ELBO, train_x, train_y, validation_x, validation_y, epochs: int) -> None:
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
    with Progress(epochs, "bayes_by_backprop") as progress:
        for epoch in range(1, epochs + 1):
            optimizer.zero_grad()
            loss = elbo(train_x, train_y)
            loss.backward()
            optimizer.step()
            progress.step(loss, elbo)
            if epoch % 500 == 0 or epoch == epochs:
                # The tutorial adds the validation forward's KL to its training loss by mistake: its layers
                # sum up the KL of every forward until the next training loss. Here each call has its own.
                with torch.no_grad():
                    validation = elbo(validation_x, validation_y)
                progress.say(f"epoch {epoch:5d}   loss a point: training {loss.item():9.2f}, "
                             f"validation {validation.item():9.2f}")


def predict(model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 5 % and 95 % quantiles [N] of the network's output over 1,000 posterior draws."""
    quantiles = torch.tensor([0.05, 0.95], device=x.device)
    pieces = [(draws.mean(0), *draws.quantile(quantiles, dim=0))
              for draws in draws_by_piece(model, x, DRAWS, seed, rows=500)]
    mean, low, high = (torch.cat(parts).squeeze(1) for parts in zip(*pieces))
    return mean, low, high


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures",
        points: int = 20000) -> dict[str, float]:
    """Train, predict, draw, print; returns the numbers of the table."""
    torch.manual_seed(seed)
    train_x, validation_x, train_y, validation_y = data(points, device)
    model = network().to(device)
    # Bayes by Backprop minimises the NLL summed over the points, plus the KL. ELBO is that divided by the
    # number of points, which Adam does not notice.
    elbo = bf.ELBO(model, bf.Gaussian(LIKELIHOOD), n_data=len(train_x)).to(device)
    train(elbo, train_x, train_y, validation_x, validation_y, epochs or EPOCHS)

    figures = []
    for name, x, y in (("training", train_x, train_y), ("validation", validation_x, validation_y)):
        x, y = x.squeeze(1), y.squeeze(1)
        mean, low, high = predict(model, x.unsqueeze(1), seed)
        axes = plotting.regression_band(x, mean, low, high, data=(x, y), curve=curve(x))
        axes.set_title(f"Bayes by Backprop: {DRAWS:,} posterior draws on the {name} points")
        figures.append(save(axes, out, f"bayes_by_backprop_{name}.png"))

    # of the validation points, the last ones predicted
    truth = curve(x)
    results = {"rmse": (mean - truth).square().mean().sqrt().item(),
               "curve_inside": ((low <= truth) & (truth <= high)).float().mean().item(),
               "points_inside": ((low <= y) & (y <= high)).float().mean().item()}
    print(table(f"Bayes by Backprop, {len(x):,} validation points, {DRAWS:,} draws", [
        ("RMSE of the mean to the curve", f"{results['rmse']:.3f}", "expected: at most 0.8"),
        ("share of the curve inside the 5-95 % band", f"{results['curve_inside']:.1%}",
         "expected: at least 80 %"),
        ("share of the noisy points inside it", f"{results['points_inside']:.1%}", "low, see below"),
        *step_times(model, elbo.likelihood, train_x, train_y, len(train_x))]))
    print("Few noisy points are inside: the likelihood takes the noise to be "
          f"{LIKELIHOOD} where it is {NOISE}, so the network\nis far too sure; "
          "and the band is that of its output without noise: it says where the curve is, not a new point.")
    print("figures:", *figures, sep="\n  ")
    return results
