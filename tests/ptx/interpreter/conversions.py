"""cvt: from every type to every type."""

from __future__ import annotations

import numpy as np

from . import floats

F16, F32, F64, U16, U32 = np.float16, np.float32, np.float64, np.uint16, np.uint32
_INTEGER_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "f32", "f64", "tf32")


def conversion(opcode):
    """(type of the result, types of the operands, function) of a cvt; None for one that is not known here."""
    flags, target, source = opcode[1:-2], opcode[-2], opcode[-1]
    if target in ("f16x2", "bf16x2") and source == "f32":
        half = _from_float(target[:-2], flags)
        # The first operand goes to the upper half.
        return (
            "b32",
            ["f32", "f32"],
            lambda a, b: half(a.astype(F64)).astype(U32) << U32(16) | half(b.astype(F64)),
        )
    read, write = _reader(source, flags), _writer(target, source, flags)
    if read is None or write is None:
        return None
    bits = {"f16": "b16", "bf16": "b16", "tf32": "b32"}
    return bits.get(target, target), [bits.get(source, source)], lambda a: write(read(a))


def _reader(source, flags):
    """From a register's bits to float64 for floating types, to the integers themselves for others."""
    if source == "f16":
        return lambda a: a.view(F16).astype(F64)
    if source == "bf16":
        return lambda a: floats.bf16_to_f32(a).astype(F64)
    if source == "f32" and "ftz" in flags:
        return lambda a: floats.flush(a).astype(F64)
    if source in ("f32", "f64"):
        return lambda a: a.astype(F64)
    return (lambda a: a) if source[0] in "usb" else None


def _writer(target, source, flags):
    if source in _FLOATS:
        if target in _FLOATS:
            return _from_float(target, flags)
        return _float_to_integer(target, source, flags) if target[0] in "us" else None
    if target in _FLOATS:
        return _integer_to_float(target, flags)
    return _integer_to_integer(target, flags) if target[0] in "usb" else None


def _from_float(target, flags):
    """From float64 to the target's bits (f16, bf16, tf32) or value."""
    mode = next((flag for flag in flags if flag in ("rn", "rz", "rm", "rp")), "rn")
    whole = next((_INTEGER_ROUNDINGS[flag] for flag in flags if flag in _INTEGER_ROUNDINGS), None)
    finite = {"f16": 65504.0, "bf16": float(floats.bf16_to_f32(np.array([0x7F7F], U16))[0])}

    def convert(x):
        if whole:
            x = whole(x)
        if "relu" in flags:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))
        if "satfinite" in flags:
            x = np.clip(x, -finite[target], finite[target])
        if "sat" in flags:
            x = floats.saturate(x)
        if target == "f16":
            return floats.round_to(x, F16, mode).view(U16)
        if target == "bf16":
            return (
                floats.f64_to_bf16(x)
                if mode == "rn"
                else floats.f32_to_bf16(floats.round_to(x, F32, mode), mode)
            )
        if target == "tf32":
            return floats.f32_to_tf32(x.astype(F32))
        if target == "f32":
            r = floats.round_to(x, F32, mode)
            return floats.flush(r) if "ftz" in flags else r
        return x.copy()

    return convert


def _float_to_integer(target, source, flags):
    """Out of range clamps to the nearest end of the target; NaN gives 0, or the top bit where either type has
    64 bits.
    """
    rounding = next((_INTEGER_ROUNDINGS[flag] for flag in flags if flag in _INTEGER_ROUNDINGS), None)
    if rounding is None:
        return None
    kind = np.dtype(("u" if target[0] == "u" else "i") + str(int(target[1:]) // 8))
    limits = np.iinfo(kind)
    top = kind.type(limits.min if kind.kind == "i" else limits.max // 2 + 1)
    invalid = top if kind.itemsize == 8 or source == "f64" else kind.type(0)

    def convert(x):
        x = rounding(x)
        above = x >= float(limits.max)  # float(max) may have been rounded up to max + 1
        below = x <= float(limits.min)
        value = np.where(above | below | np.isnan(x), 0.0, x).astype(kind)
        value = np.where(above, kind.type(limits.max), np.where(below, kind.type(limits.min), value))
        return np.where(np.isnan(x), invalid, value)

    return convert


def _integer_to_float(target, flags):
    mode = next((flag for flag in flags if flag in ("rn", "rz", "rm", "rp")), "rn")

    def convert(a):
        if target == "f64" and mode == "rn" or target == "f32" and mode == "rn":
            return a.astype(F32 if target == "f32" else F64)  # numpy's is correctly rounded
        high = a & ~a.dtype.type(0xFFF) if a.dtype.itemsize == 8 else a
        x = floats.odd_sum(high.astype(F64), (a - high).astype(F64))  # high has 52 bits, so that it is exact
        if target == "f64":
            return floats.add64(high.astype(F64), (a - high).astype(F64), mode)
        return _from_float(target, (mode,))(x)

    return convert


def _integer_to_integer(target, flags):
    kind = np.dtype(("i" if target[0] == "s" else "u") + str(int(target[1:]) // 8))
    limits = np.iinfo(kind)

    def convert(a):
        if "sat" in flags:
            own = np.iinfo(a.dtype)
            a = np.clip(a, max(limits.min, own.min), min(limits.max, own.max))
        return a.astype(kind)  # keeps the low bits, or extends by the sign of the source

    return convert
