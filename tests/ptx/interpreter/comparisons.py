"""Comparisons, and choices by them."""

from __future__ import annotations

import numpy as np

from .module import DTYPES

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def comparison(name, kind):
    """The function of a setp, set or testp comparison on two values of a type; a NaN makes an ordered one
    false.
    """
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    floating = DTYPES[kind].kind == "f" or kind == "bf16"
    if floating and name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        return lambda a, b: COMPARISONS[name[:2]](a, b) | np.isnan(a) | np.isnan(b)
    if floating and name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return COMPARISONS[name]


def _set(opcode, kind):
    name = opcode[1]
    if len(opcode) > 4 or kind in ("f16", "bf16", "f16x2", "bf16x2"):  # with a boolean operator, or packed
        return None
    compare, result = comparison(name, kind), opcode[-2]
    true = (
        np.float32(1)
        if result == "f32"
        else DTYPES[result].type(2**32 - 1) if result == "u32" else np.int32(-1)
    )
    return result, [kind] * 2, lambda a, b: np.where(compare(a, b), true, DTYPES[result].type(0))


def _select(opcode, kind):
    return kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b)


def _slct(opcode, kind):
    result = opcode[-2]
    return result, [result, result, kind], lambda a, b, c: np.where(c >= 0, a, b)


def _test(opcode, kind):
    tiny = np.finfo(DTYPES[kind]).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda a: ~np.isnan(a),
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return "pred", [kind], tests[opcode[1]]


COMPARING = {"selp": _select, "slct": _slct, "set": _set, "testp": _test}
