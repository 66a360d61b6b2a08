"""Branches, exits and barriers: instructions after which lanes go different ways, or wait."""

from __future__ import annotations

import numpy as np

from . import warp
from .faults import LaneFault
from .program import unknown


def _chosen(program, instruction):
    """Function to the mask of the lanes that an instruction is for."""
    if instruction.guard is None:
        return lambda state: state.mask
    read = program.read(instruction.guard, "pred")
    return lambda state: state.mask & read(state, None)


def _branch(program, instruction):
    chosen, target = _chosen(program, instruction), program.labels[instruction.operands[0].name]

    def step(state):
        taken = chosen(state)
        count = np.count_nonzero(taken)
        if count < state.count:
            program.outcomes.add((state.pc, False))
            if count == 0:
                return False
            state.enqueue(state.pc + 1, state.mask & ~taken)
        program.outcomes.add((state.pc, True))
        state.enqueue(target, taken)
        return True

    return step


def _branch_indexed(program, instruction):
    chosen, (index, table) = _chosen(program, instruction), instruction.operands
    read, places = program.read(index, "u32"), [program.labels[label.name] for label in table.items]

    def step(state):
        taken = chosen(state)
        index = np.broadcast_to(read(state, None), state.lane_count)
        outside = taken & (index >= len(places))
        if outside.any():
            raise LaneFault("brx.idx past the end of its table", "", int(outside.argmax()))
        for i in np.unique(index[taken]):
            state.enqueue(places[i], taken & (index == i))
        if (rest := state.mask & ~taken).any():
            state.enqueue(state.pc + 1, rest)
        return True

    return step


def _exit(program, instruction):
    chosen = _chosen(program, instruction)

    def step(state):
        leaving = chosen(state)
        if not leaving.any():
            return False
        program.outcomes.add((state.pc, True))
        state.exit(leaving)
        if (rest := state.mask & ~leaving).any():
            state.enqueue(state.pc + 1, rest)
        return True

    return step


def _trap(program, instruction):
    """A trap, or a call of a function without a body: only a failed assertion is known."""
    chosen = _chosen(program, instruction)
    failed = "assertion failed" if "__assertfail" in instruction.text else "unknown instruction"
    kind = "trap" if instruction.opcode[0] == "trap" else failed

    def step(state):
        if (lanes := np.flatnonzero(chosen(state))).size:
            raise LaneFault(kind, instruction.text, int(lanes[0]))

    return step


def _barrier(program, instruction):
    opcode, operands = instruction.opcode, instruction.operands
    if "warp" in opcode:
        return _warp_barrier(program, instruction)
    waits = "sync" in opcode
    if not (waits or "arrive" in opcode) or instruction.guard:
        return unknown(instruction)
    identity = program.read(operands[0], "u32")
    count = program.read(operands[1], "u32") if len(operands) > 1 else None

    def step(state):
        if waits and count is None and state.count == state.lane_total and not len(state.barriers):
            state.clocks.barrier(np.arange(state.blocks), np.ones((state.blocks, state.clocks.warps), bool))
            return False
        expected = count(state, state.exact).astype(np.int64) if count else None
        state.barriers.arrive(identity(state, state.exact), expected, waits)
        return True

    return step


def _warp_barrier(program, instruction):
    chosen, members = _chosen(program, instruction), program.read(instruction.operands[0], "u32")

    def step(state):
        with state.narrowed(chosen(state)) as any_left:
            if not any_left:
                return
            program.outcomes.add((state.pc, True))
            named = members(state, state.exact)
            warp.check_members(state, named, "bar.warp.sync")
            named = np.broadcast_to(named, state.active.shape)
            warps, first = np.unique(state.active >> 5, return_index=True)
            bits = named[first][:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
            state.clocks.warp_barrier(warps, (bits != 0) | ~state.live.reshape(-1, 32)[warps])

    return step


CONTROL = {
    "bra": _branch,
    "brx": _branch_indexed,
    "ret": _exit,
    "exit": _exit,
    "trap": _trap,
    "call": _trap,
    "bar": _barrier,
    "barrier": _barrier,
}
