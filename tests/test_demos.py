from __future__ import annotations

import functools
import gzip
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import bnn_fast as bf
from bnn_fast.demos import __main__ as command
from bnn_fast.demos import bayes_by_backprop, common, digits, digits_data, timing

for module in command.EXTRAS:
    pytest.importorskip(module)


@pytest.fixture
def hasty(monkeypatch):
    """Step times from one round: there, and not worth reading."""
    monkeypatch.setattr(timing, "interleaved", functools.partial(timing.interleaved, seconds=0.0, rounds=1))


def row(text: str, label: str) -> list[str]:
    """The cells of a table's row."""
    return re.split(r"\s{2,}", re.search(f"^{re.escape(label)}  .*", text, re.MULTILINE).group())


def pictures(text: str, folder) -> list[str]:
    """Names of the figures printed, each of which is there and is one."""
    paths = re.findall(r"^  (.*\.png)$", text, re.MULTILINE)
    for path in paths:
        assert os.path.dirname(path) == str(folder)
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
        assert os.path.getsize(path) > 5000
    return [os.path.basename(path) for path in paths]


def check_step_times(text: str) -> None:
    ours = float(row(text, "step, bnn_fast")[1].split()[0])
    for other in ("nn.Linear", "plain PyTorch", "bnn_fast.reference"):
        _, time, ratio = row(text, f"step, {other}")
        expected = ours / float(time.split()[0])
        assert float(re.search(r"[\d.]+", ratio).group()) == pytest.approx(expected, rel=0.1, abs=0.02)


def test_bayes_by_backprop_in_short(tmp_path, capsys, monkeypatch, hasty):
    monkeypatch.setattr(bayes_by_backprop, "DRAWS", 30)
    found = bayes_by_backprop.run(epochs=4, out=str(tmp_path), points=1000)
    text, bar = capsys.readouterr()
    assert row(text, "RMSE of the mean to the curve")[1] == f"{found['rmse']:.3f}"
    assert row(text, "share of the curve inside the 5-95 % band")[1] == f"{found['curve_inside']:.1%}"
    assert row(text, "share of the noisy points inside it")[1] == f"{found['points_inside']:.1%}"
    assert re.search(r"epoch +4 +loss a point: training +[\d.]+, validation +[\d.]+\n", text)
    assert "takes the noise to be 0.1 where it is 1.5" in text
    assert pictures(text, tmp_path) == ["bayes_by_backprop_training.png", "bayes_by_backprop_validation.png"]
    assert all(part in bar for part in ("4/4", "loss=", "nll=", "kl="))
    check_step_times(text)


def test_bayes_by_backprop_has_the_tutorials_data_and_network():
    train_x, validation_x, train_y, validation_y = bayes_by_backprop.data(20000, "cpu")
    assert train_x.shape == train_y.shape == (16000, 1)
    assert validation_x.shape == validation_y.shape == (4000, 1)
    assert train_x.min() >= -3 and train_x.max() <= 3
    noise = torch.cat([train_y, validation_y]) - bayes_by_backprop.curve(torch.cat([train_x, validation_x]))
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1.5, abs=0.03)
    layers = [layer for layer in bayes_by_backprop.network() if isinstance(layer, bf.VariationalLinear)]
    assert [l.in_features for l in layers] == [1, 20, 20, 20, 20]
    assert [l.out_features for l in layers] == [20, 20, 20, 20, 1]
    assert all(l.kl == "sampled" and l.init == "tutorial" and l.prior == bf.Normal(0.0, 1.0) for l in layers)


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
    assert pictures(text, tmp_path) == ["digits_unsure.png", "digits_reliability.png"]
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
    assert pictures(capsys.readouterr().out, tmp_path) == ["mnist_unsure.png", "mnist_reliability.png"]


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


def test_predictions_do_not_depend_on_the_pieces():
    model = torch.nn.Sequential(bf.VariationalLinear(3, 4), torch.nn.ReLU(), bf.VariationalLinear(4, 2))
    x = torch.randn(10, 3)
    pieces = list(common.draws_by_piece(model, x, 5, seed=1, rows=4))
    assert [list(piece.shape) for piece in pieces] == [[5, 4, 2], [5, 4, 2], [5, 2, 2]]
    assert not pieces[0].requires_grad
    torch.testing.assert_close(torch.cat(pieces, 1), bf.mc_forward(model, x, 5, seed=1))


@pytest.mark.parametrize("arguments, holds, lacks", [
    (["--help"], ["bayes_by_backprop: ", "digits: ", "--data"], []),
    (["digits", "--help"], ["Handwritten digits", "--data", "--epochs", "--seed", "--device", "--out"],
     ["bayes_by_backprop:"]),
    (["bayes_by_backprop", "--help"], ["Blundell", "5000"], ["--data", "digits:"]),
])
def test_help(arguments, holds, lacks, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(part in text for part in holds) and not any(part in text for part in lacks)


@pytest.mark.parametrize("arguments, says", [
    (["digit"], "bayes_by_backprop"),
    ([], "NAME"),
    (["digits", "--epochs", "0"], "positive whole number, given '0'"),
    (["bayes_by_backprop", "--data", "x"], "--data"),
])
def test_bad_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 2 and says in capsys.readouterr().err


def test_without_the_extra_packages_there_is_one_clear_error():
    code = ("import sys; sys.modules.update(matplotlib=None, sklearn=None, tqdm=None)\n"
            "from bnn_fast.demos.__main__ import main; sys.exit(main(['digits']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "the demos need matplotlib, scikit-learn, tqdm: pip install bnn_fast[demos]"


@pytest.mark.slow
def test_bayes_by_backprop_holds_the_curve(tmp_path):
    found = bayes_by_backprop.run(out=str(tmp_path))
    assert found["rmse"] <= 0.8
    assert found["curve_inside"] >= 0.8
    assert found["points_inside"] <= 0.5


@pytest.mark.slow
def test_digits_are_told_apart_and_scrambled_ones_doubted(tmp_path):
    found = digits.run(out=str(tmp_path))
    assert found["bayesian"]["accuracy"] >= 0.965
    assert found["bayesian"]["nll"] <= 1.1 * found["twin"]["nll"]
    assert found["bayesian"]["scrambled"] > found["twin"]["scrambled"]
    assert found["bayesian"]["scrambled"] > found["bayesian"]["entropy"]


@pytest.mark.slow
@pytest.mark.skipif("BNN_FAST_MNIST" not in os.environ, reason="BNN_FAST_MNIST names no folder of MNIST")
def test_mnist_error(tmp_path):
    found = digits.run(out=str(tmp_path), data=os.environ["BNN_FAST_MNIST"])
    assert 1 - found["bayesian"]["accuracy"] <= 0.026
