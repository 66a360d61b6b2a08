"""Floating-point arithmetic with one rounding, in every rounding mode PTX has.

Round-to-odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
rounding to odd", 2008) is what makes a second rounding harmless: a value with at least two more bits than the
target, whose last bit says whether anything was cut off, rounds to the target as the exact value would.
Payloads of NaNs are not modelled.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64
TINY32 = F32(2.0**-126)


def two_sum(a, b):
    """a + b = s + e exactly (Knuth)."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def two_product(a, b):
    """a b = p + e exactly, without over- and underflow (Dekker)."""
    p = a * b
    ah, bh = _high(a), _high(b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _high(a):
    c = a * 134217729.0
    return c - (c - a)


def to_odd(s, e):
    """The float64 s + e, where e is what a rounding left over, rounded to odd."""
    bits = s.view(np.int64)
    fix = (e != 0) & (bits & 1 == 0) & np.isfinite(s) & np.isfinite(e)
    return np.where(fix, bits + np.where((e > 0) == (s > 0), 1, -1), bits).view(F64)


def odd_sum(a, b):
    """a + b in float64, rounded to odd."""
    return to_odd(*two_sum(a, b))


def flush(x):
    """Subnormal float32 values become zeros of their sign."""
    return np.where(np.abs(x) < TINY32, np.copysign(F32(0), x), x)


def saturate(x):
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)


def round_to(x, dtype, mode):
    """The float64 x, exact or rounded to odd, as `dtype` (float32 or float16), with mode rn, rz, rm or rp."""
    r = x.astype(dtype)
    if mode == "rn":
        return r
    back = r.astype(F64)
    away = {"rz": np.abs(back) > np.abs(x), "rm": back > x, "rp": back < x}[mode]
    toward = {"rz": np.zeros_like(r), "rm": np.full_like(r, -np.inf), "rp": np.full_like(r, np.inf)}[mode]
    return np.where(away, np.nextafter(r, toward), r)


def direct(s, e, mode):
    """The float64 s = rn(s + e) turned to another rounding mode."""
    if mode == "rn":
        return s
    low, high = e < 0, e > 0
    down, up = np.nextafter(s, -np.inf), np.nextafter(s, np.inf)
    if mode == "rm":
        return np.where(low, down, s)
    if mode == "rp":
        return np.where(high, up, s)
    return np.where(low & (s > 0), down, np.where(high & (s < 0), up, s))


def fma32(a, b, c):
    s = np.multiply(a, b, dtype=F64)
    s += c
    r = s.astype(F32)
    # The product is exact, so that s has one rounding, and r may have a second one: only where s lies
    # half-way between two float32 numbers, or r is subnormal (or has just ceased to be).
    low = s.view(U32)[::2]
    doubtful = (low << U32(3) == U32(0x80000000)) | (np.abs(r) <= TINY32)
    if doubtful.any():
        i = np.flatnonzero(doubtful)
        a, b, c = (v if v.size == 1 else v[i] for v in (a, b, c))
        r[i] = odd_sum(np.multiply(a, b, dtype=F64), c.astype(F64)).astype(F32)
    return r


def fma32_mode(a, b, c, mode):
    return round_to(odd_sum(np.multiply(a, b, dtype=F64), c.astype(F64)), F32, mode)


def _fma64_exact(a, b, c):
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return a * b + c
    try:
        return F64(float(exact))  # correctly rounded
    except OverflowError:
        return F64(np.inf if exact > 0 else -np.inf)


def fma64(a, b, c):
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = two_product(a, b)
    t, u = two_sum(c, low)
    v, w = two_sum(high, t)
    r = v + to_odd(*two_sum(u, w))
    # The error-free transformations hold where no intermediate over- or underflows.
    size = np.abs(high)
    sound = (size < 2.0**960) & (size > 2.0**-900) & (np.maximum(np.abs(a), np.abs(b)) < 2.0**960)
    sound &= (np.abs(c) < 2.0**960) & ((np.abs(c) > 2.0**-900) | (c == 0))
    plain = (a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b)  # nothing to round
    infinite = ~np.isfinite(c) & ~plain
    r = np.where(plain, a * b + c, np.where(infinite, c, r))
    for i in np.flatnonzero(~(sound | plain | infinite)):
        r[i] = _fma64_exact(a[i], b[i], c[i])
    return r


def add64(a, b, mode):
    return direct(*two_sum(a, b), mode)


def mul64(a, b, mode):
    return direct(*two_product(a, b), mode)


def minimum(a, b, integer, propagate=False):
    """min with -0 < +0; a NaN loses unless `propagate`. `integer` is the unsigned type of the same size."""
    r = np.where(a == b, (a.view(integer) | b.view(integer)).view(a.dtype), np.fmin(a, b))
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), r) if propagate else r


def maximum(a, b, integer, propagate=False):
    r = np.where(a == b, (a.view(integer) & b.view(integer)).view(a.dtype), np.fmax(a, b))
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), r) if propagate else r


# bfloat16 has no numpy type: its bits are uint16, its values float32.


def bf16_to_f32(bits):
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x, mode="rn"):
    bits = x.view(U32)
    if mode == "rn":
        rounded = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
    elif mode == "rz":
        rounded = bits
    else:
        raise NotImplementedError(f"rounding to bf16 with {mode}")
    return np.where(np.isnan(x), U32(0x7FFF0000), rounded).__rshift__(16).astype(np.uint16)


def f64_to_bf16(x):
    """From a float64 that is exact or rounded to odd."""
    r = x.astype(F32)
    back = r.astype(F64)
    bits = r.view(np.int32)
    fix = (back != x) & (bits & 1 == 0) & np.isfinite(r)
    step = np.where(np.abs(back) < np.abs(x), 1, -1).astype(np.int32)
    return f32_to_bf16(np.where(fix, bits + step, bits).view(F32))


def f32_to_tf32(x):
    """To nearest, ties away from zero: 10 bits of mantissa."""
    bits = x.view(U32)
    return np.where(np.isfinite(x), (bits + U32(0x1000)) & U32(0xFFFFE000), bits)
