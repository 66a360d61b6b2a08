"""What is taken and what is refused, and in which words."""
from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from common import network
from torch import distributions, nn

import bnn_fast as bf
from bnn_fast import checks, functional, metrics, plotting

X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
KEY = torch.tensor([1, 2])
PAIR = (torch.zeros(2, 3), torch.zeros(2, 3))


def test_numpys_numbers_are_numbers():
    model, i = network(), np.int64
    expected = bf.predict(model, X, n_samples=4, seed=3).samples
    for seed in (i(3), np.uint8(3), np.array(3)):
        assert torch.equal(bf.predict(model, X, n_samples=i(4), seed=seed, batch_size=i(100)).samples, expected)
    assert torch.equal(bf.mc_forward(model, X, i(4), seed=i(3)), expected)
    with bf.sampling(model, n_samples=np.int32(1), seed=i(3), first_sample=np.int16(2)):
        torch.testing.assert_close(model(X), expected[2])
    assert torch.equal(bf.draw(model, i(3), i(2))[0].weight, bf.draw(model, 3, 2)[0].weight)
    elbo = bf.ELBO(model, bf.Gaussian(np.float32(0.5)), np.int64(100), np.float64(0.5), seed=i(3))
    loss = elbo(X, torch.zeros(7, 2).double(), i(2))
    torch.testing.assert_close(loss, elbo.nll + 0.5 * elbo.kl / 100, check_dtype=False)
    elbo.step = i(4)
    assert elbo.step == 4 and bf.linear_warmup(i(4)) == bf.linear_warmup(4)
    assert bf.Normal(np.float32(1.0), np.int64(2)) == bf.Normal(1.0, 2.0)
    layer = bf.VariationalLinear(i(3), np.int32(2))
    assert repr(layer) == repr(bf.VariationalLinear(3, 2)) and type(layer.in_features) is int
    w, _ = functional.sample_normal(*PAIR, KEY, row_offset=i(1), column_offset=i(4), stream=i(1), n_samples=i(2))
    assert torch.equal(w, functional.sample_normal(*PAIR, KEY, row_offset=1, column_offset=4, stream=1, n_samples=2)[0])
    found = bf.predict(model, X, n_samples=9, seed=1)
    assert torch.equal(found.interval(np.float32(0.5))[0], found.interval(0.5)[0])
    assert torch.equal(found.quantile(np.array([0.1, 0.5])), found.quantile([0.1, 0.5]))
    probs, targets = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0])
    assert metrics.selective_accuracy(probs, targets, np.float32(0.5)) == 1.0
    assert len(metrics.reliability_bins(probs, targets, i(3))[0]) == 3


@pytest.mark.parametrize("bad", [True, np.True_, torch.tensor(1), 1.0, np.float64(1), "1", None, [1]], ids=repr)
def test_what_is_no_integer(bad):
    model = network()
    calls = {
        "n_samples": lambda: bf.mc_forward(model, X, bad), "batch_size": lambda: bf.predict(model, X, batch_size=bad),
        "first_sample": lambda: bf.sampling(model, first_sample=bad), "seed": lambda: bf.sampling(model, seed=bad),
        "steps": lambda: bf.linear_warmup(bad), "in_features": lambda: bf.VariationalLinear(bad, 2),
        "row_offset": lambda: functional.sample_normal(*PAIR, KEY, row_offset=bad),
        "column_offset": lambda: functional.variational_linear(torch.zeros(1, 3), *PAIR, None, None, KEY, column_offset=bad),
        "stream": lambda: functional.sample_normal(*PAIR, KEY, stream=bad)}
    for name, call in calls.items():
        if bad is None and name in ("seed", "batch_size"):
            continue
        with pytest.raises(TypeError, match=f"{name}: expected an integer"):
            call()


@pytest.mark.parametrize("make", [
    lambda bad: bf.ELBO(network(), bf.Gaussian(), bad), lambda bad: bf.ELBO(network(), bf.Gaussian(), 10, bad),
    lambda bad: bf.Gaussian(bad), lambda bad: bf.Normal(0.0, bad)])
@pytest.mark.parametrize("bad", [True, "1", None, [1.0]], ids=repr)
def test_what_is_no_number(make, bad):
    with pytest.raises((TypeError, ValueError), match="expected"):
        make(bad)


def test_priors_of_torch_distributions():
    """As numbers, or broadcast to the weight's shape; never silently as something else."""
    layer = bf.VariationalLinear(3, 2, prior=distributions.Normal(0.5, 2.0))
    assert layer.prior == layer.bias_prior == bf.Normal(0.5, 2.0)
    prior = distributions.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    layer = bf.VariationalLinear(3, 2, prior=prior, bias_prior=distributions.Normal(0.0, torch.ones(2)))
    assert layer.prior == bf.Normal(torch.zeros(2, 3), torch.tensor([1.0, 2.0, 3.0]).expand(2, 3))
    expected = sum(distributions.kl_divergence(distributions.Normal(mu, sigma), p).sum() for mu, sigma, p in (
        (layer.weight_mu, layer.weight_sigma, prior), (layer.bias_mu, layer.bias_sigma, distributions.Normal(0.0, 1.0))))
    torch.testing.assert_close(bf.kl_divergence(layer), expected)
    torch.testing.assert_close(functional.kl_normal(*PAIR, prior=prior),
                               functional.kl_normal(*PAIR, prior=bf.Normal(prior.loc.expand(2, 3), prior.scale.expand(2, 3))))
    w, kl = functional.sample_normal(*PAIR, KEY, prior=distributions.Normal(0.5, 2.0))
    torch.testing.assert_close(kl, functional.sample_normal(*PAIR, KEY, prior=bf.Normal(0.5, 2.0))[1])
    for bad, error, message in (
            (distributions.Normal(torch.zeros(2), 1.0), ValueError, r"prior.loc: expected to broadcast to \[2, 3\]"),
            (distributions.Laplace(0.0, 1.0), TypeError, "prior: expected a Normal, given Laplace.*bnn_fast.Normal and"),
            (distributions.Normal(torch.tensor(0.0, requires_grad=True), 1.0), TypeError, "does not require grad"),
            (bf.Normal, TypeError, "prior: expected a Normal, given the class Normal")):
        with pytest.raises(error, match=message):
            bf.VariationalLinear(3, 2, prior=bad, bias_prior=bf.Normal())


def test_a_prior_is_a_constant_and_a_layers_prior_can_be_set():
    layer = bf.VariationalLinear(3, 2)
    for prior in (layer.prior, bf.Normal()):
        with pytest.raises(AttributeError, match=r"a prior is a constant, its loc cannot be set.*layer.prior ="):
            prior.loc = 5.0
        assert copy.deepcopy(prior) == pickle.loads(pickle.dumps(prior)) == bf.Normal()
    layer(torch.zeros(1, 3))
    before = bf.kl_divergence(layer)
    layer(torch.zeros(1, 3))  # its KL is to the prior before
    layer.prior = bf.Normal(1.0, 3.0)
    assert layer.prior == bf.Normal(1.0, 3.0) and layer.bias_prior == bf.Normal()
    same = bf.VariationalLinear(3, 2, prior=bf.Normal(1.0, 3.0), bias_prior=bf.Normal())
    same.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(bf.kl_divergence(layer), bf.kl_divergence(same))
    assert not torch.equal(bf.kl_divergence(layer), before)
    layer.prior, layer.bias_prior = bf.Normal(torch.ones(2, 3), 2.0), distributions.Normal(torch.zeros(2), 1.0)
    assert {"prior_loc", "bias_prior_loc", "bias_prior_scale"} <= set(layer.state_dict())
    assert torch.equal(layer.prior.loc, torch.ones(2, 3)) and layer.prior.scale == 2.0
    layer(torch.zeros(1, 3))
    with torch.no_grad():
        layer.prior_loc.mul_(3.0)  # nor is the KL of this pass the one to the prior as it is now
    found, layer.prior = bf.kl_divergence(layer), bf.Normal(3 * torch.ones(2, 3), 2.0)
    torch.testing.assert_close(found, bf.kl_divergence(layer))
    layer.prior = bf.Normal(torch.ones(2, 3), 2.0)
    for bad, error in ((bf.Normal(torch.ones(3), 1.0), ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="prior"):
            layer.prior = bad
    assert layer.prior.scale == 2.0 and torch.equal(layer.prior.loc, torch.ones(2, 3)), "nothing half done"
    layer.prior = bf.Normal()
    assert "prior_loc" not in layer.state_dict() and layer.prior == bf.Normal()


@pytest.mark.parametrize("value, text", [
    (tuple(torch.arange(1000.0).split(1)), "tuple of 1000, the first a float32 tensor [1] on cpu"),
    (list(range(10 ** 5)), "list of 100000, the first int 0"), (np.zeros((3, 2)), "a numpy float64 array [3, 2]"),
    (bf.Gaussian, "the class Gaussian"), ({}, "dict of 0"), (1.5, "float 1.5"), (None, "NoneType None"),
    ("a" * 500, f"str '{'a' * 56}..."), (nn.Sequential(nn.Linear(1, 1)), "Sequential Sequential( (0): Linear(")])
def test_what_was_given_is_told_in_a_few_words(value, text):
    found = checks.describe(value)
    assert found.startswith(text) and len(found) < 100


@pytest.mark.parametrize("call, error, message", [
    (lambda m: bf.predict(m, X[0]), ValueError,
     r"x: expected a last dimension of 3 \(in_features\), given \[3\] for each of 100 draws; a single row is x.unsqueeze"),
    (lambda m: bf.predict(m, X[:, :2]), ValueError, r"given \[7, 2\] for each of 100 draws"),
    (lambda m: bf.predict(m, X[0], n_samples=1), ValueError, r"model: expected an output with .* for x \[3\]"),
    (lambda m: bf.predict(m, (X, X)), TypeError, r"x: expected the one input that an nn.Sequential has, .* given tuple of 2"),
    (lambda m: m(None), TypeError, r"x: expected a tensor \[..., 3\], given NoneType"),
    (lambda m: m([1.0, 2.0, 3.0]), TypeError, r"x: expected a tensor \[..., 3\], given list of 3"),
    (lambda m: m(np.zeros((7, 3))), TypeError, "x: expected torch.float64 as the parameters have, given a numpy"),
    (lambda m: m(X[:, :2]), ValueError, r"x: expected a last dimension of 3"),
    (lambda m: bf.ELBO(m, bf.Gaussian, 10), TypeError, "likelihood: expected one such as .* given the class Gaussian"),
    (lambda m: bf.ELBO(m, None, 10), TypeError, "likelihood: expected one such as"),
    (lambda m: bf.ELBO(type(m), bf.Gaussian(), 10), TypeError, "model: expected an nn.Module, given the class Sequential"),
    (lambda m: bf.ELBO(m, bf.Gaussian(), 10, bf.linear_warmup), TypeError, "kl_weight: expected a number or a callable"),
    (lambda m: bf.kl_divergence(X), TypeError, "model: expected an nn.Module, given a float64 tensor"),
    (lambda m: bf.predict(X, m), TypeError, "model: expected an nn.Module, given a float64 tensor"),
    (lambda m: bf.freeze(None), TypeError, "model: expected an nn.Module"),
    (lambda m: bf.VariationalLinear(-1, 2), ValueError, "in_features: expected at least 0, given -1"),
])
def test_refused_in_these_words(call, error, message):
    with pytest.raises(error, match=message):
        call(network())


def test_a_wrong_x_is_refused_at_the_means_too():
    model = network()
    with bf.sampling(model, mean=True):
        for x, error in ((X[:, :2], ValueError), (None, TypeError), (X.float(), TypeError)):
            with pytest.raises(error, match="x: expected"):
                model(x)


@pytest.mark.parametrize("metric", [metrics.brier_score, metrics.nll, metrics.selective_accuracy,
                                    metrics.expected_calibration_error])
def test_metrics_of_one_column(metric):
    probs, targets = torch.tensor([[0.9], [0.2]]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match=r"probs: expected at least two classes.*\[2\] \(probs.squeeze\(-1\)\), given"):
        metric(probs, targets)
    torch.testing.assert_close(metric(probs, targets[:, None]), metric(probs[:, 0], targets))
    with pytest.raises(TypeError, match="targets: expected a tensor"):
        metric(probs[:, 0], targets.numpy())
    with pytest.raises(ValueError, match="targets: expected classes 0 to 1, given 0 to 2"):
        metric(torch.full((2, 2), 0.5), torch.tensor([0, 2]))


def test_models_without_variational_layers_are_told_of_once():
    def made():
        return nn.Sequential(nn.Linear(3, 2), nn.ReLU())

    x = torch.zeros(4, 3)
    for call, message in (
            (bf.kl_divergence, "the KL is 0"), (lambda m: bf.predict(m, x, n_samples=3), "its draws are all the same"),
            (lambda m: bf.ELBO(m, bf.Gaussian(), 4)(x, torch.zeros(4, 2)), "there is no KL")):
        model = made()
        with pytest.warns(UserWarning, match=f"model: expected variational layers, found none in Sequential: {message}") as w:
            call(model)
        assert len(w) == 1 and w[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(model)
            bf.predict(made(), x, n_samples=1)
            bf.kl_divergence(network())


PICTURES = {
    "band": lambda a, **o: plotting.regression_band(a(X[:, 0]), a(X[:, 1]), a(X[:, 1] - 1), a(X[:, 1] + 1),
                                                    data=(a(X[:, 0]), a(X[:, 2])), curve=a(X[:, 2]), **o),
    "lines": lambda a, **o: plotting.sample_lines(a(X[:, 0]), a(X[:, :2].T), curve=a(X[:, 2]), **o),
    "reliability": lambda a, **o: plotting.reliability_diagram(a(X.softmax(-1)), a(X.argmax(-1)), **o),
    "entropies": lambda a, **o: plotting.entropy_histograms(a(X.abs()), a(X.abs() + 1), **o),
    "curves": lambda a, **o: plotting.training_curves(a(X[:, 0].abs()), a(X[:, 1].abs()), **o),
    "images": lambda a, **o: plotting.image_grid(a(X[None]), **o),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_numpy_arrays(name):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    for convert in (lambda t: t, lambda t: t.numpy()[::-1][::-1]):
        ax = PICTURES[name](convert, ax=figure.Figure().subplots())
        drawn.append([line.get_xydata().tolist() for line in ax.lines]
                     + [path.vertices.tolist() for c in ax.collections for path in c.get_paths()])
    assert drawn[0] == drawn[1]


def test_plt_show_sees_the_figures_where_pyplot_is_imported():
    pytest.importorskip("matplotlib")
    code = """
import gc, sys, weakref, torch, bnn_fast as bf
kept = [weakref.ref(bf.plotting.image_grid(torch.rand(1, 2, 2)).figure) for _ in range(30)]
gc.collect()
assert "matplotlib.pyplot" not in sys.modules and not any(figure() for figure in kept), "nothing holds on to them"
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
ax = bf.plotting.image_grid(torch.rand(1, 2, 2))
assert plt.get_fignums() == [ax.figure.number] and plt.gca() is ax
plt.close(ax.figure)
assert not plt.get_fignums()
figure = plt.figure()
assert bf.plotting.image_grid(torch.rand(1, 2, 2), ax=figure.subplots()).figure is figure and len(plt.get_fignums()) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", [None, "a", 1.5, (1, 2), {}, np.zeros(3), torch.tensor(1), torch.zeros(7, 9)], ids=checks.describe)
def test_the_wrong_kind_of_thing_is_refused_by_name(bad):
    """TypeError or ValueError with what was expected, not what Python or torch stumble over further on."""
    model, y, classes = network(), torch.zeros(7, 2).double(), torch.zeros(7).long()
    found = bf.predict(model, X, bf.Gaussian(), n_samples=2)
    calls = {f"likelihood {i}": lambda a=a: a[0](bad, a[1]) for i, a in enumerate(
        ((bf.Gaussian(), y), (bf.HeteroscedasticGaussian(), y), (bf.Bernoulli(), y), (bf.Categorical(), classes)))}
    calls |= {f"targets {i}": lambda a=a: a[0](a[1], bad) for i, a in enumerate(
        ((bf.Gaussian(), y[None]), (bf.HeteroscedasticGaussian(), y[None]), (bf.Categorical(), y[None])))}
    calls |= {"check_parameters": lambda: bf.check_parameters(bad), "quantile": lambda: found.quantile(bad),
              "bias_mu": lambda: functional.variational_linear(torch.zeros(1, 3), *PAIR, bad, torch.zeros(2), KEY),
              "rmse": lambda: metrics.rmse(bad, y), "coverage": lambda: metrics.interval_coverage(y.long(), y.long(), y),
              "bias": lambda: bf.VariationalLinear(3, 2, bad), "mean": lambda: bf.predict(model, X, mean=bad)}
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match="expected") as caught:
            call()
        assert "given" in str(caught.value), name
