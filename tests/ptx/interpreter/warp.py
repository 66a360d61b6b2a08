"""Instructions in which the lanes of a warp work together: shuffles, votes, matrices."""

from __future__ import annotations

import numpy as np

from .access import load, store
from .faults import LaneFault, NotConverged
from .floats import bf16_to_f32

U32, F32, F64, I64 = np.uint32, np.float32, np.float64, np.int64
LANE = np.arange(32)
ROW, COLUMN = LANE >> 2, LANE & 3  # of a lane's element pair in an 8x8 matrix


def ballot(mask):
    """[warps]: the bits of each warp of a boolean per lane."""
    return np.packbits(mask, bitorder="little").view(U32)


def check_members(state, members, name):
    """Every lane that `members` (bits, one value a lane) names and that has not exited must be here, the lane
    itself among them.
    """
    warp = state.active >> 5
    absent = np.broadcast_to(members, warp.shape) & (ballot(state.live) & ~ballot(state.mask))[warp]
    own = np.broadcast_to(members, warp.shape) >> (state.active & 31).astype(U32) & U32(1)
    wrong = (absent != 0) | (own == 0)
    if wrong.any():
        i = int(wrong.argmax())
        kind = f"{name} with lanes that are not converged"
        if not own[i]:
            raise LaneFault(kind, "its mask does not name the lane itself", int(state.active[i]))
        detail = f"lanes {int(absent[i]):#010x} of its mask are elsewhere"
        raise NotConverged(kind, detail, int(state.active[i]))


def check_whole_warps(state, name):
    """Every warp that is here must be here with all 32 lanes. Returns the number of warps."""
    here = ballot(state.mask)
    partial = (here != 0) & (here != U32(0xFFFFFFFF))
    if partial.any():
        raise NotConverged(
            f"{name} with lanes that are not converged",
            "it takes all 32 lanes of a warp",
            int(partial.argmax()) * 32 + int(here[partial.argmax()]).bit_length() - 1,
        )
    return len(state.active) // 32


def shuffle(state, mode, value, lane_operand, clamp, members):
    """(value of the source lane, whether it was in the segment), for the active lanes; `value` is of all
    lanes.
    """
    check_members(state, members, "shfl")
    lane = (state.active & 31).astype(I64)
    b, clamp = lane_operand.astype(I64) & 31, clamp.astype(I64)
    segment = clamp >> 8 & 31
    most, least = (lane & segment) | (clamp & 31 & ~segment), lane & segment
    source = {
        "up": lambda: lane - b,
        "down": lambda: lane + b,
        "bfly": lambda: lane ^ b,
        "idx": lambda: least | (b & ~segment),
    }[mode]()
    inside = source >= most if mode == "up" else source <= most
    source = np.where(inside, source, lane) + (state.active & ~31)
    absent = ~state.mask[source]
    if absent.any():
        i = int(absent.argmax())
        raise LaneFault(
            "shfl from a lane that is not here",
            f"lane {int(source[i]) & 31} of the warp",
            int(state.active[i]),
        )
    value = np.broadcast_to(value, state.lane_count)
    return value[source], inside


def _per_warp(state, values, fill):
    """[warps, 32] with `fill` where a lane is not here."""
    full = np.full(state.lane_count, fill, values.dtype)
    full[state.active] = values
    return full.reshape(-1, 32)


def vote(state, mode, predicate, members):
    check_members(state, members, "vote")
    predicate = np.broadcast_to(predicate, state.active.shape)
    bits = ballot(_per_warp(state, predicate, False).reshape(-1))[state.active >> 5]
    if mode == "ballot":
        return bits
    here = ballot(state.mask)[state.active >> 5]
    return {"any": bits != 0, "all": bits == here, "uni": (bits == 0) | (bits == here)}[mode]


def match(state, mode, value, members):
    """(bits of the lanes with the same value, for `all` 0 where not all agree; whether all agree)"""
    check_members(state, members, "match")
    value = np.broadcast_to(value, state.active.shape)
    values = _per_warp(state, value, 0)[state.active >> 5]
    here = state.mask.reshape(-1, 32)[state.active >> 5]
    same = (values == value[:, None]) & here
    bits = np.packbits(same, axis=1, bitorder="little").view(U32).reshape(-1)
    agree = (same == here).all(1)
    return (np.where(agree, bits, U32(0)) if mode == "all" else bits), agree


REDUCTIONS = {
    "add": (np.add, 0),
    "and": (np.bitwise_and, -1),
    "or": (np.bitwise_or, 0),
    "xor": (np.bitwise_xor, 0),
    "min": (np.minimum, "max"),
    "max": (np.maximum, "min"),
}


def reduce(state, mode, value, members):
    check_members(state, members, "redux")
    value = np.broadcast_to(value, state.active.shape)
    function, neutral = REDUCTIONS[mode]
    limits = np.iinfo(value.dtype)
    fill = getattr(limits, neutral) if isinstance(neutral, str) else np.array(neutral).astype(value.dtype)
    return function.reduce(_per_warp(state, value, fill), axis=1, dtype=value.dtype)[state.active >> 5]


def load_matrices(state, address, count, transposed):
    """`count` words a lane: its part of 8x8 matrices of 16-bit elements, whose rows lie at the addresses of
    eight lanes each.
    """
    warps = check_whole_warps(state, "ldmatrix")
    rows = _matrix_rows(state, address, warps, count)
    words = []
    for i in range(count):
        if transposed:
            halves = [
                load(state, "shared", (rows[:, i, 2 * COLUMN + h] + 2 * ROW).reshape(-1), 2, 1, False)
                for h in (0, 1)
            ]
            words.append(halves[0][:, 0].astype(U32) | halves[1][:, 0].astype(U32) << U32(16))
        else:
            words.append(load(state, "shared", (rows[:, i, ROW] + 4 * COLUMN).reshape(-1), 4, 1, False)[:, 0])
    return words


def store_matrices(state, address, words, transposed):
    warps = check_whole_warps(state, "stmatrix")
    rows = _matrix_rows(state, address, warps, len(words))
    for i, word in enumerate(words):
        word = np.broadcast_to(word, state.active.shape)
        if transposed:
            for h in (0, 1):
                half = (word >> U32(16 * h)).astype(np.uint16)[:, None]
                store(state, "shared", (rows[:, i, 2 * COLUMN + h] + 2 * ROW).reshape(-1), half, False)
        else:
            store(
                state, "shared", (rows[:, i, ROW] + 4 * COLUMN).reshape(-1), word.astype(U32)[:, None], False
            )


def _matrix_rows(state, address, warps, count):
    """[warps, count, 8] addresses of rows."""
    rows = (
        np.broadcast_to(address, state.active.shape)
        .reshape(warps, 32)[:, : 8 * count]
        .reshape(warps, count, 8)
    )
    if (rows & 15).any():
        raise LaneFault(
            "misaligned access",
            "the rows of ldmatrix and stmatrix lie at multiples of 16 bytes",
            int(state.active[0]),
        )
    return rows


def transpose(state, word):
    """movmatrix: the 8x8 matrix of 16-bit elements, two a lane, transposed."""
    warps = check_whole_warps(state, "movmatrix")
    halves = (
        np.ascontiguousarray(np.broadcast_to(word, state.active.shape)).view(np.uint16).reshape(warps, 8, 8)
    )
    return np.ascontiguousarray(halves.transpose(0, 2, 1)).reshape(warps, 64).view(U32).reshape(-1)


def _elements(word, kind):
    """[..., 1 or 2] float64 values of a register."""
    if kind == "tf32":
        return (word & U32(0xFFFFE000)).view(F32).astype(F64)[..., None]
    halves = np.stack([word.astype(np.uint16), (word >> U32(16)).astype(np.uint16)], -1)
    return (halves.view(np.float16) if kind == "f16" else bf16_to_f32(halves)).astype(F64)


def multiply_matrices(state, kind, depth, a, b, c):
    """D[16, 8] = A[16, depth] B[depth, 8] + C, the fragments being lists of arrays over the active lanes.

    A lane holds rows ROW and ROW + 8 of A, C and D, and column ROW of B; its elements along the depth start
    at `per * COLUMN`, `per` being the elements in a word. Products are summed in float64 and rounded to
    float32 once.
    """
    warps = check_whole_warps(state, "mma")
    per = 1 if kind == "tf32" else 2
    span = 4 * per  # the elements of one register of all four lanes of a row

    def shaped(word):
        return np.broadcast_to(word, state.active.shape).reshape(warps, 32)

    left, right = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
    for i, word in enumerate(a):
        values = _elements(shaped(word), kind).reshape(warps, 8, span)
        left[:, 8 * (i & 1) : 8 * (i & 1) + 8, span * (i >> 1) : span * (i >> 1) + span] = values
    for i, word in enumerate(b):
        right[:, span * i : span * i + span] = (
            _elements(shaped(word), kind).reshape(warps, 8, span).transpose(0, 2, 1)
        )
    product = left @ right
    return [
        (shaped(word).astype(F64) + product[:, ROW + 8 * (i >> 1), 2 * COLUMN + (i & 1)])
        .astype(F32)
        .reshape(-1)
        for i, word in enumerate(c)
    ]
