"""What each arithmetic instruction computes: opcode -> type of the result, types of the operands, function on
arrays.

The functions take and return fresh arrays of one element for all lanes alike, or of one element per lane.
"""

from __future__ import annotations

import numpy as np

from . import floats, integers
from .comparisons import COMPARING
from .conversions import conversion
from .divisions import directed, divide, mode_of, reciprocal
from .module import SIZES

F16, F32, F64, U16, U32, U64 = np.float16, np.float32, np.float64, np.uint16, np.uint32, np.uint64


def operation(opcode):
    """(type of the result, types of the operands, function); None for an opcode that is not known here."""
    name, kind = opcode[0], opcode[-1]
    if name == "cvt":
        return conversion(opcode)
    build = _TABLE.get(name)
    if build is None:
        return None
    found = build(opcode, kind)
    if found is None:
        return None
    result, operands, function = found
    if kind in ("f32", "f16", "f16x2") and "ftz" in opcode or "sat" in opcode and kind in ("f32", "f64"):
        function = _wrapped(function, result, operands, "ftz" in opcode, "sat" in opcode)
    return result, operands, function


def _wrapped(function, result, operands, ftz, sat):
    def flush(kind, value):
        return floats.flush(value) if ftz and kind == "f32" else value

    def wrapped(*values):
        value = flush(result, function(*(flush(kind, value) for kind, value in zip(operands, values))))
        return floats.saturate(value) if sat else value

    return wrapped


def _packed(function):
    """A function on 16-bit values, applied to both halves of 32-bit ones."""

    def both(*values):
        low = function(*(value.astype(U16) for value in values))
        high = function(*((value >> U32(16)).astype(U16) for value in values))
        return low.astype(U32) | high.astype(U32) << U32(16)

    return both


def _small_floats(kind, function):
    """`function` on float64 values whose result is exact or rounded to odd, as an operation on the bits of
    16-bit floats.
    """
    if kind.startswith("bf16"):

        def on_bits(*bits):
            return floats.f64_to_bf16(function(*(floats.bf16_to_f32(b).astype(F64) for b in bits)))

    else:

        def on_bits(*bits):
            return function(*(b.view(F16).astype(F64) for b in bits)).astype(F16).view(U16)

    return _packed(on_bits) if kind.endswith("x2") else on_bits


_SMALL = ("f16", "bf16", "f16x2", "bf16x2")


def _bits_type(kind):
    return "b32" if kind.endswith("x2") else "b16"


def _small(kind, function, count):
    return _bits_type(kind), [_bits_type(kind)] * count, _small_floats(kind, function)


def _sum(opcode, kind, sign):
    if "cc" in opcode:
        return None
    if kind in _SMALL:
        return _small(kind, lambda a, b: floats.odd_sum(a, sign * b), 2)
    plain, mode = (np.add if sign > 0 else np.subtract), mode_of(opcode)
    if mode != "rn" and kind == "f32":
        return (
            kind,
            [kind] * 2,
            lambda a, b: floats.round_to(floats.odd_sum(a.astype(F64), sign * b.astype(F64)), F32, mode),
        )
    if mode != "rn":
        return kind, [kind] * 2, lambda a, b: floats.add64(a, sign * b, mode)
    if "sat" in opcode and kind == "s32":
        wide = lambda a, b: np.clip(plain(a, b, dtype=np.int64), -(2**31), 2**31 - 1).astype(
            np.int32
        )  # noqa: E731
        return kind, [kind] * 2, wide
    return kind, [kind] * 2, plain


def _mul(opcode, kind):
    if kind in _SMALL:
        return _small(kind, np.multiply, 2)
    if kind == "f32" and (mode := mode_of(opcode)) != "rn":
        return kind, [kind] * 2, lambda a, b: floats.round_to(np.multiply(a, b, dtype=F64), F32, mode)
    if kind == "f64" and (mode := mode_of(opcode)) != "rn":
        return kind, [kind] * 2, lambda a, b: floats.mul64(a, b, mode)
    if "hi" in opcode:
        return kind, [kind] * 2, integers.mul_high
    if "wide" in opcode:
        return _wide(kind), [kind] * 2, integers.mul_wide
    return kind, [kind] * 2, np.multiply


def _wide(kind):
    return kind[0] + str(2 * int(kind[1:]))


def _mad(opcode, kind):
    if "cc" in opcode:
        return None
    if kind[0] in "fb":
        return _fma(opcode, kind)
    if "wide" in opcode:
        return _wide(kind), [kind, kind, _wide(kind)], lambda a, b, c: integers.mul_wide(a, b) + c
    if "hi" in opcode:
        return kind, [kind] * 3, lambda a, b, c: integers.mul_high(a, b) + c
    return kind, [kind] * 3, lambda a, b, c: a * b + c


def _fma(opcode, kind):
    mode = mode_of(opcode)
    if kind in _SMALL:
        relu = (lambda x: np.where(x > 0, x, 0)) if "relu" in opcode else (lambda x: x)
        return _small(kind, lambda a, b, c: relu(floats.odd_sum(a * b, c)), 3)
    if kind == "f32":
        return (
            kind,
            [kind] * 3,
            floats.fma32 if mode == "rn" else lambda a, b, c: floats.fma32_mode(a, b, c, mode),
        )
    return (kind, [kind] * 3, floats.fma64) if mode == "rn" else None


def _approximate(function):
    """The hardware's approximations have no specified bits: correctly rounded values stand in for them."""

    def build(opcode, kind):
        if kind == "f32":
            return kind, [kind], lambda a: function(a.astype(F64)).astype(F32)
        return _small(kind, function, 1) if kind in _SMALL else (kind, [kind], function)

    return build


def _extremum(integer_function, float_function):
    def build(opcode, kind):
        nan = "NaN" in opcode
        if kind in _SMALL:
            on_values = lambda a, b: float_function(a, b, U64, nan)  # noqa: E731
            return _small(kind, on_values, 2)
        if kind[0] == "f":
            unsigned = np.dtype(f"u{SIZES[kind]}")
            return kind, [kind] * 2, lambda a, b: float_function(a, b, unsigned, nan)
        return kind, [kind] * 2, integer_function

    return build


def _absolute(opcode, kind):
    if kind in _SMALL:
        mask = U32(0x7FFF7FFF) if kind.endswith("x2") else U16(0x7FFF)
        return _bits_type(kind), [_bits_type(kind)], lambda a: a & mask
    return kind, [kind], np.abs


def _negate(opcode, kind):
    if kind in _SMALL:
        mask = U32(0x80008000) if kind.endswith("x2") else U16(0x8000)
        return _bits_type(kind), [_bits_type(kind)], lambda a: a ^ mask
    return kind, [kind], np.negative


def _logic(function, predicate_function=None):
    def build(opcode, kind):
        return kind, [kind] * 2, predicate_function if kind == "pred" and predicate_function else function

    return build


def _not(opcode, kind):
    return kind, [kind], np.logical_not if kind == "pred" else np.invert


def _lop3(opcode, kind):
    # The table is an immediate, and so one value for all lanes.
    return kind, [kind, kind, kind, "u32"], lambda a, b, c, table: integers.logic3(a, b, c, int(table[0]))


def _shift(opcode, kind):
    return kind, [kind, "u32"], integers.shift_left if opcode[0] == "shl" else integers.shift_right


def _funnel(opcode, kind):
    function, wrap = integers.funnel_left if opcode[1] == "l" else integers.funnel_right, "wrap" in opcode
    return kind, [kind, kind, "u32"], lambda low, high, count: function(low, high, count, wrap)


def _permute(opcode, kind):
    mode = opcode[2] if len(opcode) > 2 else None
    return "b32", ["b32"] * 3, lambda a, b, selector: integers.permute(a, b, selector, mode)


def _unary(function, result=None):
    return lambda opcode, kind: (result or kind, [kind], function)


_TABLE = {
    "add": lambda opcode, kind: _sum(opcode, kind, 1),
    "sub": lambda opcode, kind: _sum(opcode, kind, -1),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": divide,
    "rcp": reciprocal,
    "rem": lambda opcode, kind: (kind, [kind] * 2, integers.remainder),
    "sqrt": lambda opcode, kind: directed(opcode, kind, np.sqrt, 1),
    "rsqrt": _approximate(lambda a: 1 / np.sqrt(a)),
    "ex2": _approximate(np.exp2),
    "lg2": _approximate(np.log2),
    "sin": _approximate(np.sin),
    "cos": _approximate(np.cos),
    "tanh": _approximate(np.tanh),
    "min": _extremum(np.minimum, floats.minimum),
    "max": _extremum(np.maximum, floats.maximum),
    "abs": _absolute,
    "neg": _negate,
    "not": _not,
    "cnot": _unary(lambda a: (a == 0).astype(a.dtype)),
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "lop3": _lop3,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "prmt": _permute,
    "bfe": lambda opcode, kind: (kind, [kind, "u32", "u32"], integers.extract),
    "bfi": lambda opcode, kind: ("u" + kind[1:], ["u" + kind[1:]] * 2 + ["u32", "u32"], integers.insert),
    "brev": _unary(integers.reverse),
    "clz": _unary(integers.leading_zeros, "u32"),
    "popc": _unary(integers.population, "u32"),
    "bfind": lambda opcode, kind: ("u32", [kind], lambda a: integers.find(a, "shiftamt" in opcode)),
    **COMPARING,
    "copysign": lambda opcode, kind: (kind, [kind] * 2, lambda a, b: np.copysign(b, a)),
}
