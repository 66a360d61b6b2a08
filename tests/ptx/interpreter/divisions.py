"""Divisions, and the modes of rounding that instructions name."""

from __future__ import annotations

import numpy as np

from . import floats, integers

ROUNDINGS = ("rn", "rz", "rm", "rp")
F32, F64 = np.float32, np.float64


def mode_of(opcode):
    return next((part for part in opcode if part in ROUNDINGS), "rn")


def divide(opcode, kind):
    if kind[0] != "f":
        return kind, [kind] * 2, integers.divide
    if "approx" in opcode:
        return (
            kind,
            [kind] * 2,
            lambda a, b: np.where(
                np.abs(b) > F32(2.0**126),
                np.where(np.isfinite(b) & np.isfinite(a), np.copysign(F32(0), a) * np.sign(b), a / b),
                a / b,
            ),
        )
    return directed(opcode, kind, np.divide, 2)


def directed(opcode, kind, function, count):
    """A float32 result in any rounding: its float64 value lies on the same side of every float32 number as
    the exact one.
    """
    mode = mode_of(opcode)
    if mode == "rn":
        return kind, [kind] * count, function
    if kind == "f64":
        return None
    return (
        kind,
        [kind] * count,
        lambda *values: floats.round_to(function(*(v.astype(F64) for v in values)), F32, mode),
    )


def reciprocal(opcode, kind):
    return directed(opcode, kind, lambda a: a.dtype.type(1) / a, 1)
