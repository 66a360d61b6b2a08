"""The interpreter's integers, bits, comparisons and functions against exact arithmetic, on PTX written by
hand: no nvcc, no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

from ptx.snippets import floats32, run

RANDOM = np.random.default_rng(7)


@pytest.mark.parametrize(
    "kind, dtype", [("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("s64", np.int64)]
)
def test_integer_arithmetic(kind, dtype):
    limits, bits = np.iinfo(dtype), 8 * np.dtype(dtype).itemsize
    a = RANDOM.integers(limits.min, limits.max, 512, dtype=dtype, endpoint=True)
    b = np.where(
        RANDOM.random(512) < 0.5,
        RANDOM.integers(limits.min, limits.max, 512, dtype=dtype, endpoint=True),
        RANDOM.integers(1, 100, 512).astype(dtype),
    )
    a[:4], b[:4] = [limits.min, limits.max, limits.min, 0], [limits.max, limits.max, 3, 5]
    if kind[0] == "s":
        a[4:6], b[4:6] = [limits.min, -7], [-1, 2]
    x, y = [int(v) for v in a], [int(v) for v in b]

    def wrapped(values):
        return [
            (v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) if kind[0] == "s" else v % 2**bits
            for v in values
        ]

    def quotient(u, v):
        return abs(u) // abs(v) * (1 if (u < 0) == (v < 0) else -1)

    expected = {
        "mul.hi": [u * v >> bits for u, v in zip(x, y)],
        "mul.lo": [u * v for u, v in zip(x, y)],
        "div": [quotient(u, v) for u, v in zip(x, y)],
        "rem": [u - quotient(u, v) * v for u, v in zip(x, y)],
        "add": [u + v for u, v in zip(x, y)],
        "sub": [u - v for u, v in zip(x, y)],
        "min": [min(u, v) for u, v in zip(x, y)],
        "max": [max(u, v) for u, v in zip(x, y)],
    }
    for name, values in expected.items():
        assert run(f"{name}.{kind} $r0, $0, $1;", a, b, results=[dtype]).tolist() == wrapped(values), name
    counts = RANDOM.integers(0, 2 * bits, 512).astype(np.uint32)
    shifted = [u >> min(int(n), bits) for u, n in zip(x, counts)]
    assert run(f"shr.{kind} $r0, $0, $1;", a, counts, results=[dtype]).tolist() == shifted
    shifted = wrapped([u << int(n) if n < bits else 0 for u, n in zip(x, counts)])
    assert run(f"shl.b{bits} $r0, $0, $1;", a, counts, results=[dtype]).tolist() == shifted
    if bits == 32:
        wide = np.int64 if kind[0] == "s" else np.uint64
        assert run(f"mul.wide.{kind} $r0, $0, $1;", a, b, results=[wide]).tolist() == [
            u * v for u, v in zip(x, y)
        ]


def test_carry_chains():
    a, b = (RANDOM.integers(0, 2**64, 256, dtype=np.uint64) for _ in range(2))
    halves = "mov.b64 {%y0, %y1}, $0; mov.b64 {%y2, %y3}, $1;"
    for first, second, exact in (("add.cc.u32", "addc.u32", a + b), ("sub.cc.u32", "subc.u32", a - b)):
        code = f"{halves} {first} %y4, %y0, %y2; {second} %y5, %y1, %y3; mov.b64 $r0, {{%y4, %y5}};"
        np.testing.assert_array_equal(run(code, a, b, results=[np.uint64]), exact)
    code = (
        f"{halves} mul.lo.u32 %y4, %y0, %y2; mul.hi.u32 %y5, %y0, %y2; mad.lo.cc.u32 %y4, %y1, %y3, %y4; "
        "madc.hi.u32 %y5, %y1, %y3, %y5; mov.b64 $r0, {%y4, %y5};"
    )
    low = np.uint64(0xFFFFFFFF)
    expected = (a & low) * (b & low) + (a >> np.uint64(32)) * (b >> np.uint64(32))
    np.testing.assert_array_equal(run(code, a, b, results=[np.uint64]), expected)


def test_bits():
    a, b, c = (RANDOM.integers(0, 2**32, 512, dtype=np.uint32) for _ in range(3))
    a[:3] = [0, 1, 2**31]
    u = np.uint32
    x = [int(v) for v in a]
    assert run("lop3.b32 $r0, $0, $1, $2, 0x6A;", a, b, c, results=[u]).tolist() == ((a & b) ^ c).tolist()
    assert run("brev.b32 $r0, $0;", a, results=[u]).tolist() == [int(f"{v:032b}"[::-1], 2) for v in x]
    assert run("popc.b32 $r0, $0;", a, results=[u]).tolist() == [v.bit_count() for v in x]
    assert run("clz.b32 $r0, $0;", a, results=[u]).tolist() == [32 - v.bit_length() for v in x]
    assert run("bfind.u32 $r0, $0;", a, results=[u]).tolist() == [(v.bit_length() - 1) % 2**32 for v in x]
    assert run("bfind.shiftamt.u32 $r0, $0;", a, results=[u]).tolist() == [
        32 - v.bit_length() if v else 2**32 - 1 for v in x
    ]
    position, length = (RANDOM.integers(0, 40, 512, dtype=np.uint32) for _ in range(2))
    field = [v >> int(p) & (1 << int(n)) - 1 for v, p, n in zip(x, position, length)]
    assert run("bfe.u32 $r0, $0, $1, $2;", a, position, length, results=[u]).tolist() == field
    for v, p, n, r in zip(
        a.view(np.int32),
        position,
        length,
        run("bfe.s32 $r0, $0, $1, $2;", a, position, length, results=[np.int32]),
    ):
        shifted, n = int(v) >> int(p), int(n)
        low = shifted & (1 << n) - 1
        assert r == (0 if n == 0 else shifted if p + n >= 32 else low - (1 << n) * (low >> n - 1))
    inserted = run("bfi.b32 $r0, $0, $1, $2, $3;", a, b, position, length, results=[u])
    for v, w, p, n, r in zip(a, b, position, length, inserted):
        mask = ((1 << int(n)) - 1) << int(p) & 2**32 - 1
        assert r == (int(v) << int(p) & mask | int(w) & ~mask)
    counts = RANDOM.integers(0, 64, 512, dtype=np.uint32)
    for name, limit in (("wrap", lambda n: n % 32), ("clamp", lambda n: min(n, 32))):
        pairs = [(int(v), int(w) << 32 | int(v), limit(int(n))) for v, w, n in zip(a, b, counts)]
        assert run(f"shf.l.{name}.b32 $r0, $0, $1, $2;", a, b, counts, results=[u]).tolist() == [
            pair << n >> 32 & 2**32 - 1 for _, pair, n in pairs
        ]
        assert run(f"shf.r.{name}.b32 $r0, $0, $1, $2;", a, b, counts, results=[u]).tolist() == [
            pair >> n & 2**32 - 1 for _, pair, n in pairs
        ]


def test_permute():
    a, b, selector = (RANDOM.integers(0, 2**32, 256, dtype=np.uint32) for _ in range(3))

    def check(mode, choose):
        result = run(f"prmt.b32{mode} $r0, $0, $1, $2;", a, b, selector, results=[np.uint32])
        for u, v, s, r in zip(a, b, selector, result):
            data = (int(v) << 32 | int(u)).to_bytes(8, "little")
            assert int(r).to_bytes(4, "little") == bytes(choose(data, int(s), i) for i in range(4)), mode

    def nibbles(data, s, i):
        byte = data[s >> 4 * i & 7]
        return (255 * (byte >> 7)) if s >> 4 * i & 8 else byte

    check("", nibbles)
    check(".f4e", lambda data, s, i: data[(s & 3) + i])
    check(".b4e", lambda data, s, i: data[(s & 3) - i & 7])
    check(".rc8", lambda data, s, i: data[s & 3])
    check(".ecl", lambda data, s, i: data[max(s & 3, i)])
    check(".ecr", lambda data, s, i: data[min(s & 3, i)])
    check(".rc16", lambda data, s, i: data[2 * (s & 1) + (i & 1)])


SPECIAL = np.float32([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-42])


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(name):
    a, b = (grid.ravel() for grid in np.meshgrid(SPECIAL, SPECIAL))
    nan = np.isnan(a) | np.isnan(b)
    holds = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name]
    chosen = "selp.u32 $r0, 1, 0, %p0; selp.u32 $r1, 1, 0, %p1;"
    for suffix, expected in (("", holds & ~nan), ("u", holds | nan)):
        p, q = run(f"setp.{name}{suffix}.f32 %p0|%p1, $0, $1; {chosen}", a, b, results=[np.uint32] * 2)
        np.testing.assert_array_equal(p, expected)
        np.testing.assert_array_equal(q, ~expected)
    first = "setp.gt.f32 %p2, $0, 0f00000000;"
    for operator, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        code = f"{first} setp.{name}.{operator}.f32 %p0|%p1, $0, $1, !%p2; {chosen}"
        p, q = run(code, a, b, results=[np.uint32] * 2)
        np.testing.assert_array_equal(p, combine(holds & ~nan, ~(a > 0)))
        np.testing.assert_array_equal(q, combine(~(holds & ~nan), ~(a > 0)))


def test_nan_tests_and_extremes():
    a, b = (grid.ravel() for grid in np.meshgrid(SPECIAL, SPECIAL))
    nan = np.isnan(a) | np.isnan(b)
    for name, expected in (("num", ~nan), ("nan", nan)):
        code = f"setp.{name}.f32 %p0, $0, $1; selp.u32 $r0, 1, 0, %p0;"
        np.testing.assert_array_equal(run(code, a, b, results=[np.uint32]), expected)
    for name, function in (("min", np.fmin), ("max", np.fmax)):
        result = run(f"{name}.f32 $r0, $0, $1;", a, b)
        np.testing.assert_array_equal(result, function(a, b))
        zeros = (a == 0) & (b == 0)
        negative = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
        np.testing.assert_array_equal(np.signbit(result[zeros]), negative[zeros])
        np.testing.assert_array_equal(np.isnan(run(f"{name}.NaN.f32 $r0, $0, $1;", a, b)), nan)
    tests = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & (np.abs(a) > 1e-38),
        "subnormal": (a != 0) & (np.abs(a) < 1e-38),
    }
    for name, expected in tests.items():
        code = f"testp.{name}.f32 %p0, $0; selp.u32 $r0, 1, 0, %p0;"
        np.testing.assert_array_equal(run(code, a, results=[np.uint32]), expected)


def test_signs_flushing_and_saturation():
    a = SPECIAL
    np.testing.assert_array_equal(run("neg.f32 $r0, $0;", a)[:8].view(np.uint32), a.view(np.uint32) ^ 2**31)
    np.testing.assert_array_equal(
        run("abs.f32 $r0, $0;", a)[:8].view(np.uint32), a.view(np.uint32) & (2**31 - 1)
    )
    assert (
        run("add.ftz.f32 $r0, $0, 0f00000000;", a)[7] == 0
        and run("add.f32 $r0, $0, 0f00000000;", a)[7] == a[7]
    )
    np.testing.assert_array_equal(
        run("mul.sat.f32 $r0, $0, 0f40000000;", a)[:8], np.float32([0, 0, 1, 0, 1, 0, 0, 2 * a[7]])
    )
    b = np.float32([1, 1, -1, 1, -1, 1, 1, -1])
    np.testing.assert_array_equal(np.signbit(run("copysign.f32 $r0, $1, $0;", a, b)[:8]), np.signbit(b))


def test_choices():
    a, b = np.int32([5, -5, 0, 7]), np.int32([1, 2, 3, 4])
    code = "setp.lt.s32 %p0, $0, 1; selp.b32 $r0, $0, $1, %p0;"
    code += "slct.s32.s32 $r1, $0, $1, $0; set.lt.u32.s32 $r2, $0, $1;"
    results = run(code, a, b, results=[np.int32, np.int32, np.uint32])
    assert [r[:4].tolist() for r in results] == [[1, -5, 0, 4], [5, 2, 0, 7], [0, 2**32 - 1, 2**32 - 1, 0]]


@pytest.mark.parametrize(
    "name, function",
    [
        ("ex2", np.exp2),
        ("lg2", np.log2),
        ("sin", np.sin),
        ("cos", np.cos),
        ("rsqrt", lambda x: 1 / np.sqrt(x)),
        ("rcp", lambda x: 1 / x),
        ("tanh", np.tanh),
        ("sqrt", np.sqrt),
    ],
)
def test_approximate_functions_are_close(name, function):
    x = np.abs(floats32(256)) % 30 + np.float32(0.01)
    np.testing.assert_allclose(
        run(f"{name}.approx.f32 $r0, $0;", x), function(x.astype(np.float64)), rtol=1e-7
    )
