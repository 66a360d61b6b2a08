"""predict and what it returns."""
from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from common import network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf

predict_module, blocks_module = (sys.modules[f"bnn_fast.inference.{name}"] for name in ("predict", "blocks"))


@pytest.fixture
def x():
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def single_forwards(model, x, n_samples, seed):
    outputs = []
    with torch.no_grad():
        for s in range(n_samples):
            with bf.sampling(model, seed=seed, first_sample=s):
                outputs.append(model(x))
    return torch.stack(outputs)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 7, 15, 1000])
def test_outputs_are_those_of_single_forwards(twin, x, batch_size):
    model = network().eval()
    expected = single_forwards(model, x, 6, seed=3)
    found = bf.predict(model, x, n_samples=6, seed=3, batch_size=batch_size)
    assert found.samples.shape == (6, 7, 2) and found.n_samples == 6
    torch.testing.assert_close(found.samples, expected)
    torch.testing.assert_close(found.mean, expected.mean(0))
    torch.testing.assert_close(found.std, expected.std(0))
    assert not found.mean.requires_grad


class Spy(nn.Module):
    """A layer whose output is its weight: noise, and nothing that could round it."""

    def __init__(self):
        super().__init__()
        self.layer = bf.VariationalLinear(5, 3, bias=False)
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.layer(x)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 10, None])
def test_noise_is_the_same_bit_for_bit_however_it_is_chunked(twin, batch_size):
    spy, eye = Spy(), torch.eye(5)
    found = bf.predict(spy, eye, n_samples=11, seed=4, batch_size=batch_size).samples
    if batch_size is not None:
        assert max(spy.rows) <= max(batch_size, 1)
    for s, w in enumerate(found):
        with bf.sampling(spy, seed=4, first_sample=s):
            assert torch.equal(w, torch.cat([spy(row[None]) for row in eye]))


def test_mean_and_standard_deviation_are_exact_over_many_chunks(monkeypatch):
    monkeypatch.setattr(blocks_module, "_BLOCK", 50)
    monkeypatch.setattr(blocks_module, "KEPT_BYTES", 0)

    class Far(nn.Module):
        """Outputs with a mean 10^8 times their deviation."""

        def __init__(self):
            super().__init__()
            self.layer = bf.VariationalLinear(2, 3, dtype=torch.float64)

        def forward(self, x):
            return 1e-3 * self.layer(x) + 1e3

    model, x = Far(), torch.randn(9, 2, dtype=torch.float64)
    found = bf.predict(model, x, n_samples=301, seed=0, batch_size=20)
    expected = bf.mc_forward(model, x, 301, seed=0).detach().numpy()
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.std, expected.std(0, ddof=1), rtol=1e-7)


def test_float32_outputs_are_summed_in_float64():
    layer = bf.VariationalLinear(1, 1)
    found = bf.predict(layer, torch.ones(1, 1), n_samples=100_000, seed=0)
    draws = found.samples.double()
    assert found.mean.dtype == found.std.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), draws.mean(0), rtol=6e-8, atol=0)
    torch.testing.assert_close(found.std.double(), draws.std(0), rtol=6e-8, atol=0)
    low = bf.predict(layer, torch.ones(1, 1).bfloat16(), n_samples=3)
    assert low.mean.dtype == low.samples.dtype == torch.float32


def test_without_a_seed_one_fresh_draw_holds_for_the_whole_call(twin, x):
    model = network()
    torch.manual_seed(0)
    together = bf.predict(model, x, n_samples=4)
    torch.manual_seed(0)
    apart = bf.predict(model, x, n_samples=4, batch_size=2)
    torch.testing.assert_close(together.samples, apart.samples)
    assert not torch.equal(together.mean, bf.predict(model, x, n_samples=4).mean)


def test_more_dimensions_no_rows_and_one_draw(twin, x):
    model = network()
    found = bf.predict(model, x[:6].reshape(2, 3, 3), n_samples=4, seed=1, batch_size=3)
    assert found.mean.shape == (2, 3, 2) and found.quantile([0.1, 0.2, 0.3]).shape == (3, 2, 3, 2)
    torch.testing.assert_close(found.mean.flatten(0, 1), bf.predict(model, x[:6], n_samples=4, seed=1).mean)
    empty = bf.predict(model, x[:0], n_samples=4)
    assert empty.mean.shape == (0, 2) and empty.quantile([0.1, 0.5]).shape == (2, 0, 2)
    one = bf.predict(model, x, bf.Gaussian(), n_samples=1)
    assert one.std.isnan().all() and one.mean.isfinite().all() and one.quantile(0.5).isfinite().all()


def test_memory_does_not_grow_with_the_draws(monkeypatch):
    """Neither the rows of a call nor the draws that are held."""
    monkeypatch.setattr(blocks_module, "KEPT_BYTES", 4 * 11 * 5 * 3 - 1)
    spy = Spy()
    found = bf.predict(spy, torch.eye(5), n_samples=11, batch_size=10)
    assert found.mean.shape == found.std.shape == (5, 3) and max(spy.rows) == 10
    for ask in (lambda: found.samples, lambda: found.quantile(0.5), lambda: found.interval(),
                lambda: found.cdf(found.mean)):
        with pytest.raises(RuntimeError, match=r"the 11 draws of \[5, 3\] were not kept.*fewer rows"):
            ask()
    assert bf.predict(spy, torch.eye(5), n_samples=10).samples.shape == (10, 5, 3)
    spy.rows.clear()
    bf.predict(spy, torch.zeros(20000, 5), n_samples=2)
    assert max(spy.rows) <= 16384
    spy.layer = nn.Flatten()
    spy.rows.clear()
    bf.predict(spy, torch.zeros(100, 1000, 1000).expand(100, 1000, 1000)[:20], n_samples=1)
    assert max(spy.rows) == 4


def test_modes_and_draws_are_restored(twin, x):
    model = nn.Sequential(network(), nn.Dropout(0.5), nn.BatchNorm1d(2).double())
    model[2].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    first = bf.predict(model, x, n_samples=5, seed=1)
    assert seen and not any(seen)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(first.mean, bf.predict(model, x, n_samples=5, seed=1).mean)

    for error in (KeyboardInterrupt, RuntimeError):
        calls = []

        def interrupt(*_):
            calls.append(1)
            if len(calls) == 3:
                raise error

        handle = model[1].register_forward_hook(interrupt)
        with pytest.raises(error):
            bf.predict(model, x, n_samples=5, seed=1, batch_size=7, progress=True)
        handle.remove()
        assert [module.training for module in model.modules()] == modes
        assert not torch.equal(model[0](x), model[0](x)), "the draw is no longer pinned"
        assert torch.is_grad_enabled()


def test_a_draw_pinned_outside_is_there_again(x):
    model = network()
    with bf.sampling(model, seed=1):
        before = model(x)
        bf.predict(model, x, n_samples=3)
        assert torch.equal(model(x), before)


def test_progress(x, capsys):
    pytest.importorskip("tqdm")
    bf.predict(network(), x, n_samples=6)
    bf.predict(network(), x, n_samples=6, progress=None)
    assert capsys.readouterr().err == "", "short, or not asked for"
    bf.predict(network(), x, n_samples=6, progress=True)
    assert "42.0/42.0" in capsys.readouterr().err


def test_a_long_prediction_shows_its_progress(x, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(predict_module, "_BAR_AFTER", 1e-3)
    model = network()
    model[1].register_forward_hook(lambda *_: __import__("time").sleep(0.15))
    bf.predict(model, x, n_samples=3, progress=None, batch_size=7)
    assert "21.0/21.0" in capsys.readouterr().err


def test_progress_without_tqdm(x, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    bf.predict(network(), x, n_samples=2)
    with pytest.raises(ModuleNotFoundError, match="progress: a bar needs tqdm"):
        bf.predict(network(), x, n_samples=2, progress=True)


@pytest.mark.parametrize("call, error, message", [
    (lambda m, x: bf.predict(m, 1.0), TypeError, r"x: expected a tensor \[B, ...\], given float 1.0"),
    (lambda m, x: bf.predict(m, x, n_samples=0), ValueError, "n_samples: expected at least 1, given 0"),
    (lambda m, x: bf.predict(m, x, batch_size=0), ValueError, "batch_size: expected at least 1, given 0"),
    (lambda m, x: bf.predict(m, x, batch_size=2.0), TypeError, "batch_size: expected an integer"),
    (lambda m, x: bf.predict(m, x, nn.MSELoss()), TypeError, "likelihood: expected None.*given MSE"),
    (lambda m, x: bf.predict(m, x, bf.Gaussian), TypeError, "likelihood: expected None, Gaussian"),
    (lambda m, x: bf.predict(m, x, seed=1.5), TypeError, "seed: expected an integer or None"),
    (lambda m, x: bf.predict(nn.Sequential(m, nn.Flatten(0)), x), ValueError,
     "model: expected an output with"),
    (lambda m, x: bf.predict(nn.Sequential(m, nn.Linear(2, 3).double()), x, bf.HeteroscedasticGaussian()),
     ValueError, r"model: expected outputs \[B, ..., 2 D\], means and then log-variances, given \[7, 3\]"),
    (lambda m, x: bf.predict(nn.Sequential(m, nn.Flatten(0), nn.Unflatten(0, (-1, 2)), Argmax()), x),
     TypeError, "model: expected floating-point outputs, given a int64"),
    (lambda m, x: bf.predict(m, x).quantile(1.1), ValueError,
     "q: expected one or several numbers from 0 to 1,"),
    (lambda m, x: bf.predict(m, x).quantile([[0.1]]), ValueError, "q: expected one or several numbers"),
    (lambda m, x: bf.predict(m, x).quantile(math.nan), ValueError, "q: expected one or several numbers"),
    (lambda m, x: bf.predict(m, x, bf.Gaussian()).quantile(0.0), ValueError, "the ends excluded"),
    (lambda m, x: bf.predict(m, x).interval(1.0), ValueError, "level: expected a number between 0 and 1"),
    (lambda m, x: bf.predict(m, x).cdf(x), ValueError, r"y: expected a tensor \[7, 2\]"),
    (lambda m, x: bf.predict(m, x, bf.Gaussian()).log_prob(x), ValueError,
     r"targets: expected a tensor \[7, 2\]"),
])
def test_bad_arguments(x, call, error, message):
    with pytest.raises(error, match=message):
        call(network(), x)


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1)
