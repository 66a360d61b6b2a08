"""Runs a kernel: many blocks at a time, all their threads as lanes of wide arrays.

Lanes at one instruction run together. Where they part, the group that is furthest behind runs first, until it
reaches the next one and joins it. That brings the sides of a branch together at its end, but a thread that
spins until another one at a later instruction lets it go spins for ever; STEP_LIMIT ends that.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from .barriers import Barriers
from .decoding import decode
from .faults import LaneFault, NotConverged, PtxFault
from .memory import Block, GlobalMemory, Variables
from .module import Module
from .program import Program, storage
from .races import Clocks, Shadow
from .special import position_in, special_register

LANES = 16384  # of a chunk: arrays of 128 KiB, so that a few of them stay in the cache
SHARED_BYTES = 4 << 20  # of a chunk
STEP_LIMIT = 20_000_000  # instructions of one chunk


def launch(
    module: Module, name: str, grid, block, dynamic_shared: int, params: list, memory: GlobalMemory
) -> None:
    """Runs kernel `name` on `grid` blocks of `block` threads, (x, y, z) each.

    `params` holds the bytes of each parameter, as C lays it out. Raises PtxFault where the kernel does
    something wrong.
    """
    kernel = module.kernels[name]
    given, wanted = [len(p) for p in params], [p.size for p in kernel.params]
    if given != wanted:
        raise ValueError(f"launch of {name}: params are of {given} bytes, expected {wanted}")
    threads = block[0] * block[1] * block[2]
    if not 1 <= threads <= 1024 or min(grid) < 1:
        raise ValueError(f"launch of {name}: grid {tuple(grid)} of blocks {tuple(block)} is not possible")
    program = _program(module, name)
    this = _Launch(program, tuple(grid), tuple(block), dynamic_shared, params, memory, module.loaded, {})
    shared = program.sizes["shared"] + dynamic_shared
    blocks = grid[0] * grid[1] * grid[2]
    at_once = max(1, min(blocks, LANES // -(-threads // 32 * 32), SHARED_BYTES // max(shared, 1)))
    with np.errstate(all="ignore"):
        for first in range(0, blocks, at_once):
            _Chunk(this, first, min(at_once, blocks - first)).run()


def _program(module, name):
    """The kernel, laid out once; its instructions are decoded when they are first met."""
    if module.loaded is None:
        module.loaded = Variables(v for v in module.variables.values() if v.data is not None)
    if name not in module.programs:
        program = module.programs[name] = Program(module, module.kernels[name], module.loaded.addresses)
        program.steps = [_undecoded(program, pc) for pc in range(len(program.instructions))]
    return module.programs[name]


def _undecoded(program, pc):
    def step(state):
        decoded = program.steps[pc] = decode(program, program.instructions[pc])
        if not program.instructions[pc].guard:
            program.outcomes.add((pc, True))
        return decoded(state)

    return step


class _Launch(NamedTuple):
    program: Program
    grid: tuple
    block: tuple
    dynamic_shared: int
    params: list
    memory: GlobalMemory
    variables: Variables
    shadows: dict  # of regions of global memory


class _Chunk:
    """The state of some blocks that run together. The steps of a program work on it."""

    def __init__(self, launch, first, blocks):
        self.launch, self.program, self.first, self.blocks = launch, launch.program, first, blocks
        block = launch.block
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // 32)
        self.block_lanes = 32 * self.warps
        self.lane_count = blocks * self.block_lanes
        self.lane_total = blocks * self.threads  # lanes that are threads
        self.shared = Block(blocks, self.program.sizes["shared"] + launch.dynamic_shared)
        self.local = Block(self.lane_count, self.program.sizes["local"])
        self.shared_shadow = Shadow(len(self.shared.bytes), self.program.shift)
        self.clocks = Clocks(blocks, self.warps, first * self.block_lanes)
        self.params = self._lay_out(launch.params)
        self.registers = [np.zeros(1, storage(kind)) for kind in self.program.types]
        self.copies, self.groups = [], np.zeros(self.lane_count, np.int64)  # of cp.async
        in_block = np.arange(self.lane_count) % self.block_lanes
        self.live = in_block < self.threads
        self.live_count = self.lane_total
        self.queue = {0: self.live.copy()}  # groups of lanes that can run, by where they are
        self.barriers = Barriers(self)
        self._specials, self.pc = {}, 0

    def _lay_out(self, params):
        end = max((p.offset + p.size for p in self.program.kernel.params), default=0)
        self.param_size = end
        data = np.zeros((end + 31) & ~15, np.uint8)
        for param, value in zip(self.program.kernel.params, params):
            data[param.offset : param.offset + param.size] = np.frombuffer(bytes(value), np.uint8)
        return data

    # Scheduling.

    def run(self):
        """Runs the group of lanes at the lowest place up to the next group, which it joins there. A group that lacks
        lanes of its warps waits for them, until no other can run.
        """
        try:
            steps, issued, held = self.program.steps, 0, {}
            while self.queue:
                pc = min(self.queue)
                group = self.queue.pop(pc)
                if pc in held:
                    group |= held.pop(pc)[0]
                self.activate(group)
                end = min((place for place in (*self.queue, *held) if place > pc), default=len(steps))
                start = pc
                try:
                    while pc < end:
                        self.pc = pc
                        if steps[pc](self):
                            break
                        pc += 1
                    else:
                        if end == len(steps):
                            self.exit(self.mask)
                        else:
                            self.enqueue(end, self.mask)
                except NotConverged as fault:
                    held[pc] = group, fault
                issued += pc - start + 1
                if issued > STEP_LIMIT:
                    raise LaneFault("no end", f"after {STEP_LIMIT} instructions", int(self.active[0]))
            for self.pc, (_, fault) in held.items():
                raise fault
            self.barriers.check_empty()
        except LaneFault as fault:
            raise self._located(fault) from None

    def activate(self, mask):
        """Makes these lanes the active ones. Arithmetic on them works on whole arrays where they are many,
        and else on the lanes in `pick`; it may overwrite registers of lanes that have exited.
        """
        self.mask, self.count = mask, np.count_nonzero(mask)
        self._active = None
        self.wide = self.count == self.live_count
        self.pick = None if self.wide or 4 * self.count >= self.lane_count else self.active

    @property
    def active(self):
        """The indices of the active lanes."""
        if self._active is None:
            self._active = np.flatnonzero(self.mask)
        return self._active

    @property
    def exact(self):
        """None where every lane is active, or the active ones: what memory and warp instructions work on."""
        return None if self.count == self.lane_count else self.active

    def enqueue(self, pc, mask):
        self.queue[pc] = self.queue[pc] | mask if pc in self.queue else mask

    def exit(self, mask):
        self.live = self.live & ~mask
        self.live_count = np.count_nonzero(self.live)

    @contextmanager
    def narrowed(self, lanes):
        """Within it only these lanes, given as a mask or indices, are active; says whether there are any."""
        if lanes.dtype != bool:
            lanes, indices = np.zeros(self.lane_count, bool), lanes
            lanes[indices] = True
        before = self.mask
        self.activate(lanes)
        yield self.count > 0
        self.activate(before)

    # Registers. An array of a register belongs to it alone, unless it has one element, which is never changed
    # in place.

    def _own(self, slot):
        value = self.registers[slot]
        if value.size != self.lane_count:
            value = self.registers[slot] = np.full(self.lane_count, value[0])
        return value

    def set(self, slot, value):
        """The result of arithmetic on what was read with `pick`."""
        if self.wide:
            self.registers[slot] = value
        elif self.pick is None:
            np.copyto(self._own(slot), value, where=self.mask)
        else:
            self._own(slot)[self.pick] = value

    def put(self, writer, value):
        """The result of an instruction that worked on the active lanes alone."""
        slot, convert = writer
        if slot is None:
            return
        if convert:
            value = convert(value)
        if self.count == self.lane_count or self.wide and value.size == 1:
            self.registers[slot] = value
        else:
            self._own(slot)[self.active] = value

    def special(self, name):
        """The array of a special register, over all lanes."""
        if name not in self._specials:
            self._specials[name] = special_register(self, name)
        return self._specials[name]

    # Memory.

    def region_of(self, address):
        return self.launch.memory.region_of(address) or self.launch.variables.region_of(address)

    def global_shadow(self, region):
        shadows = self.launch.shadows
        if region not in shadows:
            shadows[region] = Shadow(len(region.bytes), self.program.shift)
        return shadows[region]

    def _located(self, fault):
        instruction = self.program.instructions[self.pc]
        block = thread = None
        detail = fault.detail
        if fault.lane is not None:
            block, thread = self._who(fault.lane + self.first * self.block_lanes)
        if fault.other is not None:
            other_block, other = self._who(fault.other)
            detail += f" against block {other_block}, thread {other}"
        return PtxFault(fault.kind, detail.strip(), self.program.name, instruction.lines, block, thread)

    def _who(self, thread):
        """(block, thread) of a thread's number in the launch."""
        block, thread = divmod(thread, self.block_lanes)
        return position_in(block, self.launch.grid), position_in(thread, self.launch.block)
