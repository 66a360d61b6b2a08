"""Bayes by Backprop (Blundell et al., "Weight Uncertainty in Neural Networks", 2015) on one input.

The well-known tutorial: five variational layers learn a cubic from 20,000 noisy points, with a likelihood far
narrower than the noise. Prints the losses, draws the predictive band, and says how well it holds the curve.
"""
from __future__ import annotations

import torch
from torch import nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from .common import elbo_parts, minimise, perceptron, save, say, step_times, table
from .cubic import NOISE, curve, data

EPOCHS = 5000
LIKELIHOOD = 0.1    # standard deviation of the noise that the likelihood believes in
DRAWS = 1000


def network() -> nn.Sequential:
    return perceptron(1, 20, 20, 20, 20, 1, layer=lambda n_in, n_out: bf.VariationalLinear(
        n_in, n_out, prior=bf.Normal(0.0, 1.0), kl="sampled", init="tutorial"))


def train(elbo: bf.ELBO, train_x, train_y, validation_x, validation_y, epochs: int) -> None:
    for epoch, parts in minimise(lambda: elbo_parts(elbo, train_x, train_y), elbo.parameters(),
                                 steps=epochs, lr=0.01, label="bayes_by_backprop"):
        if epoch % 500 == 0 or epoch == epochs:
            # The tutorial adds the validation forward's KL to its training loss by mistake: its layers
            # sum up the KL of every forward until the next training loss. Here each call has its own.
            with torch.no_grad():
                validation = elbo(validation_x, validation_y)
            say(f"epoch {epoch:5d}   loss a point: training {parts['loss'].item():9.2f}, "
                f"validation {validation.item():9.2f}")


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
        prediction = bf.predict(model, x, n_samples=DRAWS, seed=seed)
        mean, low, high = (values.squeeze(1) for values in (prediction.mean, *prediction.interval(0.9)))
        x, y = x.squeeze(1), y.squeeze(1)
        axes = plotting.regression_band(x, mean, low, high, data=(x, y), curve=curve(x))
        axes.set_title(f"Bayes by Backprop: {DRAWS:,} posterior draws on the {name} points\n"
                       f"(noise {NOISE}; the likelihood believes in {LIKELIHOOD}, the band shows none)")
        figures.append(save(axes, out, f"bayes_by_backprop_{name}.png"))

    # of the validation points, the last ones predicted
    truth = curve(x)
    results = {"rmse": metrics.rmse(mean, truth).item(),
               "curve_inside": metrics.interval_coverage(low, high, truth).item(),
               "points_inside": metrics.interval_coverage(low, high, y).item()}
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
