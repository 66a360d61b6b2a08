"""Scores in closed form, against the integrals that define them."""
from __future__ import annotations

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

import bnn_fast as bf
from bnn_fast.inference import mixture, scores


class Answers(nn.Module):
    """Outputs x plus what the draw adds."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.layer = bf.VariationalLinear(1, outputs, init_sigma=0.4, dtype=torch.float64)
        self.outputs = outputs

    def forward(self, x):
        return x.repeat(1, self.outputs) + self.layer(x)


def integral(parts: list, y: float) -> float:
    """The integral of (F(t) - [t >= y])^2 (Gneiting and Raftery 2007, equation 20) of an equal mixture F."""
    def below(t):
        return (sum(part.cdf(t) for part in parts) / len(parts)) ** 2

    def above(t):
        return (sum(part.sf(t) for part in parts) / len(parts)) ** 2

    between = sorted({part.median() for part in parts})
    edges = [-math.inf, *(t for t in between if t < y), y, *(t for t in between if t > y), math.inf]
    return sum(scipy.integrate.quad(below if b <= y else above, a, b, limit=200, epsabs=1e-11)[0] for a, b in zip(edges, edges[1:]))


X = torch.tensor([[-0.5], [0.3], [2.0]], dtype=torch.float64)
Y = torch.tensor([[0.1], [0.2], [9.0]], dtype=torch.float64)
OF_SCIPY = {
    "gaussian": (lambda: bf.Gaussian(0.7), scipy.stats.norm, (0.7,)),
    "laplace": (lambda: bf.LaplaceNoise(0.7), scipy.stats.laplace, (0.7,)),
    "student": (lambda: bf.StudentTNoise(2.5, 0.7), lambda f, scale: scipy.stats.t(2.5, f, scale), (0.7,)),
}


@pytest.mark.parametrize("name, n_samples", [("gaussian", 7), ("laplace", 7), ("gaussian", 1), ("laplace", 1), ("student", 1)])
def test_a_mixture_has_the_score_of_its_definition(name, n_samples):
    make, of_scipy, scale = OF_SCIPY[name]
    likelihood = make()
    found = bf.predict(Answers(), X, likelihood, n_samples=n_samples, seed=1)
    expected = [integral([of_scipy(f, *scale) for f in found.samples[:, row, 0].tolist()], Y[row].item()) for row in range(3)]
    for row in range(3):
        assert found[row].crps(Y[row:row + 1]).item() == pytest.approx(expected[row], rel=1e-6)
    assert found.crps(Y).item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_a_gaussian_whose_scale_the_model_gives():
    found = bf.predict(Answers(2), X, bf.HeteroscedasticGaussian(), n_samples=5, seed=1)
    mean, log_variance = found._outputs.chunk(2, -1)
    parts = zip(mean[:, :, 0].T.tolist(), (0.5 * log_variance[:, :, 0]).exp().T.tolist())
    expected = [integral([scipy.stats.norm(m, scale) for m, scale in zip(*part)], y) for part, y in zip(parts, Y.flatten().tolist())]
    assert found.crps(Y).item() == pytest.approx(sum(expected) / 3, rel=1e-7)


def test_draws_that_are_all_alike_are_one():
    x, y = X[1:2], Y[1:2]
    found = bf.predict(Answers(), x, bf.StudentTNoise(2.5, 0.7), n_samples=10, mean=True)
    expected = integral([scipy.stats.t(2.5, found.mean.item(), 0.7)], y.item())
    assert found.crps(y).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("df", [1.01, 1.5, 2.0, 4.0, 31.0, 1e4])
def test_student_t(df):
    y = [-40.0, -1.3, 0.0, 1e-6, 0.4, 3.0]
    found = scores.of_student_t(df, torch.full((6,), 0.25, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64),
                                torch.tensor(y, dtype=torch.float64)).tolist()
    own = scipy.stats.t(df, 0.25, 1.7)
    assert found == pytest.approx([integral([own], each) for each in y], rel=1e-6)


@pytest.mark.parametrize("name", OF_SCIPY)
def test_of_more_draws_targets_are_drawn(name, monkeypatch):
    found = bf.predict(Answers(), X, OF_SCIPY[name][0](), n_samples=40, seed=1)
    exact = found.crps(Y).item()
    monkeypatch.setattr(mixture, "_PARTS", 39)
    drawn = found.crps(Y).item()
    assert drawn == pytest.approx(exact, rel=0.05)
    assert (drawn == exact) == (name == "student")  # whose draws differ: it is drawn either way


def test_a_cauchy_distribution_is_drawn():
    found = bf.predict(Answers(), X, bf.StudentTNoise(1.0), n_samples=1, seed=1)
    assert 0.0 < found.crps(Y).item() < math.inf
