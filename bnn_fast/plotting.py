"""Pictures of predictions and of training.

Every function takes tensors or numpy arrays, draws on `ax` (a new one if None) and returns the Axes; where one takes
label and color, several models go on the same Axes. matplotlib is imported when a picture is drawn.

New Axes are on a figure of pyplot's if pyplot has been imported, and `plt.show()` shows them; as with pyplot's own,
`plt.close(ax.figure)` lets go of one. Otherwise, as in a program that only saves pictures, nothing holds on to them.
"""
from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor, nn

from . import checks
from .inference.prediction import Prediction
from .inference.pruning import signal_to_noise
from .metrics import reliability_bins

__all__ = ["regression_band", "sample_lines", "reliability_diagram", "coverage_curve", "entropy_histograms",
           "signal_to_noise_histogram", "training_curves", "image_grid"]

# Okabe and Ito, "Color Universal Design", 2008: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, DARK = "#999999", "#444444"


def regression_band(x: Tensor, mean: Tensor, low: Tensor, high: Tensor, *, data=None, curve=None,
                    label="5-95 % band", ax=None):
    """The predictive mean and the band between two quantiles of one output over one input.

    Args:
        x, mean, low, high: [N], in any order of x.
        data: (x [M], y [M]), drawn as dots.
        curve: [N], the true function at x, drawn dashed.
        label: what the band is called.

    ValueError for other shapes, as [N, 1].
    """
    x, mean, low, high = map(_tensor, (x, mean, low, high))
    _check_lines(x, mean=mean, low=low, high=high)
    ax = _axes(ax, (8.0, 5.0))
    order = x.argsort()
    ordered, mean, low, high = (_numpy(t[order]) for t in (x, mean, low, high))
    _data_dots(ax, data)
    ax.fill_between(ordered, low, high, color=ORANGE, alpha=0.6, linewidth=0, label=label)
    ax.plot(ordered, mean, color=BLUE, linewidth=1.3, label="mean")
    _dashed_curve(ax, x, curve, order)
    ax.set(xlabel="x", ylabel="y", xlim=(ordered[0], ordered[-1]))
    return _opaque_legend(_tidy(ax))


def sample_lines(x: Tensor, samples: Tensor, *, data=None, curve=None, label="posterior draws", ax=None):
    """Each draw of one output over one input as a line.

    Args:
        x: [N], in any order.
        samples: [S, N], as many as are to be seen (20 to 100 make a picture).
        data, curve: as in `regression_band`.

    ValueError for other shapes, as [S, N, 1].
    """
    from matplotlib.collections import LineCollection

    x, samples = _tensor(x), _tensor(samples)
    if not isinstance(samples, Tensor) or samples.dim() != 2:
        raise ValueError(f"samples: expected [S, N], given {checks.describe(samples)}")
    _check_lines(x, samples=samples[0])
    ax = _axes(ax, (8.0, 5.0))
    order = x.argsort()
    points = torch.stack([x[order].expand(len(samples), -1), samples[:, order]], dim=-1)
    _data_dots(ax, data)
    alpha = min(0.8, max(0.1, 15.0 / len(samples)))
    ax.add_collection(LineCollection(_numpy(points), colors=BLUE, linewidths=0.9, alpha=alpha, label=label))
    ax.autoscale_view()
    _dashed_curve(ax, x, curve, order)
    ax.set(xlabel="x", ylabel="y", xlim=(x.min().item(), x.max().item()))
    return _opaque_legend(_tidy(ax))


def reliability_diagram(probs: Tensor, targets: Tensor, *, bins: int = 10, label=None, color=BLUE, marker="o",
                        ax=None):
    """Accuracy against confidence by bin, the dots' area growing with the share of the rows in the bin.

    probs [N, C], targets [N]. Points below the diagonal: more confident than right. Call it again on the same
    Axes, with another colour and marker, to compare models.
    """
    ax = _axes(ax, (5.5, 6.0))
    found = reliability_bins(_tensor(probs), _tensor(targets), bins)
    confidence, accuracy, share = (_numpy(values[found[2] > 0]) for values in found)
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--", label="perfectly calibrated")
    ax.plot(confidence, accuracy, color=color, linewidth=1.2, alpha=0.8)
    ax.scatter(confidence, accuracy, s=10 + 250 * share, color=color, marker=marker, label=label, zorder=3)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.04), aspect="equal")
    if label is not None:
        legend = ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3)
        for handle in legend.legend_handles[1:]:
            handle.set_sizes([30.0])
    return _tidy(ax)


def coverage_curve(prediction: Prediction, targets: Tensor, *, label=None, color=BLUE, ax=None):
    """The share of targets inside the central interval against the level of the interval.

    prediction: `Prediction` or `GaussianPrediction` of the targets [N, ...]. A curve below the diagonal:
    intervals too narrow. A target lies in the interval of level L if |2 F(target) - 1| <= L, F being the
    predictive distribution function.
    """
    ax = _axes(ax, (5.5, 6.0))
    levels = (2.0 * prediction.cdf(_tensor(targets)).double() - 1.0).abs().flatten().sort().values
    share = torch.arange(1, len(levels) + 1) / len(levels)
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--", label="perfectly calibrated")
    ax.step([0.0, *_numpy(levels), 1.0], [0.0, *_numpy(share), 1.0], where="post", color=color, label=label)
    ax.set(xlabel="level of the interval", ylabel="share of the targets inside", xlim=(0, 1),
           ylim=(0, 1.01), aspect="equal")
    if label is not None:
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3)
    return _tidy(ax)


def entropy_histograms(first: Tensor, second: Tensor, *, labels=("in distribution", "out of distribution"),
                       bins: int = 30, ax=None):
    """Histograms of the entropies (or mutual informations) of two sets, [N] and [M] in nats, each with area 1
    so that sets of different sizes compare.
    """
    ax = _axes(ax, (6.4, 4.2))
    first, second = _tensor(first).flatten(), _tensor(second).flatten()
    edges = _numpy(torch.linspace(0.0, max(first.max(), second.max()).item() or 1.0, bins + 1))
    for values, color, label, hatch in ((first, BLUE, labels[0], ""), (second, ORANGE, labels[1], "///")):
        ax.hist(_numpy(values), edges, density=True, histtype="stepfilled", facecolor=(color, 0.35),
                edgecolor=color, linewidth=1.6, hatch=hatch, label=label)
    ax.set(xlabel="entropy (nats)", ylabel="density", xlim=(0, edges[-1]))
    ax.legend(frameon=False)
    return _tidy(ax)


def signal_to_noise_histogram(model: nn.Module, *, bins: int = 60, label=None, color=BLUE, ax=None):
    """|mu| / sigma of all the weights and biases of `model`, on a logarithmic scale (Blundell et al., "Weight
    Uncertainty in Neural Networks", 2015, figure 5).

    The lowest 0.1 % are put into the first bin. Weights with mu = 0, pruned ones among them, are left out.
    ValueError if there are no others.
    """
    ax = _axes(ax, (6.4, 4.2))
    ratios = [ratio.double().flatten().cpu() for ratio in signal_to_noise(model).values()]
    ratios = torch.cat([torch.zeros(0, dtype=torch.float64), *ratios])
    ratios = _numpy(ratios[(ratios > 0.0) & ratios.isfinite()])
    if not len(ratios):
        raise ValueError("model: expected variational weights with mu other than 0, given none")
    lowest = np.quantile(ratios, 0.001)
    edges = np.geomspace(lowest, max(ratios.max(), 1.001 * lowest), bins + 1)
    shares = np.full(len(ratios), 1.0 / len(ratios))
    ax.hist(ratios.clip(lowest), edges, weights=shares, histtype="stepfilled", facecolor=(color, 0.35),
            edgecolor=color, linewidth=1.6, label=label)
    if not ax.lines:
        ax.axvline(1.0, color="black", linewidth=1.0, linestyle=(0, (4, 3)), label=r"$|\mu| = \sigma$")
    ax.set(xscale="log", xlabel=r"signal to noise, $|\mu|\, /\, \sigma$", ylabel="share of the weights")
    ax.legend(frameon=False)
    return _tidy(ax)


def training_curves(nll, kl, *, ax=None):
    """NLL (left axis) and KL (right axis) by step, the running mean over the steps as a thick line.

    nll, kl: [T], as `ELBO` gives them: NLL per row, KL undivided. Returns the left Axes.
    """
    ax = _axes(ax, (6.4, 4.2))
    for axis, values, color, name in ((ax, nll, BLUE, "NLL per row"), (ax.twinx(), kl, VERMILION, "KL")):
        values = torch.as_tensor(values, dtype=torch.float64).cpu()
        window = max(1, len(values) // 50)
        smooth = values.unfold(0, window, 1).mean(1)
        steps = np.arange(1, len(values) + 1)
        axis.plot(steps, _numpy(values), color=color, linewidth=0.6, alpha=0.4)
        axis.plot(steps[:len(smooth)] + 0.5 * (window - 1), _numpy(smooth), color=color, linewidth=1.8,
                  linestyle="-" if axis is ax else (0, (5, 1.5)), label=name)
        if values.min() > 0 and values.max() > 30 * values.min():
            axis.set_yscale("log")
        axis.set_ylabel(name, color=color)
        axis.tick_params(axis="y", which="both", colors=color)
        axis.spines["top"].set_visible(False)
    ax.set(xlabel="step", xlim=(1, max(2, len(nll))))
    return ax


def image_grid(images: Tensor, titles=None, *, columns: int = 8, ax=None):
    """images [N, H, W] in rows of `columns`, dark where they are large, with a title above each."""
    rows = -(-len(images) // columns)
    head = 0.0 if titles is None else 0.35  # height of a title, an image being 1
    ax = _axes(ax, (1.3 * columns, 1.3 * (1.0 + head) * rows))
    for i, image in enumerate(_numpy(images)):
        left, top = 1.1 * (i % columns), (1.1 + head) * (i // columns) + head
        ax.imshow(image, cmap="gray_r", extent=(left, left + 1, top + 1, top), interpolation="nearest")
        if titles is not None:
            ax.text(left + 0.5, top - 0.06, titles[i], ha="center", va="bottom", fontsize=8.5)
    ax.set(xlim=(-0.05, 1.1 * columns - 0.05), ylim=((1.1 + head) * rows, 0.0))
    ax.axis("off")
    return ax


def _axes(ax, size):
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    # pyplot is not imported for it: it has global state, and may ask for a display.
    pyplot = sys.modules.get("matplotlib.pyplot")
    figure = Figure if pyplot is None else pyplot.figure
    return figure(figsize=size, dpi=150, layout="constrained").subplots()


def _data_dots(ax, data) -> None:
    if data is not None:
        size, color = (14, DARK) if len(data[0]) <= 2000 else (3, GREY)
        ax.scatter(*map(_numpy, data), s=size, color=color, alpha=0.5, linewidths=0, label="data",
                   rasterized=True)


def _dashed_curve(ax, x: Tensor, curve, order: Tensor) -> None:
    if curve is not None:
        ax.plot(_numpy(x[order]), _numpy(_tensor(curve)[order]), color="black", linewidth=1.0, linestyle=(0, (4, 3)),
                label="curve without noise")


def _opaque_legend(ax):
    for handle in ax.legend(frameon=False, markerscale=2).legend_handles:
        handle.set_alpha(max(0.6, handle.get_alpha() or 1.0))
    return ax


def _check_lines(x: Tensor, **lines: Tensor) -> None:
    """x [N] and lines [N], of one output."""
    if not isinstance(x, Tensor) or x.dim() != 1:
        raise ValueError(f"x: expected [N], given {checks.describe(x)}")
    for name, line in lines.items():
        if not isinstance(line, Tensor) or line.shape != x.shape:
            raise ValueError(f"{name}: expected {list(x.shape)} as x has, given {checks.describe(line)}")


def _tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _tensor(values) -> Tensor:
    """A tensor of what is one, or an array or list; anything else (a ClassPrediction) as it is."""
    if isinstance(values, (np.ndarray, list, tuple)):
        return torch.from_numpy(np.array(values))  # a copy, as torch has no negative strides
    return values


def _numpy(values):
    tensor = _tensor(values).detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
