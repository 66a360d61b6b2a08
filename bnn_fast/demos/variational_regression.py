"""Regression with uncertainty in the output, by three losses on the same noisy cubic.

Maximum likelihood with a network of one output; the tutorial's variational regression, with networks for the
mean and the log-variance of y and a prior on y; and a network of variational layers, with a prior on its
weights and learned noise. Only the last one's 90 % band holds about 90 % of the validation points.

--epochs counts those of the tutorial's variational regression; maximum likelihood takes ten times as many,
the variational layers twice as many.
"""
from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import metrics, plotting

from .common import elbo_parts, minimise, panels, perceptron, save, table
from .cubic import NOISE, curve, data

EPOCHS = 1000
DRAWS = 1000


class PriorOnY(nn.Module):
    """q(y | x) = N(mean(x), exp(log_variance(x))), learned with a Gaussian prior over y itself.

    The loss is that of the tutorial, -(log p(y | mean, var) + log p(z) - log q(z | mean, var)) with z drawn
    from q. In its expectation the two log-variances cancel, and what is left pulls the mean towards the
    prior's and is least at  var = prior sd * sqrt(noise^2 + (mean - curve)^2)  instead of noise^2.
    """

    def __init__(self, train_y: Tensor):
        super().__init__()
        self.mean, self.log_variance = (perceptron(1, 40, 20, 10, 1) for _ in range(2))
        self.register_buffer("prior_mean", train_y.mean())
        self.register_buffer("prior_variance", train_y.var())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.log_variance(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = self(x)
        variance, drawn = log_variance.exp(), draw(mean, log_variance)[0]
        return (gaussian_nll(y, mean, variance) + gaussian_nll(drawn, self.prior_mean, self.prior_variance)
                - gaussian_nll(drawn, mean, variance))


def draw(mean: Tensor, log_variance: Tensor, n_samples: int = 1) -> Tensor:
    """[n_samples, B, 1] of N(mean, exp(log_variance)), with gradients for both [B, 1]."""
    sd = (log_variance / 2).exp() + 1e-5
    return mean + sd * torch.randn(n_samples, *mean.shape, dtype=mean.dtype, device=mean.device)


def gaussian_nll(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-log N(y; mean, variance), the mean over the points."""
    return F.gaussian_nll_loss(mean.expand_as(y), y, variance.expand_as(y), full=True)


def fit(objective: Callable[[Tensor, Tensor], dict[str, Tensor]], parameters, points: list[Tensor], *,
        epochs: int, lr: float, label: str, decay: bool = False) -> Tensor:
    """Minimise objective(x, y)["loss"] on the training points; [3, <= 200] of epoch, training and validation
    loss."""
    train_x, validation_x, train_y, validation_y = points
    losses = []
    for epoch, parts in minimise(lambda: objective(train_x, train_y), parameters, steps=epochs, lr=lr,
                                 label=label, decay=decay):
        if epoch % -(-epochs // 200) == 0:
            with torch.no_grad():
                validation = objective(validation_x, validation_y)["loss"]
            losses.append((epoch, parts["loss"].item(), validation.item()))
    return torch.tensor(losses).T


def slope(mean: Tensor, truth: Tensor) -> float:
    """Of the least-squares line through (truth, mean): 1 where the mean is the curve."""
    centred = truth - truth.mean()
    return ((centred * mean).sum() / centred.square().sum()).item()


def draw_losses(losses: dict[str, Tensor], out: str) -> str:
    axes = panels(3, 13.0, 4.0)
    for ax, (title, (epoch, training, validation)) in zip(axes, losses.items()):
        ax.plot(epoch, training, color=plotting.BLUE, label="training")
        ax.plot(epoch, validation, color=plotting.ORANGE, linestyle="--", label="validation")
        ax.set(xlabel="epoch", ylabel="loss a point", yscale="log", title=title)
        ax.set_yticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    return save(axes[0], out, "variational_regression_losses.png")


def draw_fit(x: Tensor, y: Tensor, fitted: Tensor, out: str) -> str:
    ax = panels(1, 8.0, 5.0)
    order = x.argsort()
    ax.scatter(x.cpu(), y.cpu(), s=3, color=plotting.GREY, linewidths=0, label="validation points")
    ax.plot(x[order].cpu(), fitted[order].cpu(), color=plotting.BLUE, label="maximum likelihood")
    ax.plot(x[order].cpu(), curve(x)[order].cpu(), color="black", linewidth=1.0, linestyle=(0, (4, 3)),
            label="curve without noise")
    ax.set(xlabel="x", ylabel="y", title="Maximum likelihood: a curve, no word of how far points lie from it")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, markerscale=4)
    return save(ax, out, "variational_regression_fit.png")


def draw_quantiles(x: Tensor, y: Tensor, bands: dict[str, tuple[Tensor, ...]], out: str) -> str:
    axes = panels(len(bands), 13.0, 5.5)
    for ax, (title, (low, median, high)) in zip(axes, bands.items()):
        plotting.regression_band(x, median, low, high, data=(x, y), curve=curve(x), ax=ax)
        ax.lines[0].set_label("median")  # drawn where the band usually has its mean
        ax.legend(frameon=False, markerscale=2)
        ax.set_title(title)
        ax.sharey(axes[0])
    return save(axes[0], out, "variational_regression_quantiles.png")


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures",
        points: int = 10000) -> dict[str, dict[str, float]]:
    """Train all three, draw, print; returns the numbers of the table."""
    torch.manual_seed(seed)
    split = data(points, device)
    train_x, x, train_y, y = split
    epochs = epochs or EPOCHS
    fitted = perceptron(1, 20, 1).to(device)
    prior_on_y = PriorOnY(train_y).to(device)
    network = perceptron(1, 20, 20, 1, layer=bf.VariationalLinear)
    elbo = bf.ELBO(network, bf.Gaussian(1.0, learned=True), n_data=len(train_x)).to(device)
    losses = {
        "Maximum likelihood": fit(lambda x, y: {"loss": 0.5 * (fitted(x) - y).square().mean()},
                                  fitted.parameters(), split, epochs=10 * epochs, lr=0.01,
                                  label="maximum likelihood"),
        "Prior on y": fit(lambda x, y: {"loss": prior_on_y.loss(x, y)}, prior_on_y.parameters(), split,
                          epochs=epochs, lr=0.02, label="prior on y", decay=True),
        "Prior on the weights": fit(lambda x, y: elbo_parts(elbo, x, y), elbo.parameters(), split,
                                    epochs=2 * epochs, lr=0.02, label="prior on weights", decay=True)}

    with torch.no_grad():
        fit_y = fitted(x).squeeze(1)
        mean, log_variance = prior_on_y(x)
        levels = torch.tensor([0.05, 0.5, 0.95], device=device)
        quantiles = draw(mean, log_variance, DRAWS).quantile(levels, dim=0).squeeze(2)
    prediction = bf.predict(network, x, elbo.likelihood, n_samples=DRAWS, seed=seed)
    low, high = prediction.interval(0.9)
    truth, x, y = curve(x), x.squeeze(1), y.squeeze(1)
    bands = {"prior_on_y": quantiles.unbind(0),
             "prior_on_weights": tuple(q.squeeze(1) for q in (low, prediction.quantile(0.5), high))}
    results = {name: {"coverage": metrics.interval_coverage(low, high, y).item()}
               for name, (low, _, high) in bands.items()}
    for name, mean, sd in (("prior_on_y", mean, (log_variance / 2).exp()),
                           ("prior_on_weights", prediction.mean, prediction.std)):
        results[name].update(slope=slope(mean, truth), sd=sd.mean().item())
    results["maximum_likelihood"] = {"rmse": metrics.rmse(fit_y, curve(x)).item()}

    a, b = results["prior_on_y"], results["prior_on_weights"]
    print(table(f"Variational regression, {len(x):,} validation points, {DRAWS:,} draws", [
        ("", "prior on y", "prior on weights", ""),
        ("coverage of the 90 % band", f"{a['coverage']:.1%}", f"{b['coverage']:.1%}",
         "expected: about 99 %; 87 to 93 %"),
        ("slope of the mean on the curve", f"{a['slope']:.3f}", f"{b['slope']:.3f}",
         "expected: about 0.6; the truth is 1"),
        ("mean sd of a new point", f"{a['sd']:.2f}", f"{b['sd']:.2f}",
         f"expected: about 4.6; the truth is {NOISE}")]))
    print(f"The noise that the variational layers learned: {elbo.likelihood.scale.item():.3f}. "
          f"RMSE of maximum likelihood to the curve: {results['maximum_likelihood']['rmse']:.3f}.")
    print("The tutorial's loss puts its prior on y and not on what is unknown, the weights: the mean shrinks "
          "towards the\nmean of the targets and the band is far too wide, with ever so much data.")
    titles = [f"{title}\nslope {found['slope']:.2f}, sd {found['sd']:.1f} (truth: 1, {NOISE}); "
              f"the 90 % band holds {found['coverage']:.1%}"
              for title, found in (("Prior on y: shrunk, and far too wide", a),
                                   ("Prior on the weights, learned noise", b))]
    print("figures:", draw_losses(losses, out), draw_fit(x, y, fit_y, out),
          draw_quantiles(x, y, dict(zip(titles, bands.values())), out), sep="\n  ")
    return results
