"""Pictures of predictions: a regression band, a reliability diagram, a grid of images.

Every function draws on `ax` (a new one if None) and returns the Axes. matplotlib is imported when a
picture is drawn.
"""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["regression_band", "reliability_bins", "reliability_diagram", "image_grid"]

# Okabe and Ito, "Color Universal Design", 2008: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


def regression_band(x: Tensor, mean: Tensor, low: Tensor, high: Tensor, *, data=None, curve=None,
                    label="5-95 % band", ax=None):
    """The predictive mean and the band between two quantiles of one output over one input.

    Args:
        x, mean, low, high: [N], in any order of x.
        data: (x [M], y [M]), drawn as dots.
        curve: [N], the true function at x, drawn dashed.
        label: what the band is called.
    """
    ax = _axes(ax, (8.0, 5.0))
    order = x.argsort()
    x, mean, low, high = (_numpy(t[order]) for t in (x, mean, low, high))
    if data is not None:
        ax.scatter(*map(_numpy, data), s=3, color=GREY, alpha=0.5, linewidths=0, label="data",
                   rasterized=True)
    ax.fill_between(x, low, high, color=ORANGE, alpha=0.75, linewidth=0, label=label)
    ax.plot(x, mean, color=BLUE, linewidth=1.3, label="mean")
    if curve is not None:
        ax.plot(x, _numpy(curve[order]), color="black", linewidth=1.0, linestyle=(0, (4, 3)),
                label="curve without noise")
    ax.set(xlabel="x", ylabel="y", xlim=(x[0], x[-1]))
    for handle in ax.legend(frameon=False, markerscale=5).legend_handles:
        handle.set_alpha(1.0)
    return _tidy(ax)


def reliability_bins(probs: Tensor, targets: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """(confidence, accuracy, share of the rows) [bins] in equally wide bins of the confidence max(probs).

    probs [N, C], targets [N]. An empty bin has share 0 and confidence and accuracy nan. The expected
    calibration error is the sum of share * |accuracy - confidence| over the others (Guo et al., "On
    calibration of modern neural networks", 2017).
    """
    confidence, guess = probs.max(dim=-1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    hits = (guess == targets).to(probs.dtype)
    zeros = torch.zeros(bins, dtype=probs.dtype, device=probs.device)
    count, confidences, accuracies = (zeros.index_add(0, bin_of, value)
                                      for value in (torch.ones_like(hits), confidence, hits))
    return confidences / count, accuracies / count, count / len(targets)


def reliability_diagram(probs: Tensor, targets: Tensor, *, bins: int = 10, label=None, color=BLUE, marker="o",
                        ax=None):
    """Accuracy against confidence by bin, the dots' area growing with the share of the rows in the bin.

    probs [N, C], targets [N]. Points below the diagonal: more confident than right. Call it again on the same
    Axes, with another colour and marker, to compare models.
    """
    ax = _axes(ax, (5.5, 6.0))
    found = reliability_bins(probs, targets, bins)
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

    # Not pyplot: no global state, and no display is asked for.
    return Figure(figsize=size, dpi=150, layout="constrained").subplots()


def _tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _numpy(tensor: Tensor):
    return tensor.detach().cpu().numpy()
