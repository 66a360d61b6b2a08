"""Predictions put together, indexed, moved, saved and loaded."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf

LIKELIHOODS = {"none": (None, 3), "gaussian": (bf.Gaussian(0.5, learned=True), 3), "heteroscedastic": (bf.HeteroscedasticGaussian(), 4),
               "bernoulli": (bf.Bernoulli(), 3), "categorical": (bf.Categorical(), 3)}
WHAT = ("mean", "std", "samples", "epistemic", "aleatoric", "entropy", "mutual_information")


def same(a, b):
    assert type(a) is type(b) and a.n_samples == b.n_samples and len(a) == len(b)
    for name in WHAT:
        if hasattr(a, name):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    torch.testing.assert_close(a.quantile([0.1, 0.6]), b.quantile([0.1, 0.6]))


@pytest.fixture(params=LIKELIHOODS)
def made(request):
    torch.manual_seed(0)
    likelihood, width = LIKELIHOODS[request.param]
    model, x = nn.Sequential(bf.VariationalLinear(2, width)), torch.randn(8, 2)
    return lambda rows: bf.predict(model, x[rows], likelihood, n_samples=5, seed=3, batch_size=1)


def test_rows_and_concatenation(made):
    whole = made(slice(None))
    assert len(whole) == 8
    for rows in (slice(2, 5), slice(None, None, 3), [1, 0, 7], torch.tensor([True, False] * 4), torch.tensor([3, 3])):
        same(whole[rows], made(rows))
    assert len(whole[[]]) == 0 == len(whole[:0])
    same(whole[torch.tensor(3)], made([3]))
    same(whole[3], made([3]))
    same(whole[-1], made([7]))
    same(bf.Prediction.cat([made(slice(0, 3)), made(slice(3, 8))]), whole)
    same(bf.Prediction.cat(whole[i] for i in range(8)), whole)
    same(bf.Prediction.cat([whole]), whole)


def test_saved_moved_and_loaded(made, tmp_path):
    whole = made(slice(None))
    whole.save(tmp_path / "prediction.pt")
    same(bf.Prediction.load(tmp_path / "prediction.pt"), whole)
    same(type(whole).load(tmp_path / "prediction.pt", map_location="cpu"), whole)
    same(whole.to("cpu"), whole)
    assert whole.to("meta").mean.device.type == "meta" and whole.mean.device.type == "cpu"
    part = whole[2:3]
    part.save(tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < (tmp_path / "prediction.pt").stat().st_size
    if hasattr(whole, "log_prob"):
        targets = torch.zeros_like(whole.mean)
        torch.testing.assert_close(bf.Prediction.load(tmp_path / "prediction.pt").log_prob(targets), whole.log_prob(targets))


def test_what_does_not_go_together(tmp_path):
    model, x = nn.Sequential(bf.VariationalLinear(2, 3)), torch.randn(8, 2)
    plain = bf.predict(model, x, n_samples=5)
    for other, words in ((bf.predict(model, x, n_samples=4), "number of draws, given 5 and 4"),
                         (bf.predict(model, x, bf.Categorical(), n_samples=5), "one class, given Prediction and ClassPrediction"),
                         (bf.predict(nn.Sequential(bf.VariationalLinear(2, 4)), x, n_samples=5), "rows of one shape")):
        with pytest.raises(ValueError, match=words):
            bf.Prediction.cat([plain, other])
    a, b = bf.Gaussian(0.5, learned=True), bf.Gaussian(0.5 + 1e-7, learned=True)
    assert repr(a) == repr(b)
    with pytest.raises(ValueError, match="with one likelihood"):
        bf.Prediction.cat([bf.predict(model, x, a, n_samples=5), bf.predict(model, x, b, n_samples=5)])
    for nothing in ([], [1], 3):
        with pytest.raises(TypeError):
            bf.Prediction.cat(nothing)
    for rows, error in ((8, IndexError), (-9, IndexError), (1.5, TypeError), ([True, False], IndexError), (torch.zeros(2, 2).long(), IndexError)):
        with pytest.raises(error, match="rows: expected"):
            plain[rows]
    with pytest.raises(ValueError, match="rows: expected a slice with a positive step"):
        plain[::-1]
    with pytest.raises(TypeError, match="path: expected a ClassPrediction"):
        plain.save(tmp_path / "p.pt")
        bf.ClassPrediction.load(tmp_path / "p.pt")


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Uu]nsupported|weights_only|Weights only"):
        bf.Prediction.load(tmp_path / "evil.pt")


def test_iterating_ends():
    found = bf.predict(nn.Sequential(bf.VariationalLinear(2, 3)), torch.randn(4, 2), n_samples=5)
    assert [len(row) for row in found] == [1] * 4
