"""The digits demo, on scikit-learn's images and on MNIST."""
from __future__ import annotations

import gzip
import os
import re
import struct

import numpy as np
import pytest
import torch
from demos.reading import check_step_times, hasty, pictures, row  # noqa: F401

from bnn_fast.demos import __main__ as command
from bnn_fast.demos import digits, digits_data

for module in command.EXTRAS:
    pytest.importorskip(module)


def test_digits_in_short(tmp_path, capsys, hasty):
    assert command.main(["digits", "--epochs", "4", "--seed", "3", "--out", str(tmp_path)]) == 0
    text, bar = capsys.readouterr()
    for label, unit in (("accuracy", "%"), ("NLL", ""), ("calibration error, 10 bins", ""),
                        ("entropy, digits", ""), ("entropy, scrambled", "")):
        assert all(re.fullmatch(rf"[\d.]+{unit}", cell) for cell in row(text, label)[1:3])
    assert all(float(cell[:-1]) > 80 for cell in row(text, "accuracy")[1:3])
    for column in (1, 2):
        unsure, doubting = (float(row(text, f"entropy, {kind}")[column]) for kind in ("digits", "scrambled"))
        assert doubting > 1.5 * unsure
    assert pictures(text, tmp_path) == ["digits_unsure.png", "digits_reliability.png", "digits_draws.png"]
    assert all(part in bar for part in ("digits, Bayesian", "digits, twin", "nll=", "kl="))
    assert "seconds in all" in text
    check_step_times(text)


def test_what_is_measured():
    probs = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.6, 0.3], [0.85, 0.05, 0.1]])
    found = digits.measure(probs, torch.full((2, 3), 1 / 3), torch.tensor([0, 2, 0]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-np.log([0.8, 0.3, 0.85]).mean())
    assert found["calibration"] == pytest.approx(2 / 3 * (1 - 0.825) + 1 / 3 * 0.6)
    assert found["scrambled"] == pytest.approx(np.log(3))
    expected = [-sum(p * np.log(p) for p in row if p > 0) for row in probs.double().tolist()]
    assert found["entropy"] == pytest.approx(np.mean(expected))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path):
    """A folder of IDX files, some packed: 260 and 40 images, a bright row for each class."""
    folder, random = tmp_path / "mnist", np.random.default_rng(0)
    folder.mkdir()
    for part, n, suffix in (("train", 260, ".gz"), ("t10k", 40, "")):
        labels = random.integers(0, 10, n, dtype=np.uint8)
        images = random.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), 2 * labels] = 255
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (folder / (name + suffix)).write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
    return folder


def test_mnist_in_short(small_mnist, tmp_path, capsys, hasty):
    images = digits_data.mnist(str(small_mnist))
    assert images.train_x.shape == (260, 784) and images.test_y.shape == (40,)
    assert images.test_x.unflatten(1, (28, 28)).mean(2).argmax(1).equal(2 * images.test_y)
    assert images.train_x.max() == 1.0
    found = digits.run(epochs=8, out=str(tmp_path), data=str(small_mnist))
    assert found["bayesian"]["accuracy"] > 0.8
    assert pictures(capsys.readouterr().out, tmp_path) == ["mnist_unsure.png", "mnist_reliability.png", "mnist_draws.png"]


def test_bad_mnist_files_are_named(small_mnist, capsys):
    def error():
        assert command.main(["digits", "--data", str(small_mnist)]) == 1
        return capsys.readouterr().err

    labels = small_mnist / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1])
    assert f"{labels} says [40] and holds 39 bytes" in error()
    labels.write_bytes(b"\0\0\x0d" + content[3:])
    assert f"expected an IDX file of bytes, given {labels}, which begins with 00000d01" in error()
    labels.unlink()
    name = "t10k-labels-idx1-ubyte"
    assert f"expected {name} or {name}.gz in {small_mnist}, found neither" in error()


@pytest.mark.slow
def test_digits_are_told_apart_and_scrambled_ones_doubted(tmp_path):
    found = digits.run(out=str(tmp_path))
    assert found["bayesian"]["accuracy"] >= 0.965
    assert found["bayesian"]["nll"] <= 1.1 * found["twin"]["nll"]
    assert found["bayesian"]["scrambled"] > found["twin"]["scrambled"]
    assert found["bayesian"]["scrambled"] > found["bayesian"]["entropy"]
    error, nll, _ = found["convergence"]
    assert error[100] == pytest.approx(error[1] / 10, rel=0.3) and error[1] < 0.05
    assert abs(nll[100] - nll[digits.LIMIT]) < 0.001 < nll[1] - nll[digits.LIMIT]


@pytest.mark.slow
@pytest.mark.skipif("BNN_FAST_MNIST" not in os.environ, reason="BNN_FAST_MNIST names no folder of MNIST")
def test_mnist_error_and_what_pruning_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "MNIST", digits.MNIST._replace(draws=100))
    found = [digits.run(seed=seed, out=str(tmp_path), data=os.environ["BNN_FAST_MNIST"]) for seed in range(3)]
    assert all(1 - each["bayesian"]["accuracy"] <= 0.026 for each in found)
    rises = [each["pruned"][0.75] - each["pruned"][0.0] for each in found]
    assert sum(rises) / 3 <= 0.004
