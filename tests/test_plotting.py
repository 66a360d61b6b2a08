from __future__ import annotations

import subprocess
import sys

import pytest
import torch

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


def test_reliability_bins():
    first = torch.tensor([0.92, 0.98, 0.3, 0.55, 0.0], dtype=torch.float64)
    probs = torch.stack([first, 1 - first], dim=1)
    confidence, accuracy, share = plotting.reliability_bins(probs, torch.tensor([0, 1, 1, 0, 1]), bins=10)
    used = [5, 7, 9]
    torch.testing.assert_close(share[used], torch.tensor([0.2, 0.2, 0.6]).double())
    torch.testing.assert_close(accuracy[used], torch.tensor([1.0, 1.0, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(confidence[used], torch.tensor([0.55, 0.7, 2.9 / 3], dtype=torch.float64))
    empty = [0, 1, 2, 3, 4, 6, 8]
    assert share[empty].eq(0).all() and accuracy[empty].isnan().all() and confidence[empty].isnan().all()


def test_reliability_diagram_of_two_models_on_the_same_axes():
    probs, y = torch.tensor([[0.95, 0.05], [0.25, 0.75]]), torch.tensor([0, 0])
    ax = plotting.reliability_diagram(probs, y, label="a")
    assert plotting.reliability_diagram(probs.flip(1), y, label="b", ax=ax) is ax
    assert len(ax.lines) == 3  # one diagonal
    assert [point.tolist() for point in ax.collections[0].get_offsets()] == [
        pytest.approx([0.75, 0.0]), pytest.approx([0.95, 1.0])]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["perfectly calibrated", "a", "b"]


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
