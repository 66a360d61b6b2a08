"""Instructions that are more than arithmetic on registers: moves, memory, warps, predicates of several
operands, carries.
"""

from __future__ import annotations

import numpy as np

from . import floats
from .comparisons import comparison
from .control import CONTROL
from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .memory_steps import MEMORY, space_of
from .module import DTYPES, SIZES, Address, Pair, Vector
from .program import unknown
from .warp_steps import WARP


def decode(program, instruction):
    """The step of one instruction: a function on the state, true if the lanes have to be scheduled anew."""
    name = instruction.opcode[0]
    try:
        step = _BUILDERS[name](program, instruction) if name in _BUILDERS else program.arithmetic(instruction)
    except (NotImplementedError, KeyError, ValueError, AttributeError, IndexError, TypeError):
        return unknown(instruction)
    if step is None:
        return unknown(instruction)
    if name in CONTROL:
        return step  # it has looked at its guard
    return _guarded(program, instruction.guard, step) if instruction.guard else step


def _guarded(program, guard, step):
    read = program.read(guard, "pred")

    def guarded(state):
        chosen = state.mask & read(state, None)
        with state.narrowed(chosen) as any_left:
            if any_left:
                program.outcomes.add((state.pc, True))
                step(state)

    return guarded


def _move(program, instruction):
    kind, (target, source) = instruction.opcode[-1], instruction.operands
    if isinstance(target, Vector):
        part = f"b{8 * SIZES[kind] // len(target.items)}"
        writers, read, parts = program.writers(target, part), program.read(source, kind), DTYPES[part]

        def unpack(state):
            value = read(state, state.pick)
            columns = np.ascontiguousarray(value).view(parts).reshape(len(value), -1)
            for i, (slot, convert) in enumerate(writers):
                if slot is not None:
                    column = columns[:, i].copy()
                    state.set(slot, convert(column) if convert else column)

        return unpack
    slot, convert = program.write(target, kind)
    if isinstance(source, Vector):
        part = f"b{8 * SIZES[kind] // len(source.items)}"
        readers, whole = [program.read(item, part) for item in source.items], DTYPES[kind]

        def pack(state):
            columns = np.broadcast_arrays(*(read(state, state.pick) for read in readers))
            value = np.stack(columns, 1).view(whole).reshape(-1)
            state.set(slot, convert(value) if convert else value)

        return pack
    read = program.read(source, kind)

    def move(state):
        value = read(state, state.pick)
        state.set(slot, convert(value).copy() if convert else value.copy())

    return move


def _convert_address(program, instruction):
    """cvta: shared and local addresses become generic by their window; all others are generic already."""
    opcode, (target, source) = instruction.opcode, instruction.operands
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space_of(opcode), 0)
    window, kind = np.uint64(window), opcode[-1]
    slot, convert = program.write(target, kind)
    read = program.read_address(source) if isinstance(source, Address) else program.read(source, kind)
    back = "to" in opcode

    def step(state):
        value = read(state, state.pick).astype(np.uint64)
        value = (value - window if back else value + window).astype(DTYPES[kind])
        state.set(slot, convert(value) if convert else value)

    return step


def _compare(program, instruction):
    """setp.compare[.bool] p|q, a, b, [!]c: p = compare(a, b) bool c, q = !compare(a, b) bool c."""
    opcode, (target, a, b, *rest) = instruction.opcode, instruction.operands
    kind = opcode[-1]
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        return None
    compare, read_a, read_b = comparison(opcode[1], kind), program.read(a, kind), program.read(b, kind)
    flush = "ftz" in opcode
    targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
    slots = [program.write(one, "pred")[0] for one in targets]
    if not rest and not flush and len(slots) == 1:
        (slot,) = slots

        def plain(state):
            state.set(slot, compare(read_a(state, state.pick), read_b(state, state.pick)))

        return plain
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[opcode[2]] if rest else None
    read_c = program.read(rest[0], "pred") if rest else None

    def step(state):
        pick = state.pick
        x, y = read_a(state, pick), read_b(state, pick)
        value = compare(floats.flush(x), floats.flush(y)) if flush else compare(x, y)
        values, c = (value, ~value), read_c and read_c(state, pick)
        for slot, value in zip(slots, values):
            if slot is not None:
                state.set(slot, combine(value, c) if combine else value)

    return step


def _carrying(program, instruction):
    """add, sub and mad with carry-in (the opcode ends in c) and carry-out (.cc), on 32 or 64 bits."""
    opcode, (target, *sources) = instruction.opcode, instruction.operands
    name, kind = opcode[0], f"u{opcode[-1][1:]}"
    carry_in, carry_out = name in ("addc", "subc", "madc"), "cc" in opcode
    if not carry_in and not carry_out:
        return program.arithmetic(instruction)
    slot, convert = program.write(target, kind)
    readers, bits = [program.read(source, kind) for source in sources], 8 * SIZES[kind]

    def step(state):
        pick = state.pick
        values = [read(state, pick).astype(object) for read in readers]  # Python's integers: rare, and simple
        carry = state.registers[program.carry] if carry_in else np.zeros(1, bool)
        carry = (carry if pick is None or carry.size == 1 else carry[pick]).astype(object)
        if name[:3] == "sub":
            exact = values[0] - values[1] - carry
        elif name[:3] == "add":
            exact = values[0] + values[1] + carry
        else:
            product = values[0] * values[1]
            exact = (product >> bits if "hi" in opcode else product % (1 << bits)) + values[2] + carry
        value = (exact % (1 << bits)).astype(f"u{bits // 8}")
        state.set(slot, convert(value) if convert else value)
        if carry_out:
            state.set(program.carry, ((exact < 0) | (exact >= 1 << bits)).astype(bool))

    return step


def _nothing(program, instruction):
    return lambda state: None


_BUILDERS = {
    **CONTROL,
    **MEMORY,
    **WARP,
    "mov": _move,
    "cvta": _convert_address,
    "setp": _compare,
    **dict.fromkeys(("add", "addc", "sub", "subc", "mad", "madc"), _carrying),
    **dict.fromkeys(
        ("membar", "fence", "nanosleep", "prefetch", "prefetchu", "discard", "griddepcontrol"), _nothing
    ),
}
