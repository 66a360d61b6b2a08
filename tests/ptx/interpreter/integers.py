"""Integer instructions that numpy has no operator for. Bits are unsigned arrays unless a type is given."""

from __future__ import annotations

import numpy as np

U8, U32, U64, I64 = np.uint8, np.uint32, np.uint64, np.int64


def _mul_high64(a, b):
    mask, half = U64(0xFFFFFFFF), U64(32)
    al, ah, bl, bh = a & mask, a >> half, b & mask, b >> half
    middle = ah * bl + (al * bl >> half)
    other = al * bh + (middle & mask)
    return ah * bh + (middle >> half) + (other >> half)


def mul_high(a, b):
    """The upper half of the product, in the type of a and b."""
    kind, size = a.dtype, a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{kind.kind}{2 * size}")
        return (np.multiply(a, b, dtype=wide) >> wide.type(8 * size)).astype(kind)
    ua, ub = a.view(U64), b.view(U64)
    high = _mul_high64(ua, ub)
    if kind.kind == "i":
        zero = U64(0)
        high = high - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
    return high.view(kind)


def mul_wide(a, b):
    return np.multiply(a, b, dtype=np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}"))


def divide(a, b):
    """Truncating division; by zero, all bits one (as the hardware gives)."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q += (q * safe != a) & ((a < 0) != (safe < 0))
    return np.where(zero, np.array(-1).astype(a.dtype), q)


def remainder(a, b):
    return np.where(b == 0, a, a - divide(a, b) * b)


def shift_left(a, count):
    bits = 8 * a.dtype.itemsize
    return np.where(count >= bits, a.dtype.type(0), a << np.minimum(count, U32(bits - 1)).astype(a.dtype))


def shift_right(a, count):
    """Clamped: a count of all bits or more gives 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, U32(bits - 1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), shifted)


def funnel_left(low, high, count, wrap):
    count = (count & U32(31)) if wrap else np.minimum(count, U32(32))
    pair = high.astype(U64) << U64(32) | low
    return (pair << count.astype(U64) >> U64(32)).astype(U32)


def funnel_right(low, high, count, wrap):
    count = (count & U32(31)) if wrap else np.minimum(count, U32(32))
    pair = high.astype(U64) << U64(32) | low
    return (pair >> count.astype(U64)).astype(U32)


def logic3(a, b, c, table):
    """Bit i of `table` is the result where (a, b, c) spell i."""
    result = a & U32(0) | b & U32(0) | c & U32(0)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def permute(a, b, selector, mode):
    """prmt: four bytes out of the eight of (b, a)."""
    pair = b.astype(U64) << U64(32) | a
    lowest = selector.astype(U64) & U64(3)
    result = U64(0)
    for i in range(4):
        step = U64(i)
        sign = None
        if mode is None:
            nibble = selector.astype(U64) >> U64(4 * i)
            index, sign = nibble & U64(7), nibble & U64(8)
        elif mode == "f4e":
            index = lowest + step
        elif mode == "b4e":
            index = lowest - step & U64(7)
        elif mode == "rc8":
            index = lowest
        elif mode == "ecl":
            index = np.maximum(lowest, step)
        elif mode == "ecr":
            index = np.minimum(lowest, step)
        else:  # rc16
            index = (lowest & U64(1)) * U64(2) + U64(i & 1)
        byte = pair >> index * U64(8) & U64(0xFF)
        if sign is not None:
            byte = np.where(sign != 0, (byte >> U64(7)) * U64(0xFF), byte)
        result = result | byte << U64(8 * i)
    return result.astype(U32)


def extract(a, position, length):
    """bfe: `length` bits from `position` on, filled with the sign for signed types."""
    kind, bits = a.dtype, 8 * a.dtype.itemsize
    position, length = (position & U32(255)).astype(I64), (length & U32(255)).astype(I64)
    top = np.minimum(position + length - 1, bits - 1)
    unsigned = a.astype(U64) if kind.kind == "u" else a.astype(I64).view(U64)
    field = shift_right(unsigned, position.astype(U32)) & _ones(length)
    if kind.kind == "i":
        sign = (unsigned >> np.maximum(top, 0).astype(U64) & U64(1)) != 0
        available = np.clip(bits - position, 0, None)
        field = np.where(sign, field | ~_ones(np.minimum(length, available)), field)
    return np.where(length == 0, U64(0), field).astype(kind)


def _ones(count):
    return ~shift_left(np.full_like(count, -1).view(U64), count.astype(U32))


def insert(a, b, position, length):
    """bfi: the low `length` bits of a into b at `position`."""
    bits = 8 * a.dtype.itemsize
    position, length = position & U32(255), (length & U32(255)).astype(I64)
    field = shift_left(_ones(length), position)
    result = (shift_left(a.astype(U64), position) & field) | (b.astype(U64) & ~field)
    return np.where(position >= bits, b.astype(U64), result).astype(a.dtype)


def reverse(a):
    bits = np.unpackbits(a.view(U8).reshape(-1, a.dtype.itemsize)[:, ::-1], axis=1)
    return np.packbits(bits[:, ::-1], axis=1)[:, ::-1].copy().view(a.dtype).reshape(-1)


def population(a):
    return np.bitwise_count(a).astype(U32) if hasattr(np, "bitwise_count") else _bits(a).sum(1).astype(U32)


def _bits(a):
    """[lanes, bits], most significant first."""
    return np.unpackbits(a.view(U8).reshape(-1, a.dtype.itemsize)[:, ::-1], axis=1)


def leading_zeros(a):
    bits = _bits(a)
    return np.where(a == 0, 8 * a.dtype.itemsize, bits.argmax(1)).astype(U32)


def find(a, shift_amount):
    """bfind: the position of the most significant bit that is not the sign, or how far to shift it left."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a).view(np.dtype(f"u{a.dtype.itemsize}"))
    zeros = leading_zeros(a)
    position = zeros if shift_amount else U32(8 * a.dtype.itemsize - 1) - zeros
    return np.where(a == 0, U32(0xFFFFFFFF), position)
