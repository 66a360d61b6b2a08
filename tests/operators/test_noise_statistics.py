"""Is the noise standard normal and independent? Counted on the draws themselves, with fixed seeds.

Every statistic has a known distribution for independent standard normals. Where that is a standard normal z,
|z| < 4.5 is asked for (probability 7e-6 of failing by chance, had the seeds not been fixed); elsewhere a
p-value above 1e-5.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from headers.build import load
from scipy import stats

Z = 4.5
P = 1e-5
COLUMNS = 1 << 16
ROWS = 48  # 3.1 million draws


def noise(
    seed: int = 1, sample: int = 0, rows: int = ROWS, stream: int = 0, first_row: int = 0
) -> np.ndarray:
    """Noise [rows, COLUMNS] in float64, from the widest float32 lane type (all give the same bits)."""
    module = load()
    lane = max((width, name) for name, (width, dtype) in module.lanes().items() if dtype == "float32")[1]
    return np.stack(
        [module.draw(lane, seed, stream, sample, first_row + row, COLUMNS) for row in range(rows)]
    ).astype(np.float64)


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    return noise()


def moment_scores(x: np.ndarray) -> list[float]:
    """z of the mean of x^k, k = 1..4, whose expectations are 0, 1, 0, 3 and variances 1, 2, 15, 96."""
    return [
        float(((x**k).mean() - mean) * math.sqrt(x.size / variance))
        for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96))
    ]


def correlation_scores(x: np.ndarray, y: np.ndarray) -> list[float]:
    """z of the mean of x y (variance 1), and of (x^2 - 1)(y^2 - 1) (variance 4) for a dependence of sizes."""
    root = math.sqrt(x.size)
    return [float((x * y).mean() * root), float(((x**2 - 1) * (y**2 - 1)).mean() * root / 2)]


def poisson_p(count: int, expected: float) -> float:
    """Two-sided p-value of a count."""
    return min(1, 2 * min(stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected)))


@pytest.mark.parametrize(
    "seed, stream, sample", [(1, 0, 0), (1, 1, 0), (-1 % 2**64, 0, 5), (1 << 40, 0, 2**32 - 1)]
)
def test_moments(seed, stream, sample):
    x = noise(seed, sample, stream=stream)
    # all, and the four normals of a counter apart: they come from different words and functions
    for name, part in [("all", x), *((f"column {c} mod 4", x[:, c::4]) for c in range(4))]:
        scores = moment_scores(part)
        assert max(map(abs, scores)) < Z, (name, scores)


def test_kolmogorov_smirnov(draws):
    for part in (draws, *(draws[:, c::4] for c in range(4))):
        assert stats.kstest(part.ravel(), "norm").pvalue > P


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 64, 4096])
def test_neighbouring_columns(draws, lag):
    assert max(map(abs, correlation_scores(draws[:, :-lag], draws[:, lag:]))) < Z


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_the_normals_of_one_counter(draws, first, second):
    """Independent in pairs, and of the next counter's, by counts in 32 x 32 equally likely cells."""
    x, y = draws[:, first::4], draws[:, second::4]
    if second <= first:
        x, y = x[:, :-1], y[:, 1:]
    cells = (stats.norm.cdf(x) * 32).astype(np.int64) * 32 + (stats.norm.cdf(y) * 32).astype(np.int64)
    counts = np.bincount(cells.ravel(), minlength=1024)
    assert stats.chisquare(counts).pvalue > P


@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbouring_rows(draws, lag):
    assert max(map(abs, correlation_scores(draws[:-lag], draws[lag:]))) < Z


@pytest.mark.parametrize(
    "other",
    [
        {"sample": 1},
        {"stream": 1},
        {"seed": 2},
        {"seed": 1 | 1 << 32},
        {"seed": 1 | 1 << 63},
        {"first_row": ROWS},
        {"sample": 1 << 31},
    ],
    ids=str,
)
def test_neighbouring_samples_streams_and_seeds(draws, other):
    y = noise(**other)
    assert max(map(abs, correlation_scores(draws, y))) < Z
    # shifted too: a neighbour's noise must not be this noise moved along
    assert max(map(abs, correlation_scores(draws[:, 4:], y[:, :-4]))) < Z
    assert max(map(abs, correlation_scores(draws[1:], y[:-1]))) < Z


def check_tails(above: dict[float, int], below: dict[float, int], n: int) -> None:
    for sigma in above:
        expected = n * stats.norm.sf(sigma)
        counts = f"{above[sigma]} above, {below[sigma]} below, {expected:.2f} expected"
        print(f"beyond {sigma} sigma in {n} draws: {counts}")
        assert poisson_p(above[sigma], expected) > P
        assert poisson_p(below[sigma], expected) > P


def test_tails(draws):
    check_tails(
        {s: int((draws > s).sum()) for s in (3.0, 4.0, 5.0)},
        {s: int((draws < -s).sum()) for s in (3.0, 4.0, 5.0)},
        draws.size,
    )


@pytest.mark.slow
def test_hundreds_of_millions_of_draws():
    """2^28 draws: tails beyond 4, 5 and 6 sigma, moments, and counts in 1000 equally likely cells."""
    edges = stats.norm.ppf(np.linspace(0, 1, 1001)[1:-1])
    sigmas = (4.0, 5.0, 6.0)
    above, below = dict.fromkeys(sigmas, 0), dict.fromkeys(sigmas, 0)
    counts, sums, n = np.zeros(1000, dtype=np.int64), np.zeros(4), 0
    for block in range(64):
        x = noise(2024, rows=64, first_row=64 * block).ravel()
        n += x.size
        for s in sigmas:
            above[s] += int((x > s).sum())
            below[s] += int((x < -s).sum())
        counts += np.bincount(np.searchsorted(edges, x), minlength=1000)
        sums += [(x**k).sum() for k in (1, 2, 3, 4)]
    check_tails(above, below, n)
    assert stats.chisquare(counts).pvalue > P
    scores = (sums / n - [0, 1, 0, 3]) * np.sqrt(n / np.array([1, 2, 15, 96]))
    print(f"z of the first four moments over {n} draws: {scores.round(2)}")
    assert np.abs(scores).max() < Z
