"""The interpreter's roundings against exact arithmetic, on PTX written by hand: no nvcc, no GPU."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from ptx.snippets import exactly, floats32, fractions, run

RANDOM = np.random.default_rng(7)


def test_fma_f32_rounds_once():
    a, b, c = floats32(4096, 1), floats32(4096, 2), floats32(4096, 3)
    a[:512] = (
        1 + RANDOM.integers(0, 2**12, 512) * 2.0**-12
    )  # a b has 24 bits and a half; c decides which way it goes
    b[:512] = 1 + RANDOM.integers(0, 2**12, 512) * 2.0**-12
    c[:512] = RANDOM.choice([2.0**-80, -(2.0**-80), 2.0**-30, 0], 512)
    a[512:1024] *= np.float32(2.0**-70)  # subnormal results
    b[512:1024] *= np.float32(2.0**-60)
    c[512:1024] = RANDOM.integers(-9, 9, 512) * 2.0**-149
    a[1024], b[1024], c[1024] = 3e38, 2, -3e38
    exact = [x * y + z for x, y, z in zip(*fractions(a, b, c))]
    for mode in ("rn", "rz", "rm", "rp"):
        result = run(f"fma.{mode}.f32 $r0, $0, $1, $2;", a, b, c)
        np.testing.assert_array_equal(result, exactly(exact, "f32", mode))
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (naive != exactly(exact, "f32")).any()  # the cases do need the correction


def test_fma_f64_rounds_once():
    a, b, c = (RANDOM.standard_normal(2048) * 2.0 ** RANDOM.integers(-50, 50, 2048) for _ in range(3))
    c[:512] = -a[:512] * b[:512]  # what is left is the product's error
    a[512:600] *= 2.0**-520  # down to where the error of the product underflows
    b[512:600] *= 2.0**-520
    c[512:600] *= 2.0**-1000
    a[600:640] *= 2.0**500
    b[600:640] *= 2.0**500
    c[640:700] *= 2.0**-1000
    # Just below and above the middle between two numbers, by 2^-157 of it.
    a[700:702], b[700:702], c[700:702] = (
        1 + 2.0**-52,
        [(1 - 2.0**-52) * 2.0**-53, -(1 - 2.0**-52) * 2.0**-53],
        1 + 2.0**-52,
    )
    exact = [x * y + z for x, y, z in zip(*fractions(a, b, c))]
    np.testing.assert_array_equal(
        run("fma.rn.f64 $r0, $0, $1, $2;", a, b, c, results=[np.float64]), exactly(exact, "f64")
    )
    special = np.array([np.inf, np.nan, 0.0, -0.0, 1e308])
    a, b, c = (grid.ravel() for grid in np.meshgrid(special, special, special))
    result = run("fma.rn.f64 $r0, $0, $1, $2;", a, b, c, results=[np.float64])[:125]
    with np.errstate(all="ignore"):
        expected = a * b + c
        overflow = np.isfinite(a) & np.isfinite(b) & np.isinf(a * b)
    np.testing.assert_array_equal(result[~overflow], expected[~overflow])
    np.testing.assert_array_equal(
        np.signbit(result[~overflow & (result == 0)]), np.signbit(expected[~overflow & (result == 0)])
    )


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_sums_and_products_in_every_rounding(kind, dtype, mode):
    a, b = floats32(512, 4).astype(dtype), floats32(512, 5).astype(dtype)
    if kind == "f64":
        a, b = a * (1 + 2.0**-40), b * (1 - 2.0**-45)
    x, y = fractions(a, b)
    for name, exact in (
        ("add", [u + v for u, v in zip(x, y)]),
        ("sub", [u - v for u, v in zip(x, y)]),
        ("mul", [u * v for u, v in zip(x, y)]),
    ):
        np.testing.assert_array_equal(
            run(f"{name}.{mode}.{kind} $r0, $0, $1;", a, b, results=[dtype]), exactly(exact, kind, mode)
        )


def test_division_and_roots():
    a, b = np.abs(floats32(1024, 6)) + np.float32(1e-20), floats32(1024, 7)
    b[b == 0] = 1
    x, y = fractions(a, b)
    for mode in ("rn", "rz", "rm", "rp"):
        np.testing.assert_array_equal(
            run(f"div.{mode}.f32 $r0, $0, $1;", a, b), exactly([u / v for u, v in zip(x, y)], "f32", mode)
        )
    root = run("sqrt.rn.f32 $r0, $0;", a)
    for value, r in zip(x, root):
        below, above = (Fraction(float(np.nextafter(r, np.float32(t)))) for t in (0, np.inf))
        assert ((below + Fraction(float(r))) / 2) ** 2 <= value <= ((above + Fraction(float(r))) / 2) ** 2
    np.testing.assert_array_equal(
        run("div.approx.f32 $r0, $0, $1;", np.float32([1, 6]), np.float32([2e38, 3]))[:2], [0, 2]
    )


def test_small_floats_arithmetic_rounds_once():
    halves = RANDOM.integers(0, 2**16, (3, 1024)).astype(np.uint16)
    a, b, c = (h.view(np.float16) for h in halves)
    fine = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[fine], b[fine], c[fine]
    exact = [x * y + z for x, y, z in zip(*fractions(a, b, c))]
    result = run("fma.rn.f16 $r0, $0, $1, $2;", a, b, c, results=[np.float16])[: len(a)]
    np.testing.assert_array_equal(result, exactly(exact, "f16"))
    exponents = np.uint32(0x3F800000) + RANDOM.integers(-20, 20, (3, 1024)).astype(np.uint32) * np.uint32(
        1 << 23
    )
    bits = [
        ((e | RANDOM.integers(0, 128, 1024).astype(np.uint32) << 16) >> 16).astype(np.uint16)
        for e in exponents
    ]
    values = [(h.astype(np.uint32) << 16).view(np.float32) for h in bits]
    exact = [x * y + z for x, y, z in zip(*fractions(*values))]
    both = [h.astype(np.uint32) | (h[::-1].astype(np.uint32) << 16) for h in bits]
    result = run("fma.rn.bf16x2 $r0, $0, $1, $2;", *both, results=[np.uint32])
    np.testing.assert_array_equal((result << 16).view(np.float32), exactly(exact, "bf16"))
    np.testing.assert_array_equal((result & 0xFFFF0000).view(np.float32)[::-1], exactly(exact, "bf16"))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_cvt_to_small_floats(kind, mode):
    """Values of the format, the ties between them and their neighbours, and what lies just beside a tie."""
    bits = np.arange(0, 0x7C00 if kind == "f16" else 0x7F80, 7).astype(np.uint16)
    values = (
        bits.view(np.float16).astype(np.float32)
        if kind == "f16"
        else (bits.astype(np.uint32) << 16).view(np.float32)
    )
    after = np.float32(values * np.float32(1 + 2.0 ** -(10 if kind == "f16" else 7)))
    ties = ((values.astype(np.float64) + after) / 2).astype(np.float32)
    x = np.concatenate(
        [
            values,
            ties,
            np.nextafter(ties, np.float32(0)),
            np.nextafter(ties, np.float32(np.inf)),
            np.float32(
                [65519.9, 65520, 65536, 3e38, 3.3961e38, 1e-8, 2.0**-25, 2.0**-24, 3 * 2.0**-25, 1e-45]
            ),
        ]
    )
    x = np.concatenate([x, -x])
    result = run(f"cvt.{mode}.{kind}.f32 $r0, $0;", x, results=[np.uint16])[: len(x)]
    got = (
        result.view(np.float16).astype(np.float64)
        if kind == "f16"
        else (result.astype(np.uint32) << 16).view(np.float32)
    )
    np.testing.assert_array_equal(got, exactly(fractions(x)[0], kind, mode))
    back = run(f"cvt.f32.{kind} $r0, $0;", result)[: len(x)]
    np.testing.assert_array_equal(back, got)
    special = run(f"cvt.rn.{kind}.f32 $r0, $0;", np.float32([np.inf, -np.inf, np.nan]), results=[np.uint16])[
        :3
    ]
    infinity = 0x7C00 if kind == "f16" else 0x7F80
    assert special[0] == infinity and special[1] == infinity | 0x8000 and special[2] & 0x7FFF > infinity
    packed = run(f"cvt.rn.{kind}x2.f32 $r0, $0, $1;", x, x[::-1].copy(), results=[np.uint32])[: len(x)]
    single = run(f"cvt.rn.{kind}.f32 $r0, $0;", x, results=[np.uint16])[: len(x)]
    np.testing.assert_array_equal(packed >> 16, single)  # the first operand is the upper half
    np.testing.assert_array_equal(packed & 0xFFFF, single[::-1])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_cvt_from_integers_and_doubles(mode):
    signed = np.concatenate(
        [
            RANDOM.integers(-(2**63), 2**63 - 1, 256),
            2**24 + np.arange(64),
            2**53 + np.arange(64),
            -(2**53) - np.arange(64),
            [2**63 - 1, -(2**63)],
        ]
    ).astype(np.int64)
    exact = [Fraction(int(v)) for v in signed]
    for kind, dtype in (("f32", np.float32), ("f64", np.float64)):
        result = run(f"cvt.{mode}.{kind}.s64 $r0, $0;", signed, results=[dtype])[: len(signed)]
        np.testing.assert_array_equal(result, exactly(exact, kind, mode))
        result = run(f"cvt.{mode}.{kind}.u64 $r0, $0;", signed.view(np.uint64), results=[dtype])[
            : len(signed)
        ]
        np.testing.assert_array_equal(result, exactly([x % 2**64 for x in exact], kind, mode))
    doubles = RANDOM.standard_normal(512) * 2.0 ** RANDOM.integers(-150, 128, 512)
    np.testing.assert_array_equal(
        run(f"cvt.{mode}.f32.f64 $r0, $0;", doubles), exactly(fractions(doubles)[0], "f32", mode)
    )


@pytest.mark.parametrize(
    "mode, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_cvt_float_to_integer(mode, function):
    x = np.float32(
        [
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            0.49,
            2147483520,
            2147483648,
            -2147483648,
            -3e9,
            5e9,
            np.inf,
            -np.inf,
            1e19,
            2e19,
        ]
    )
    whole = [int(v) if np.isfinite(v) else 2**70 * int(np.sign(v)) for v in function(x)]
    for kind, dtype in (("s32", np.int32), ("u32", np.uint32), ("s64", np.int64), ("u64", np.uint64)):
        limits = np.iinfo(dtype)
        expected = [min(max(v, limits.min), limits.max) for v in whole]
        assert run(f"cvt.{mode}.{kind}.f32 $r0, $0;", x, results=[dtype])[: len(x)].tolist() == expected
    nan = np.float32([np.nan])
    assert run(f"cvt.{mode}.s32.f32 $r0, $0;", nan, results=[np.int32])[0] == 0
    assert run(f"cvt.{mode}.s64.f32 $r0, $0;", nan, results=[np.int64])[0] == -(2**63)
    assert run(f"cvt.{mode}.u32.f64 $r0, $0;", np.float64([np.nan]), results=[np.uint32])[0] == 2**31
    np.testing.assert_array_equal(run(f"cvt.{mode}.f32.f32 $r0, $0;", x)[: len(x)], function(x))


def test_cvt_between_integers():
    x = np.int64([0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31, -(2**31) - 1, 2**40 + 300])
    for kind in ("s8", "u8", "s16", "u16", "s32", "u32"):
        bits = int(kind[1:])
        low = [int(v) % 2**bits for v in x]
        expected = [v - 2 ** bits if kind[0] == "s" and v >= 2 ** (bits - 1) else v for v in low]
        assert run(f"cvt.s64.{kind} $r0, $0;", x, results=[np.int64])[: len(x)].tolist() == expected
        limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
        target = np.int32 if kind[0] == "s" else np.uint32
        clamped = [min(max(int(v), limits[0]), limits[1]) for v in x]
        assert run(f"cvt.sat.{kind}.s64 $r0, $0;", x, results=[target])[: len(x)].tolist() == clamped
