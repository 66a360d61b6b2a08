"""Steps of loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

import numpy as np

from . import access
from .module import DTYPES, SIZES, Vector

_SPACES = {"global": "global", "const": "global", "shared": "shared", "local": "local", "param": "param"}
_STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}


def space_of(opcode):
    for part in opcode[1:]:
        if part.split("_")[0] in _SPACES:
            return _SPACES[part.split("_")[0]]
    return "generic"


def _load(program, instruction):
    opcode, (target, address) = instruction.opcode, instruction.operands
    kind, size, space = opcode[-1], SIZES[opcode[-1]], space_of(opcode)
    writers, read = program.writers(target, kind), program.read_address(address)
    strong, count, wanted = bool(_STRONG.intersection(opcode)), len(writers), DTYPES[kind]

    def step(state):
        values = access.load(state, space, read(state, state.exact), size, count, strong)
        for i, writer in enumerate(writers):
            state.put(writer, values[:, i].copy().view(wanted))

    return step


def _store(program, instruction):
    opcode, (address, source) = instruction.opcode, instruction.operands
    space, strong = space_of(opcode), bool(_STRONG.intersection(opcode))
    kind = f"b{8 * SIZES[opcode[-1]]}"
    items = source.items if isinstance(source, Vector) else (source,)
    readers, read = [program.read(item, kind) for item in items], program.read_address(address)

    def step(state):
        columns = np.broadcast_arrays(*(reader(state, state.exact) for reader in readers))
        access.store(state, space, read(state, state.exact), np.stack(columns, 1), strong)

    return step


_ATOMICS = {
    "add": lambda old, b: old + b,
    "exch": lambda old, b: b,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "cas": lambda old, b, c: np.where(old == b, c, old),
    "min": np.minimum,
    "max": np.maximum,
    "inc": lambda old, b: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
}


def _atomic(program, instruction):
    opcode, operands = instruction.opcode, instruction.operands
    kind, space = opcode[-1], space_of(opcode)
    function = next(_ATOMICS[part] for part in opcode[1:] if part in _ATOMICS)
    if kind not in ("b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"):
        return None
    writer = program.write(operands[0], kind) if opcode[0] == "atom" else (None, None)
    address, *sources = operands[opcode[0] == "atom" :]
    read, readers = program.read_address(address), [program.read(source, kind) for source in sources]

    def step(state):
        exact = state.exact
        state.put(
            writer,
            access.atomic(state, space, read(state, exact), function, *(r(state, exact) for r in readers)),
        )

    return step


def _copy_async(program, instruction):
    opcode, operands = instruction.opcode, instruction.operands
    if opcode[1] != "async":
        return None
    if "commit_group" in opcode:

        def step(state):
            state.groups[state.active] += 1

    elif "wait_group" in opcode:
        pending = int(operands[0].text)

        def step(state):
            access.wait_copies(state, pending)

    elif "wait_all" in opcode:

        def step(state):
            access.wait_copies(state, None)

    elif opcode[2] in ("ca", "cg"):
        hint = any("cache_hint" in part for part in opcode)
        size = int(operands[2].text)
        destination, source = program.read_address(operands[0]), program.read_address(operands[1])
        has_length = len(operands) > 3 + hint
        length = (
            program.read(operands[3], "u32")
            if has_length
            else lambda state, pick: np.array([size], np.uint32)
        )

        def step(state):
            exact = state.exact
            access.copy_async(
                state, destination(state, exact), source(state, exact), size, length(state, exact)
            )

    else:
        return None
    return step


MEMORY = {"ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "cp": _copy_async}
