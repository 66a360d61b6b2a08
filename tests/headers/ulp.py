"""Errors in units of the last place, and true values in float64."""

from __future__ import annotations

import numpy as np


def ulps(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|values - truth| in units of truth's last place in the type of `values`."""
    with np.errstate(over="ignore"):
        unit = np.spacing(np.abs(truth.astype(values.dtype))).astype(truth.dtype)
    return np.abs(values.astype(truth.dtype) - truth) / unit


def radius_and_angle(
    radius_word: np.ndarray, angle_word: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sqrt(-2 ln u), sin 2 pi v, cos 2 pi v in long double, for the words' uniforms (x + 1/2) 2^-32."""
    u = (radius_word.astype(np.longdouble) + 0.5) * 2.0**-32
    r = np.sqrt(-2 * np.log(u))
    # The nearest quarter turn is taken off exactly: sine and cosine keep their digits near their zeros.
    x = angle_word.astype(np.int64)
    quarter = (x + 2**29) >> 30
    t = ((x - (quarter << 30)).astype(np.longdouble) + 0.5) * (2 * PI * 2.0**-32)
    s, c = np.sin(t), np.cos(t)
    return r, np.choose(quarter % 4, [s, c, -s, -c]), np.choose(quarter % 4, [c, -s, -c, s])


PI = np.longdouble("3.14159265358979323846264338327950288")


def normals(words: np.ndarray) -> np.ndarray:
    """The four normals [4, n] of words [4, n], in long double."""
    r0, s0, c0 = radius_and_angle(words[0], words[1])
    r1, s1, c1 = radius_and_angle(words[2], words[3])
    return np.stack([r0 * c0, r0 * s0, r1 * c1, r1 * s1])


def awkward_words(n: int, seed: int = 0) -> np.ndarray:
    """Random words, and all within 2^15 of a multiple of 2^29: the range's ends, every eighth of a turn."""
    near = (np.arange(8)[:, None] << 29) + np.arange(-(2**15), 2**15)
    random = np.random.default_rng(seed).integers(0, 2**32, n - near.size, dtype=np.uint32)
    return np.concatenate([near.ravel() % 2**32, random]).astype(np.uint32)


def spread(rho: np.ndarray, scale: int) -> np.ndarray:
    """sigma, log sigma and their derivatives [4, n] in long double; scale as in csrc/posterior.h."""
    rho = rho.astype(np.longdouble)
    if scale == 0:
        t = np.exp(-np.abs(rho))
        sigma = np.maximum(rho, 0) + np.log1p(t)
        tail = rho < -25  # log log(1 + z) = rho - z/2 + ..., z = e^rho, to long double's precision
        log_sigma = np.where(tail, rho - t / 2, np.log(sigma))
        d_sigma = np.where(rho > 0, 1, t) / (1 + t)
        return np.stack([sigma, log_sigma, d_sigma, np.where(tail, 1 - t / 2, d_sigma / sigma)])
    if scale >= 3:
        power = np.longdouble(2 if scale == 3 else 1)
        with np.errstate(divide="ignore"):
            return np.stack([rho**power, np.log(np.abs(rho)) * power, power * rho ** (power - 1), power / rho])
    power = np.longdouble(1 if scale == 1 else 0.5)
    with np.errstate(over="ignore"):
        sigma = np.exp(rho * power)
    return np.stack([sigma, rho * power, sigma * power, np.full_like(rho, power)])
