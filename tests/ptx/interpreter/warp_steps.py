"""Steps of the instructions in which the lanes of a warp work together."""

from __future__ import annotations

import numpy as np

from . import warp
from .integers import population
from .module import Pair, Symbol


def _shuffle(program, instruction):
    opcode, operands = instruction.opcode, instruction.operands
    target, kind = operands[0], opcode[-1]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Symbol("_"))
    writers = [program.write(first, kind), program.write(second, "pred")]
    value, *rest = (program.read(operand, "u32") for operand in operands[1:])

    def step(state):
        b, clamp, members = (np.broadcast_to(read(state, state.exact), state.active.shape) for read in rest)
        for writer, result in zip(
            writers, warp.shuffle(state, opcode[2], value(state, None), b, clamp, members)
        ):
            state.put(writer, result)

    return step


def _collective(function):
    """vote.sync, redux.sync, match.sync: function(state, mode, value, members)."""

    def build(program, instruction):
        opcode, (target, source, members) = instruction.opcode, instruction.operands
        mode, kind = (
            opcode[1] if opcode[0] in ("match", "redux") and opcode[1] != "sync" else opcode[2]
        ), opcode[-1]
        result = "b32" if opcode[0] == "match" else kind
        source_kind = "pred" if opcode[0] == "vote" else kind
        pair = isinstance(target, Pair)
        writers = [
            program.write(one, two)
            for one, two in (
                ((target.first, result), (target.second, "pred")) if pair else ((target, result),)
            )
        ]
        read, read_members = program.read(source, source_kind), program.read(members, "u32")

        def step(state):
            results = function(state, mode, read(state, state.exact), read_members(state, state.exact))
            for writer, value in zip(writers, results if isinstance(results, tuple) else (results,)):
                state.put(writer, value)

        return step

    return build


def _active_mask(program, instruction):
    writer = program.write(instruction.operands[0], "b32")
    return lambda state: state.put(writer, warp.ballot(state.mask)[state.active >> 5])


def _elect(program, instruction):
    target, members = instruction.operands
    writers = [program.write(target.first, "b32"), program.write(target.second, "pred")]
    read = program.read(members, "u32")

    def step(state):
        warp.check_members(state, read(state, state.exact), "elect")
        bits = warp.ballot(state.mask)[state.active >> 5]
        leader = population((bits & -bits) - np.uint32(1))
        state.put(writers[0], leader)
        state.put(writers[1], leader == (state.active & 31))

    return step


def _matrix_access(program, instruction):
    opcode = instruction.opcode
    loads, transposed = opcode[0] == "ldmatrix", "trans" in opcode
    registers, address = instruction.operands if loads else instruction.operands[::-1]
    read = program.read_address(address)
    if "m8n8" not in opcode or opcode[-1] != "b16":
        return None
    if loads:
        writers = program.writers(registers, "b32")

        def step(state):
            words = warp.load_matrices(state, read(state, state.exact), len(writers), transposed)
            for writer, word in zip(writers, words):
                state.put(writer, word)

    else:
        readers = [program.read(register, "b32") for register in registers.items]

        def step(state):
            warp.store_matrices(
                state, read(state, state.exact), [r(state, state.exact) for r in readers], transposed
            )

    return step


def _matrix_transpose(program, instruction):
    writer, read = program.write(instruction.operands[0], "b32"), program.read(instruction.operands[1], "b32")
    return lambda state: state.put(writer, warp.transpose(state, read(state, state.exact)))


def _matrix_multiply(program, instruction):
    opcode, (d, a, b, c) = instruction.opcode, instruction.operands
    shape = next(part for part in opcode if part.startswith("m16n8k"))
    kind = opcode[-3]
    if opcode[-4] != "f32" or opcode[-1] != "f32" or (shape, kind) not in _SHAPES:
        return None
    writers = program.writers(d, "f32")
    readers = [
        [program.read(item, kind) for item in operand.items]
        for operand, kind in ((a, "b32"), (b, "b32"), (c, "f32"))
    ]

    def step(state):
        fragments = [[read(state, state.exact) for read in group] for group in readers]
        for writer, value in zip(writers, warp.multiply_matrices(state, kind, int(shape[6:]), *fragments)):
            state.put(writer, value)

    return step


_SHAPES = {
    ("m16n8k16", "f16"),
    ("m16n8k16", "bf16"),
    ("m16n8k8", "f16"),
    ("m16n8k8", "bf16"),
    ("m16n8k8", "tf32"),
    ("m16n8k4", "tf32"),
}


WARP = {
    "shfl": _shuffle,
    "vote": _collective(warp.vote),
    "match": _collective(warp.match),
    "redux": _collective(warp.reduce),
    "activemask": _active_mask,
    "elect": _elect,
    "ldmatrix": _matrix_access,
    "stmatrix": _matrix_access,
    "movmatrix": _matrix_transpose,
    "mma": _matrix_multiply,
}
