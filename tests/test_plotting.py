from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import bnn_fast as bf
from bnn_fast import plotting

pytest.importorskip("matplotlib")


def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_the_band_is_drawn_in_order_of_x():
    x = torch.tensor([2.0, -1.0, 0.5])
    ax = axes()
    given = plotting.regression_band(x, x * 10, x * 10 - 1, x * 10 + 2, data=(x, x), curve=-x, ax=ax)
    assert given is ax
    mean, curve = ax.lines
    assert list(mean.get_xdata()) == [-1.0, 0.5, 2.0] and list(mean.get_ydata()) == [-10.0, 5.0, 20.0]
    assert list(curve.get_ydata()) == [1.0, -0.5, -2.0]
    corners = {tuple(point) for point in ax.collections[1].get_paths()[0].vertices.tolist()}
    assert {(-1.0, -11.0), (-1.0, -8.0), (0.5, 4.0), (0.5, 7.0), (2.0, 19.0), (2.0, 22.0)} <= corners
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["data", "5-95 % band", "mean", "curve without noise"]


def test_reliability_diagram_of_two_models_on_the_same_axes():
    probs, y = torch.tensor([[0.95, 0.05], [0.25, 0.75]]), torch.tensor([0, 0])
    ax = plotting.reliability_diagram(probs, y, label="a")
    assert plotting.reliability_diagram(probs.flip(1), y, label="b", ax=ax) is ax
    assert len(ax.lines) == 3  # one diagonal
    assert [point.tolist() for point in ax.collections[0].get_offsets()] == [
        pytest.approx([0.75, 0.0]), pytest.approx([0.95, 1.0])]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["perfectly calibrated", "a", "b"]


def test_sample_lines_are_drawn_in_order_of_x():
    x = torch.tensor([2.0, -1.0, 0.5])
    samples = torch.stack([x, 3 * x])
    ax = axes()
    assert plotting.sample_lines(x, samples, data=(x, x), curve=-x, ax=ax) is ax
    dots, lines = ax.collections
    assert [path.vertices.tolist() for path in lines.get_paths()] == [
        [[-1.0, -1.0], [0.5, 0.5], [2.0, 2.0]], [[-1.0, -3.0], [0.5, 1.5], [2.0, 6.0]]]
    assert ax.get_ylim()[0] <= -3.0 and ax.get_ylim()[1] >= 6.0 and ax.get_xlim() == (-1.0, 2.0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "data", "posterior draws", "curve without noise"]


def test_shapes_of_lines():
    x, column = torch.zeros(3), torch.zeros(3, 1)
    for call, message in (
            (lambda: plotting.regression_band(column, x, x, x), r"x: expected \[N\], given .* \[3, 1\]"),
            (lambda: plotting.regression_band(x, x, column, x), r"low: expected \[3\] as x has"),
            (lambda: plotting.sample_lines(x, column[None]), r"samples: expected \[S, N\]"),
            (lambda: plotting.sample_lines(x, column), r"samples: expected \[3\] as x has")):
        with pytest.raises(ValueError, match=message):
            call()


def constant(values):
    """A model of these outputs [B, 1]."""
    model = nn.Linear(1, 1)
    model.forward = lambda x: values[:len(x)]
    return model


def test_coverage_curve():
    zeros = torch.zeros(4, 1)
    prediction = bf.predict(constant(zeros), zeros, bf.Gaussian(2.0), n_samples=1)
    levels = torch.tensor([0.1, 0.4, 0.5, 0.9])
    sides = torch.tensor([1.0, -1.0, -1.0, 1.0])
    targets = 2.0 * torch.special.ndtri(0.5 + 0.5 * levels * sides)
    ax = plotting.coverage_curve(prediction, targets[:, None], label="a")
    plotting.coverage_curve(prediction, targets[:, None], label="b", color=plotting.VERMILION, ax=ax)
    assert len(ax.lines) == 3  # one diagonal
    assert list(ax.lines[1].get_xdata()) == pytest.approx([0.0, 0.1, 0.4, 0.5, 0.9, 1.0], abs=1e-6)
    assert list(ax.lines[1].get_ydata()) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_entropy_histograms():
    ax = plotting.entropy_histograms(torch.tensor([0.05, 0.1, 0.15]), torch.tensor([0.9, 1.0]), bins=2)
    first, second = (patch.get_path().vertices for patch in ax.patches)
    assert first[:, 1].max() == 2.0 and first[first[:, 1] > 0, 0].max() == 0.5, "area 1 over [0, 0.5]"
    assert second[:, 1].max() == 2.0 and second[second[:, 1] > 0, 0].min() == 0.5
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["in distribution", "out of distribution"]
    plotting.entropy_histograms(torch.zeros(3), torch.zeros(2))


def test_signal_to_noise_histogram():
    layer = bf.VariationalLinear(4, 2, scale="exp")
    with torch.no_grad():
        layer.weight_mu.copy_(torch.tensor([[1.0, -10.0, 100.0, 0.0], [1.0, 10.0, -100.0, 0.0]]))
        layer.weight_rho.fill_(0.0)
        layer.weight_rho[1, 3] = -torch.inf
        layer.bias_mu.fill_(30.0)
        layer.bias_rho.fill_(torch.tensor(3.0).log())
    ax = plotting.signal_to_noise_histogram(nn.Sequential(layer), bins=3)
    heights = ax.patches[0].get_path().vertices[:, 1]
    assert ax.get_xscale() == "log" and heights.max() == pytest.approx(0.5), "10 and 30 / 3: four of eight"
    with pytest.raises(ValueError, match="model: expected variational weights"):
        plotting.signal_to_noise_histogram(nn.Linear(2, 2))


def test_training_curves():
    nll, kl = torch.linspace(3, 1, 200).tolist(), torch.linspace(5000, 100, 200)
    ax = plotting.training_curves(nll, kl)
    right = ax.figure.axes[1]
    assert list(ax.lines[0].get_ydata()) == pytest.approx(nll) and ax.get_xlim() == (1, 200)
    assert right.get_yscale() == "log" and ax.get_yscale() == "linear"
    thick = ax.lines[1]  # the mean of four steps, where their middle is
    assert thick.get_xdata()[0] == 2.5 and thick.get_ydata()[0] == pytest.approx(sum(nll[:4]) / 4)
    assert ax.get_ylabel() == "NLL per row" and right.get_ylabel() == "KL"


def test_image_grid():
    ax = plotting.image_grid(torch.rand(5, 4, 4), list("abcde"), columns=3)
    assert len(ax.images) == 5 and [text.get_text() for text in ax.texts] == list("abcde")
    left, right, bottom, top = ax.images[4].get_extent()  # the second of the second row
    first = ax.images[0].get_extent()
    assert first[1] < left < right and first[2] < top < bottom
    assert ax.get_xlim()[1] >= right and ax.get_ylim()[0] >= bottom


def test_importing_it_does_not_import_matplotlib():
    code = "import bnn_fast.plotting, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
