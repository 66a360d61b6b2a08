"""csrc/posterior.h and csrc/divergence.h against long double, for the five meanings of rho."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headers.ulp import spread, ulps

from bnn_fast import checks
from bnn_fast.priors import scales

SCALES = tuple(checks.SCALES)
# Where sigma fits float32, subnormals included.
RANGES = {"softplus": (-120, 120), "exp": (-103.9, 88.7228), "sqrt_exp": (-207.8, 177.4456), "square": (-1.8e19, 1.8e19),
          "identity": (-3e38, 3e38)}
# Largest error in ulp of sigma, its derivative and that of log sigma, a little above what was measured.
BOUNDS = {
    "scalar_float": {"softplus": (2.0, 2.4, 3.6), "exp": (1.1, 1.1, 0), "sqrt_exp": (1.1, 1.1, 0)},
    "scalar_double": {"softplus": (1.6, 2.4, 3.6), "exp": (0.6, 0.6, 0), "sqrt_exp": (0.6, 0.6, 0)},
}


def rhos(scale: str, dtype, n: int = 1_000_000) -> np.ndarray:
    """Sweeps of the whole range and of its middle; values of every exponent with random digits and signs."""
    low, high = RANGES[scale]
    random = np.random.default_rng(0)
    any_exponent = random.choice([-1, 1], n) * np.exp(random.uniform(-60, np.log(min(-low, high)), n))
    return np.concatenate([np.linspace(low, high, n), np.linspace(-20, 20, n), any_exponent]).astype(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("lane", BOUNDS)
def test_accuracy(headers, lane, scale):
    rho = rhos(scale, headers.lanes()[lane][1], 1_000_000 if lane == "scalar_float" else 200_000)
    sigma, log_sigma, d_sigma, d_log_sigma = headers.spread(lane, SCALES.index(scale), rho)
    truth = spread(rho, SCALES.index(scale))
    for name, got, true, bound in zip(
        ("sigma", "sigma'", "(log sigma)'"),
        (sigma, d_sigma, d_log_sigma),
        truth[[0, 2, 3]],
        BOUNDS[lane].get(scale, (0.5, 0, 0.5)),  # one correctly rounded operation each, or none
    ):
        errors = ulps(got, true)
        print(f"{lane} {scale} {name}: at most {errors.max():.3f} ulp, at {rho[errors.argmax()]!r}")
        assert errors.max() <= bound
    # log sigma passes through 0, where the error of a KL counts beside 1
    errors = np.abs(log_sigma - truth[1]) / np.maximum(np.abs(truth[1]), 1) / np.finfo(rho.dtype).eps
    print(f"{lane} {scale} log sigma: at most {errors.max():.3f} epsilon of max(|log sigma|, 1)")
    assert errors.max() <= {"softplus": 2.2, "square": 1.1, "identity": 1.1}.get(scale, 0)


@pytest.mark.parametrize("scale", SCALES)
def test_every_lane_type_gives_the_scalars_bits(headers, float_lanes, scale):
    rho = np.concatenate([rhos(scale, np.float32, 200_000), np.float32([-np.inf, np.inf, 1e4, -1e4, 0.0])])
    expected = headers.spread("scalar_float", SCALES.index(scale), rho).view(np.uint32)
    for lane in float_lanes:
        assert np.array_equal(headers.spread(lane, SCALES.index(scale), rho).view(np.uint32), expected), lane


@pytest.mark.parametrize("scale", SCALES)
def test_the_reference_is_within_4_ulp(headers, scale):
    for lane, dtype in (("scalar_float", np.float32), ("scalar_double", np.float64)):
        rho = rhos(scale, dtype, 200_000)
        sigma, log_sigma, d_sigma, d_log_sigma = headers.spread(lane, SCALES.index(scale), rho)
        wide = np.float64 if dtype == np.float32 else np.longdouble
        x = torch.from_numpy(rho).requires_grad_()
        for value, derivative, plain in (
            (sigma, d_sigma, scales.sigma_of),
            (log_sigma, d_log_sigma, scales.log_sigma_of),
        ):
            y = plain(x, scale)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            if plain is scales.sigma_of:
                assert ulps(y.detach().numpy(), value.astype(wide)).max() <= 4
            else:
                np.testing.assert_allclose(
                    y.detach().numpy(), value, rtol=4 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps
                )
            assert ulps(gradient.numpy(), derivative.astype(wide)).max() <= 6


@pytest.mark.parametrize("scale", range(len(SCALES)))
def test_a_pruned_weight_has_no_spread(headers, scale):
    for lane, (_, dtype) in headers.lanes().items():
        sigma, log_sigma, d_sigma, _ = headers.spread(lane, scale, np.full(19, -np.inf, dtype=dtype))
        assert (sigma == 0).all() and (d_sigma == 0).all() and (log_sigma == -np.inf).all()


def divergence_inputs(scale: str, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mu, rho and eps, where no square overflows or underflows."""
    random = np.random.default_rng(3)
    n = 200_000
    high = {"exp": 40, "sqrt_exp": 80}.get(scale, 120)
    rho = np.concatenate([random.uniform(-120, high, n), random.uniform(-8, 3, n)])
    mu = random.normal(size=2 * n) * np.exp(random.uniform(-10, 5, 2 * n))
    return tuple(x.astype(dtype) for x in (mu, rho, random.normal(size=2 * n)))


@pytest.mark.parametrize("loc, prior_scale", [(0.0, 1.0), (0.25, 0.05), (-3.0, 20.0)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("lane", ["scalar_float", "scalar_double"])
def test_divergence_accuracy(headers, lane, scale, loc, prior_scale):
    """Sums cancel, so errors count beside the sum of the terms' sizes, in units of the type's epsilon."""
    dtype = headers.lanes()[lane][1]
    mu, rho, eps = divergence_inputs(scale, dtype)
    got = headers.divergence(lane, SCALES.index(scale), mu, rho, eps, loc, prior_scale)
    sigma, log_sigma, d_sigma, d_log_sigma = spread(rho, SCALES.index(scale))
    m, t = (np.longdouble(dtype.type(p)) for p in (loc, prior_scale))
    mu, eps = mu.astype(np.longdouble), eps.astype(np.longdouble)
    w = mu + sigma * eps
    log_ratio = np.log(t) - log_sigma
    log_size = np.abs(np.log(t)) + np.maximum(np.abs(log_sigma), 1)  # log sigma itself passes through 0
    shift = (np.abs(mu) + np.abs(m)) / t  # before mu - m cancels
    drawn = (np.abs(mu) + np.abs(sigma * eps) + np.abs(m)) / t
    truths = [
        (
            "analytic KL",
            log_ratio + (sigma**2 + (mu - m) ** 2) / (2 * t**2) - 0.5,
            log_size + ((sigma / t) ** 2 + shift**2) / 2 + 0.5,
        ),
        (
            "sampled KL",
            log_ratio - eps**2 / 2 + (w - m) ** 2 / (2 * t**2),
            log_size + (eps**2 + drawn**2) / 2,
        ),
        ("KL by mu", (mu - m) / t**2, shift / t),
        ("KL by rho", sigma * d_sigma / t**2 - d_log_sigma, np.abs(sigma * d_sigma) / t**2 + np.abs(d_log_sigma)),
    ]
    for (name, truth, size), values in zip(truths, got):
        error = (np.abs(values - truth) / np.maximum(size, np.finfo(dtype).tiny)).max() / np.finfo(dtype).eps
        print(f"{lane} {scale} {name} N({loc}, {prior_scale}): {error:.2f} epsilon of the terms")
        assert error <= 4


@pytest.mark.parametrize("scale", range(len(SCALES)))
def test_every_lane_type_gives_the_scalars_divergence(headers, float_lanes, scale):
    inputs = [x[:-5] for x in divergence_inputs(SCALES[scale], np.float32)]
    expected = headers.divergence("scalar_float", scale, *inputs, 0.25, 0.5).view(np.uint32)
    for lane in float_lanes:
        got = headers.divergence(lane, scale, *inputs, 0.25, 0.5).view(np.uint32)
        assert np.array_equal(got, expected), lane


@pytest.mark.parametrize(
    "scale, rho",
    [(1, 100), (1, 88.7), (1, 1e30), (2, 300), (2, 177), (2, 1e30), (0, 1e25), (3, 1e20), (3, -1e20), (4, 1e25), (4, -1e25)],
)
def test_overflow_is_infinite_and_never_nan(headers, scale, rho):
    for lane, (_, dtype) in headers.lanes().items():
        if dtype != "float32":
            continue
        rho_, one = np.full(16, rho, dtype=dtype), np.ones(16, dtype=dtype)
        analytic, sampled, by_mu, by_rho = headers.divergence(lane, scale, one, rho_, one, 0.0, 1.0)
        assert (analytic == np.inf).all() and (sampled == np.inf).all()
        assert np.isfinite(by_mu).all() and (by_rho * np.sign(rho) > 1e24).all()


@pytest.mark.parametrize("scale", ["square", "identity"])
def test_a_sigma_of_zero(headers, scale):
    """Not pruned: the draw is mu, sigma' as anywhere; the KL is infinite and grows with -log |sigma| from either side."""
    for lane, (_, dtype) in headers.lanes().items():
        code, zero, one = SCALES.index(scale), np.zeros(16, dtype=dtype), np.ones(16, dtype=dtype)
        for rho, sign in ((zero, 1), (-zero, -1)):
            sigma, log_sigma, d_sigma, d_log_sigma = headers.spread(lane, code, rho)
            assert (sigma == 0).all() and (d_sigma == (scale == "identity")).all()
            assert (log_sigma == -np.inf).all() and (d_log_sigma == sign * np.inf).all()
            analytic, sampled, by_mu, by_rho = headers.divergence(lane, code, one, rho, one, 0.0, 1.0)
            assert (analytic == np.inf).all() and (sampled == np.inf).all()
            assert (by_mu == 1).all() and (by_rho == -sign * np.inf).all()


@pytest.mark.parametrize("scale", ["square", "identity"])
def test_log_sigma_of_the_smallest_roots(headers, scale):
    for lane, (_, dtype) in headers.lanes().items():
        rho = np.array([-1e-44, 1e-40, 1.1e-38, -1.3e-38, 1e-37] * 4, dtype=dtype)
        expected = (2 if scale == "square" else 1) * np.log(np.abs(rho.astype(np.float64)))
        np.testing.assert_allclose(headers.spread(lane, SCALES.index(scale), rho)[1], expected, rtol=2e-7)
