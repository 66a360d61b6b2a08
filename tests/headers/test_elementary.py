"""exp, log and log1p of csrc/elementary.h against wider types; bounds: a little above the maxima measured."""

from __future__ import annotations

import numpy as np
import pytest
from headers.ulp import ulps

RANDOM = np.random.default_rng(0)
MAX = float(np.finfo(np.float32).max)


def random_bits(low: float, high: float, n: int = 2_000_000) -> np.ndarray:
    """Positive floats whose bit patterns are uniform between those of low and high."""
    ends = np.array([low, high], dtype=np.float32).view(np.uint32)
    return RANDOM.integers(ends[0], ends[1], n, dtype=np.uint32, endpoint=True).view(np.float32)


INPUTS = {
    "log": (random_bits(2.0**-126, MAX), np.linspace(0.25, 4, 2_000_001, dtype=np.float32)),
    "log1p": (random_bits(0, 1), np.linspace(0, 1, 2_000_001, dtype=np.float32)),
    "exp": (
        random_bits(0, 88.72283),
        -random_bits(0, 104),
        np.linspace(-104, 88.72283, 4_000_001, dtype=np.float32),
    ),
}
BOUNDS = {"log": 1.2, "log1p": 1.8, "exp": 1.1}


@pytest.mark.parametrize("function", BOUNDS)
def test_float_accuracy(headers, function):
    x = np.concatenate(INPUTS[function])
    errors = ulps(
        headers.elementary("scalar_float", function, x), getattr(np, function)(x.astype(np.float64))
    )
    worst = errors.argmax()
    print(f"{function}: at most {errors[worst]:.3f} ulp over {x.size} values, at {x[worst]!r}")
    assert errors[worst] <= BOUNDS[function]


@pytest.mark.parametrize("function", BOUNDS)
def test_double_accuracy(headers, function):
    x = np.concatenate(INPUTS[function])[::10].astype(np.float64)
    errors = ulps(
        headers.elementary("scalar_double", function, x), getattr(np, function)(x.astype(np.longdouble))
    )
    print(f"{function}: at most {errors.max():.3f} ulp in double")
    assert errors.max() <= 1


@pytest.mark.parametrize("function", BOUNDS)
def test_every_lane_type_gives_the_scalars_bits(headers, float_lanes, function):
    x = np.concatenate(INPUTS[function])[:-3]
    expected = headers.elementary("scalar_float", function, x)
    for lane in float_lanes:
        assert np.array_equal(
            headers.elementary(lane, function, x).view(np.uint32), expected.view(np.uint32)
        ), lane


def test_exp_beyond_the_range(headers):
    for lane, (_, dtype) in headers.lanes().items():
        x = np.array([0, 1e4, np.inf, -1e4, -np.inf, -0.0], dtype=dtype)
        assert headers.elementary(lane, "exp", x).tolist() == [1, np.inf, np.inf, 0, 0, 1]
        assert np.isnan(headers.elementary(lane, "exp", np.full(17, np.nan, dtype=dtype))).all()
    over = np.linspace(88.722839, 89.5, 1000, dtype=np.float32)
    assert (headers.elementary("scalar_float", "exp", over) == np.inf).all()
