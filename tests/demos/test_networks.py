"""The demos of whole networks: convolutions on digits, an LSTM on a series."""
from __future__ import annotations

import pytest
import torch
from demos.reading import hasty, pictures, row  # noqa: F401
from demos.test_digits import small_mnist  # noqa: F401

import bnn_fast as bf
from bnn_fast.demos import __main__ as command
from bnn_fast.demos import images, pretrained, series

for module in command.EXTRAS:
    pytest.importorskip(module)


def test_images_in_short(tmp_path, capsys):
    found = images.run(epochs=3, out=str(tmp_path))
    text = capsys.readouterr().out
    assert pictures(text, tmp_path) == ["images.png"]
    assert row(text, "accuracy")[1:3] == [f"{found[name]['accuracy']:.2%}" for name in ("bayesian", "twin")]
    assert found["bayesian"]["accuracy"] > 0.7


def test_pretrained_in_short(tmp_path, capsys, hasty):
    found = pretrained.run(epochs=6, out=str(tmp_path))
    text = capsys.readouterr().out
    assert pictures(text, tmp_path) == ["pretrained.png"]
    assert row(text, "accuracy")[1:] == [f"{found[kind]['accuracy']:.2%}" for kind in ("deterministic", "last layer", "all layers")]
    assert min(each["accuracy"] for each in found.values()) > 0.7


def test_pretrained_on_mnist_files(small_mnist, tmp_path, capsys, hasty):  # noqa: F811
    found = pretrained.run(epochs=6, out=str(tmp_path), data=str(small_mnist))
    text = capsys.readouterr().out
    assert "40 held-out images, 6 epochs, then 2 of the ELBO" in text and pictures(text, tmp_path) == ["pretrained_mnist.png"]
    assert min(each["accuracy"] for each in found.values()) > 0.5


def test_only_what_is_converted_is_trained_on():
    torch.manual_seed(0)
    plain = images.network(torch.nn.Conv2d, torch.nn.Linear, 4, 8)
    x, y = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    model = pretrained.converted(plain, "last", x, y, 16, 1, "")
    assert isinstance(model[-1], bf.VariationalLinear) and torch.equal(model[0].weight, plain[0].weight)
    assert not torch.equal(model[-1].weight_mu, plain[-1].weight)
    moved = pretrained.converted(plain, None, x, y, 16, 1, "")
    assert not torch.equal(moved[0].weight_mu, plain[0].weight)


def test_series_in_short(tmp_path, capsys):
    found = series.run(epochs=40, out=str(tmp_path))
    text = capsys.readouterr().out
    assert pictures(text, tmp_path) == ["series.png"]
    assert row(text, "share inside the 90 % band")[1] == f"{found['coverage']:.1%}"
    assert found["rmse"] < 1.0


def test_windows_follow_each_other():
    past, ahead = series.windows(torch.arange(200.0))
    assert past.shape == (200 - series.PAST - series.AHEAD + 1, series.PAST, 1) and ahead.shape == (len(past), series.AHEAD)
    assert torch.equal(past[3, :, 0], torch.arange(3.0, 3 + series.PAST)) and ahead[3, 0] == 3 + series.PAST
    outputs = series.Forecaster()(past[:5])
    assert outputs.shape == (5, 2 * series.AHEAD)
    assert bf.HeteroscedasticGaussian()(outputs.unsqueeze(0), ahead[:5]).shape == (1, 5)


@pytest.mark.slow
def test_images_are_told_apart(tmp_path):
    found = images.run(out=str(tmp_path))
    assert found["bayesian"]["accuracy"] >= 0.97 and found["bayesian"]["surest"] >= 0.99


@pytest.mark.slow
def test_series_is_forecast_and_covered(tmp_path):
    found = series.run(out=str(tmp_path))
    assert found["rmse"] < found["seasonal"] and 0.8 <= found["coverage"] <= 0.95
