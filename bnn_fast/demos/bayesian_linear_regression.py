"""Bayesian linear regression: a line's posterior by training, beside the exact one.

100 points of y = 2x + 1 with noise of known standard deviation 0.5, fitted by maximum likelihood, and with
one variational linear layer under the prior N(0, 1) by maximising the whole ELBO, KL included. The posterior
is known in closed form, so the demo can say how near the trained one comes.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import plotting

from .common import elbo_parts, minimise, panels, save, table

EPOCHS = 2000       # the tutorial's 100 steps are too few for the standard deviations
SLOPE, INTERCEPT, NOISE = 2.0, 1.0, 0.5
POINTS, DRAWS = 100, 100


def data(device: str) -> tuple[Tensor, Tensor]:
    """x, y [100, 1]. x is not centred, so that slope and intercept are correlated in the posterior."""
    x = torch.linspace(0.0, 1.0, POINTS).unsqueeze(1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1996))
    # the tutorial's text leaves out the 1, its code does not
    return x.to(device), (SLOPE * x + INTERCEPT + NOISE * noise).to(device)


def exact_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [2], precision A [2, 2]) of (slope, intercept), float64 on the CPU: A = X'X / noise^2 + I, the
    mean A^-1 X'y / noise^2 (Bishop, "Pattern Recognition and Machine Learning", 2006, section 3.3)."""
    x, y = x.double().cpu(), y.double().cpu()
    design = torch.cat([x, torch.ones_like(x)], dim=1)
    precision = design.T @ design / NOISE ** 2 + torch.eye(2, dtype=torch.float64)
    return torch.linalg.solve(precision, design.T @ y / NOISE ** 2).squeeze(1), precision


def train(x: Tensor, y: Tensor, steps: int) -> tuple[nn.Linear, bf.VariationalLinear]:
    """The maximum-likelihood line and the variational one."""
    line = nn.Linear(1, 1).to(x.device)
    for _ in minimise(lambda: {"loss": (line(x) - y).square().mean()}, line.parameters(), steps=steps, lr=0.1,
                      label="maximum likelihood", decay=True):
        pass
    layer = bf.VariationalLinear(1, 1, prior=bf.Normal(0.0, 1.0), scale="exp", init="zeros").to(x.device)
    elbo = bf.ELBO(layer, bf.Gaussian(NOISE), n_data=len(x)).to(x.device)
    # Ten draws a step and a learning rate that falls to 0 take the noise out of the gradients.
    for _ in minimise(lambda: elbo_parts(elbo, x, y, n_samples=10), elbo.parameters(), steps=steps, lr=0.1,
                      label="variational", decay=True):
        pass
    return line, layer


def numbers(line: nn.Linear) -> Tensor:
    return torch.stack([line.weight.flatten()[0], line.bias[0]]).detach().double().cpu()


def draw_lines(ax, layer: bf.VariationalLinear, line: nn.Linear, x: Tensor, y: Tensor, seed: int) -> None:
    prediction = bf.predict(layer, x, n_samples=DRAWS, seed=seed)
    mean, sd, at = prediction.mean.squeeze(1), prediction.std.squeeze(1), x.squeeze(1)
    plotting.regression_band(at, mean, mean - 2 * sd, mean + 2 * sd, data=(at, y.squeeze(1)),
                             curve=SLOPE * at + INTERCEPT, label=r"mean $\pm$ 2 sd of the line", ax=ax)
    ax.plot(at.cpu(), line(x).detach().squeeze(1).cpu(), color=plotting.VERMILION, linewidth=1.3,
            linestyle=":", label="maximum likelihood")
    ax.legend(frameon=False)
    ax.set_title(f"{DRAWS} draws of the line; a new point has noise {NOISE} besides")


def draw_posteriors(ax, mean: Tensor, precision: Tensor, mu: Tensor, sigma: Tensor, ml: Tensor) -> None:
    """Ellipses of 1 and 2 standard deviations in the plane of (slope, intercept)."""
    angle = torch.linspace(0.0, 2.0 * torch.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    for label, centre, root, colour, style in (
            ("exact posterior", mean, torch.linalg.cholesky(precision.inverse()), plotting.BLUE, "-"),
            ("variational", mu, sigma.diag(), plotting.ORANGE, "--")):
        for radius in (1, 2):
            ax.plot(*(centre[:, None] + radius * root @ circle), color=colour, linestyle=style, linewidth=1.6,
                    label=label if radius == 1 else None)
    ax.plot(*ml, "s", color=plotting.VERMILION, label="maximum likelihood")
    ax.plot(SLOPE, INTERCEPT, "*", color="black", markersize=10, label="truth")
    ax.set(xlabel="slope", ylabel="intercept", title="Posteriors, 1 and 2 standard deviations")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu",
        out: str = "figures") -> dict[str, list[float]]:
    """Train, compare, draw, print; returns for (slope, intercept) the means' distance from the exact ones in
    standard deviations, and the standard deviations over those of the mean-field optimum."""
    torch.manual_seed(seed)
    x, y = data(device)
    line, layer = train(x, y, epochs or EPOCHS)
    ml = numbers(line)
    mu, sigma = (torch.cat([w.flatten(), b]).detach().double().cpu() for w, b in (
        (layer.weight_mu, layer.bias_mu), (layer.weight_sigma, layer.bias_sigma)))
    mean, precision = exact_posterior(x, y)
    # The best Gaussian without correlations has the exact means, and not the marginal sds but those of each
    # number when the other is known (Bishop, section 10.1.2). They are smaller.
    optimum, marginal = precision.diagonal().rsqrt(), precision.inverse().diagonal().sqrt()

    figures = []
    for name, height, draw in (
            ("lines", 5.0, lambda ax: draw_lines(ax, layer, line, x, y, seed)),
            ("posteriors", 5.5, lambda ax: draw_posteriors(ax, mean, precision, mu, sigma, ml))):
        ax = panels(1, 8.0, height)
        draw(ax)
        figures.append(save(ax, out, f"bayesian_linear_regression_{name}.png"))

    results = {"mean_error": ((mu - mean) / optimum).tolist(), "sd_ratio": (sigma / optimum).tolist()}
    truth = torch.tensor([SLOPE, INTERCEPT])
    rows = [(label, *(f"{value:.4f}" for value in values), note) for label, values, note in (
        ("truth", truth, ""), ("maximum likelihood", ml, ""),
        ("exact mean", mean, ""), ("variational mean", mu, ""),
        ("exact marginal sd", marginal, ""), ("mean-field optimum's sd", optimum, "1 / sqrt(A_ii)"),
        ("variational sd", sigma, ""),
        ("mean's distance to exact, in sds", results["mean_error"], "expected: at most 0.2 either way"),
        ("sd over the optimum's", results["sd_ratio"], "expected: 0.9 to 1.1"))]
    print(table(f"Bayesian linear regression, {POINTS} points", [("", "slope", "intercept", ""), *rows]))
    print("Without correlations between slope and intercept the variational posterior is narrower than the "
          "exact marginals:\nits best sds are those of one number with the other known.")
    print("figures:", *figures, sep="\n  ")
    return results
