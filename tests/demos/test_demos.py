from __future__ import annotations

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from demos.reading import check_step_times, hasty, pictures, row  # noqa: F401

import bnn_fast as bf
from bnn_fast.demos import __main__ as command
from bnn_fast.demos import bayes_by_backprop, bayesian_linear_regression, bayesian_neural_networks
from bnn_fast.demos import common, cubic, iris, sine, variational_regression

for module in command.EXTRAS:
    pytest.importorskip(module)


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
    train_x, validation_x, train_y, validation_y = cubic.data(20000, "cpu")
    assert train_x.shape == train_y.shape == (16000, 1)
    assert validation_x.shape == validation_y.shape == (4000, 1)
    assert train_x.min() >= -3 and train_x.max() <= 3
    noise = torch.cat([train_y, validation_y]) - cubic.curve(torch.cat([train_x, validation_x]))
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1.5, abs=0.03)
    layers = [layer for layer in bayes_by_backprop.network() if isinstance(layer, bf.VariationalLinear)]
    assert [l.in_features for l in layers] == [1, 20, 20, 20, 20]
    assert [l.out_features for l in layers] == [20, 20, 20, 20, 1]
    assert all(l.kl == "sampled" and l.init == "tutorial" and l.prior == bf.Normal(0.0, 1.0) for l in layers)


def test_variational_regression_in_short(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variational_regression, "DRAWS", 50)
    found = variational_regression.run(epochs=30, out=str(tmp_path), points=500)
    text, bar = capsys.readouterr()
    for label, kind, form in (("coverage of the 90 % band", "coverage", ".1%"),
                              ("slope of the mean on the curve", "slope", ".3f"),
                              ("mean sd of a new point", "sd", ".2f")):
        assert row(text, label)[1:3] == [format(found[name][kind], form)
                                         for name in ("prior_on_y", "prior_on_weights")]
    assert "puts its prior on y" in text
    assert f"maximum likelihood to the curve: {found['maximum_likelihood']['rmse']:.3f}" in text
    assert pictures(text, tmp_path) == [f"variational_regression_{name}.png"
                                        for name in ("losses", "fit", "quantiles")]
    assert all(part in bar for part in ("300/300", "30/30", "60/60", "nll=", "kl="))


def test_the_loss_with_its_prior_on_y(monkeypatch):
    x, y = torch.randn(2, 40, 1, dtype=torch.float64)
    model = variational_regression.PriorOnY(10 * y + 3).double()
    model.log_variance[-1].bias.data.fill_(1.5)
    mean, log_variance = model(x)
    drawn = variational_regression.draw(mean, log_variance, 20000)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(0), (log_variance / 2).exp(), atol=0.0, rtol=0.05)

    def log_normal(z, mean, variance):
        return torch.distributions.Normal(mean, variance.sqrt()).log_prob(z)

    monkeypatch.setattr(variational_regression, "draw", lambda mean, log_variance: drawn)
    expected = -(log_normal(y, mean, log_variance.exp())
                 + log_normal(drawn[0], (10 * y + 3).mean(), (10 * y + 3).var())
                 - log_normal(drawn[0], mean, log_variance.exp())).mean()
    torch.testing.assert_close(model.loss(x, y), expected)


def test_bayesian_linear_regression_in_short(tmp_path, capsys):
    found = bayesian_linear_regression.run(epochs=20, out=str(tmp_path))
    text, bar = capsys.readouterr()
    assert row(text, "mean's distance to exact, in sds")[1:3] == [f"{e:.4f}" for e in found["mean_error"]]
    assert row(text, "sd over the optimum's")[1:3] == [f"{e:.4f}" for e in found["sd_ratio"]]
    assert row(text, "truth")[1:3] == ["2.0000", "1.0000"]
    narrow, wide = (row(text, label)[1:3] for label in ("mean-field optimum's sd", "exact marginal sd"))
    assert all(float(a) < float(b) for a, b in zip(narrow, wide))
    assert pictures(text, tmp_path) == ["bayesian_linear_regression_lines.png",
                                        "bayesian_linear_regression_posteriors.png"]
    assert all(part in bar for part in ("maximum likelihood", "variational", "20/20"))


def test_exact_posterior_of_linear_regression():
    """Against the posterior density itself on a grid."""
    x, y = bayesian_linear_regression.data("cpu")
    mean, precision = bayesian_linear_regression.exact_posterior(x, y)
    grid = torch.linspace(-6, 6, 401, dtype=torch.float64)
    offsets = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).flatten(0, 1)
    slope, intercept = (mean + offsets * precision.inverse().diagonal().sqrt()).T
    error = y.double() - slope * x.double() - intercept
    log_density = -0.5 * (error.square().sum(0) / 0.25 + slope.square() + intercept.square())
    weight = log_density.softmax(0)
    for value, found, sd in zip((slope, intercept), mean, precision.inverse().diagonal().sqrt()):
        centre = (weight * value).sum()
        assert centre.item() == pytest.approx(found.item(), abs=1e-6)
        assert (weight * (value - centre).square()).sum().sqrt().item() == pytest.approx(sd.item(), rel=1e-4)


def test_bayesian_neural_networks_in_short(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bayesian_neural_networks, "SEEDS", 2)
    found = bayesian_neural_networks.run(epochs=12, seed=3, out=str(tmp_path))
    text, bar = capsys.readouterr()
    assert row(text, "raw")[1] == "3" and row(text, "standardised")[1] == "12"
    for kind in ("raw", "standardised"):
        assert row(text, kind)[3] == " ".join(map(str, found[kind])) and len(found[kind]) == 2
    steps = re.findall(r"^(\d+)  +([\d.]+)  +([\d.]+)  +([\d.]+)  +[\d.]+%$", text, re.MULTILINE)
    assert [int(step) for step, *_ in steps] == list(range(1, 13))
    assert all(float(nll) + 0.01 * float(kl) == pytest.approx(float(loss), abs=2e-4)
               for _, kl, nll, loss in steps)
    assert row(text, "RMSE of the mean to the sine")[1] == f"{found['sine']['rmse']:.3f}"
    assert row(text, "points inside mean +- 3 sd")[1] == f"{found['sine']['inside']:.1%}"
    free, frozen, again = found["freeze"]
    assert frozen == 0.0 and free > 0.0 and again > 0.0
    assert row(text, "iris, NLL")[1:] == [f"{nll:.4f}" for _, nll in found["averages"]]
    assert pictures(text, tmp_path) == [f"bayesian_neural_networks_{name}.png"
                                        for name in ("training", "iris", "sine")]
    assert all(part in bar for part in ("raw, seed 3", "standardised, seed 4", "plain", "60/60", "kl="))


def test_flowers_are_standardised_by_the_training_ones():
    flowers = iris.data("cpu")
    assert flowers.train_x.shape == (112, 4) and flowers.test_x.shape == (38, 4)
    near = flowers.standardised()
    torch.testing.assert_close(near.train_x.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(near.train_x.std(0), torch.ones(4))
    torch.testing.assert_close(near.test_x * flowers.train_x.std(0) + flowers.train_x.mean(0), flowers.test_x)
    assert near.test_y is flowers.test_y


def test_averaged_parameters():
    model = bayesian_neural_networks.bayesian(4, 5, 3)
    networks = [bf.draw(model, seed) for seed in range(3)]
    averaged = bayesian_neural_networks.averaged_parameters(networks).module
    for at in (0, 2):
        torch.testing.assert_close(averaged[at].weight, sum(n[at].weight for n in networks) / 3)
        torch.testing.assert_close(averaged[at].bias, sum(n[at].bias for n in networks) / 3)


def test_the_sine_keeps_the_parameters_of_the_smallest_loss(capsys):
    x, y = sine.data("cpu")
    torch.manual_seed(0)
    model = bayesian_neural_networks.bayesian(1, 4, 1)
    seen, losses = [], []
    model.register_forward_pre_hook(lambda model, inputs: seen.append(copy.deepcopy(model.state_dict())))
    model.register_forward_hook(lambda model, inputs, out: losses.append(
        ((out - y).square().mean() + bf.kl_divergence(model, "mean") / len(seen)).item()))
    best = sine.train(model, x, y, steps=30)
    assert best == 1 + int(np.argmin(losses))
    assert all(value.equal(seen[best - 1][name]) for name, value in model.state_dict().items())
    # the bar shows every twentieth step, the last time the 21st
    shown = re.findall(r"mse=([\d.]+), kl=([\d.]+), loss=([\d.]+)", capsys.readouterr().err)[-1]
    error, kl, loss = map(float, shown)
    assert loss == pytest.approx(error + kl / 21, abs=1e-3)


def test_minimise_yields_what_belongs_to_the_parameters(capsys):
    w = torch.nn.Parameter(torch.tensor(3.0))
    values = []
    for step, parts in common.minimise(lambda: {"loss": w.square()}, [w], steps=4, lr=0.5, label="square",
                                       decay=True):
        assert parts["loss"] == w.detach().square() and not parts["loss"].requires_grad
        values.append(w.item())
    # Adam's steps have about the length of the learning rate, here of half a cosine
    rates = [0.25 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    assert -np.diff([*values, w.item()]) == pytest.approx(rates, rel=0.1)


@pytest.mark.parametrize("arguments, holds, lacks", [
    (["--help"], [*(f"{name}: " for name in command.DEMOS), "--data"], []),
    (["digits", "--help"], ["Handwritten digits", "--data", "--epochs", "--seed", "--device", "--out"],
     ["bayes_by_backprop:"]),
    (["bayes_by_backprop", "--help"], ["Blundell", "5000"], ["--data", "digits:"]),
    (["variational_regression", "--help"], ["ten times as many", "1000"], ["--data"]),
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
def test_variational_regression_covers_and_the_prior_on_y_shrinks(tmp_path):
    for seed in range(3):
        found = variational_regression.run(seed=seed, out=str(tmp_path))
        assert 0.87 <= found["prior_on_weights"]["coverage"] <= 0.93
        assert found["prior_on_weights"]["slope"] == pytest.approx(1.0, abs=0.02)
        assert found["prior_on_y"]["coverage"] >= 0.985
        assert found["prior_on_y"]["slope"] == pytest.approx(0.6, abs=0.05)
        assert found["prior_on_y"]["sd"] == pytest.approx(4.6, abs=0.3)
        assert found["maximum_likelihood"]["rmse"] <= 0.5


@pytest.mark.slow
def test_bayesian_linear_regression_reaches_the_exact_posterior(tmp_path):
    for seed in range(5):
        found = bayesian_linear_regression.run(seed=seed, out=str(tmp_path))
        assert all(abs(error) <= 0.2 for error in found["mean_error"])
        assert all(0.9 <= ratio <= 1.1 for ratio in found["sd_ratio"])


@pytest.mark.slow
def test_bayesian_neural_networks_tell_iris_and_follow_the_sine(tmp_path):
    for seed in (0, 5, 10):
        found = bayesian_neural_networks.run(seed=seed, out=str(tmp_path))
        assert len(found["standardised"]) == 5 and min(found["standardised"]) >= 36
        assert 0.5 * 38 <= np.mean(found["raw"]) <= 0.85 * 38
        assert found["sine"]["rmse"] <= 0.2 and found["sine"]["inside"] >= 0.95
