"""Loads, stores, atomics and asynchronous copies: the bytes they touch, checked, then touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import LaneFault
from .memory import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    PENDING,
    SHARED_WINDOW,
    WRITTEN,
    check_aligned,
    check_not_pending,
    check_written,
    gather,
    mark,
    scatter,
)


@dataclass
class Target:
    """The bytes that some lanes access: `position` in `bytes`, one each, or one for all alike."""

    which: object  # which of the instruction's lanes: a slice or their indices
    lanes: np.ndarray
    where: str  # shared, global, ...
    bytes: np.ndarray
    position: np.ndarray
    state: object = None  # of the bytes, or None where it is not tracked
    shadow: object = None

    def positions(self):
        return np.broadcast_to(self.position, self.lanes.shape)


def targets(state, space, address, size, writing):
    """What `size` bytes at these addresses are, for the active lanes. Faults where they are nothing."""
    lanes, which = state.active, slice(None)
    check_aligned(address, size, lanes)
    if space == "generic":
        yield from _generic(state, address, size, writing)
    elif space in ("shared", "local"):
        yield _own(state, space, address, size, lanes, which)
    elif space == "param":
        yield _param(state, address, size, lanes, which, writing)
    else:
        yield from _global(state, address, size, lanes, which, writing)


def _generic(state, address, size, writing):
    windows = address >> 60
    for window in np.unique(windows):
        which = slice(None) if address.size == 1 else np.flatnonzero(windows == window)
        lanes, part = state.active[which], address if address.size == 1 else address[which]
        if window == SHARED_WINDOW >> 60:
            yield _own(state, "shared", part - SHARED_WINDOW, size, lanes, which)
        elif window == LOCAL_WINDOW >> 60:
            yield _own(state, "local", part - LOCAL_WINDOW, size, lanes, which)
        elif window == PARAM_WINDOW >> 60:
            yield _param(state, part, size, lanes, which, writing)
        else:
            yield from _global(state, part, size, lanes, which, writing)


def _own(state, space, address, size, lanes, which):
    block = getattr(state, space)
    address = np.broadcast_to(address, lanes.shape)
    outside = (address < 0) | (address > block.size - size)
    if outside.any():
        i = int(outside.argmax())
        raise LaneFault(
            f"out-of-bounds access of {space} memory",
            f"{size} bytes at {int(address[i])} of {block.size}",
            int(lanes[i]),
        )
    if space == "local":
        return Target(which, lanes, space, block.bytes, address + lanes * block.stride)
    position = address + lanes // state.block_lanes * block.stride
    return Target(which, lanes, space, block.bytes, position, block.state, state.shared_shadow)


def _param(state, address, size, lanes, which, writing):
    position = address - PARAM_WINDOW
    if (position < 0).any():  # of a function that has been inlined: in local memory
        return _own(state, "local", address, size, lanes, which)
    outside = position > state.param_size - size
    if outside.any() or writing:
        i = int(outside.argmax())
        raise LaneFault(
            "out-of-bounds access of parameters", f"{size} bytes at {int(position[i])}", int(lanes[i])
        )
    return Target(which, lanes, "param", state.params, position)


def _global(state, address, size, lanes, which, writing):
    low, high = (int(address[0]),) * 2 if address.size == 1 else (int(address.min()), int(address.max()))
    region = state.region_of(low)
    if region and high + size <= region.end:
        yield _in_region(state, region, address, lanes, which, writing)
        return
    rest = np.arange(len(lanes)) if isinstance(which, slice) else which
    address = np.broadcast_to(address, lanes.shape)
    while len(rest):
        region = state.region_of(int(address[0]))
        inside = (address >= region.address) & (address + size <= region.end) if region else np.zeros(1, bool)
        if not inside[0]:
            raise LaneFault(
                "out-of-bounds access of global memory",
                state.launch.memory.describe(int(address[0]), size),
                int(lanes[0]),
            )
        yield _in_region(state, region, address[inside], lanes[inside], rest[inside], writing)
        rest, address, lanes = rest[~inside], address[~inside], lanes[~inside]


def _in_region(state, region, address, lanes, which, writing):
    if writing and region.read_only:
        raise LaneFault("write to read-only memory", region.name, int(lanes[0]))
    shadow = None if region.read_only else state.global_shadow(region)
    return Target(which, lanes, "global", region.bytes, address - region.origin, region.state, shadow)


def load(state, space, address, size, count, strong):
    """[lanes or 1, count] values of `size` bytes each."""
    total, whole = size * count, None
    for target in targets(state, space, address, total, False):
        if target.state is not None:
            check_written(target.state, target.position, total, target.lanes, target.where)
        if target.shadow is not None:
            target.shadow.read(target.positions(), total, target.lanes, state.clocks, target.where, strong)
        values = gather(target.bytes, target.position, size, count)
        if isinstance(target.which, slice):
            return values
        if whole is None:
            whole = np.zeros((len(state.active), count), values.dtype)
        whole[target.which] = values
    return whole


def store(state, space, address, values, strong):
    """`values` [lanes or 1, count]."""
    address = np.broadcast_to(address, state.active.shape)
    size = values.dtype.itemsize * values.shape[1]
    values = np.broadcast_to(values, (len(state.active), values.shape[1]))
    for target in targets(state, space, address, size, True):
        _record_write(state, target, size, strong)
        scatter(target.bytes, target.position, values[target.which])


def _record_write(state, target, size, strong):
    if target.state is not None:
        if state.copies:
            check_not_pending(target.state, target.position, size, target.lanes)
        mark(target.state, target.position, size, WRITTEN)
    if target.shadow is not None:
        target.shadow.write(target.position, size, target.lanes, state.clocks, target.where, strong)


def atomic(state, space, address, function, *operands):
    """What was there before. Lanes that meet at one address follow one another in the lanes' order."""
    address = np.broadcast_to(address, state.active.shape)
    operands = [np.broadcast_to(operand, state.active.shape) for operand in operands]
    kind = operands[0].dtype
    before = np.zeros(len(state.active), kind)
    for target in targets(state, space, address, kind.itemsize, True):
        if target.state is not None:
            check_written(target.state, target.position, kind.itemsize, target.lanes, target.where)
        if target.shadow is not None:
            target.shadow.write(
                target.position, kind.itemsize, target.lanes, state.clocks, target.where, True
            )
        cells = target.bytes.view(kind)
        place = target.position >> (kind.itemsize.bit_length() - 1)
        order = np.argsort(place, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(place[order]) != 0])
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        by_rank = order[np.argsort(rank, kind="stable")]
        which = np.arange(len(address))[target.which]
        for turn in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]):
            lanes, cell = which[turn], place[turn]
            before[lanes] = cells[cell]
            cells[cell] = function(cells[cell], *(operand[lanes] for operand in operands))
    return before


@dataclass
class Copy:
    """A cp.async that some lanes have issued: to which positions of shared memory, what, and in which of the
    lane's groups.
    """

    lanes: np.ndarray
    position: np.ndarray
    data: np.ndarray  # [lanes, size] bytes
    group: np.ndarray


def copy_async(state, destination, source, size, source_size):
    """Reads the source at once and shows it in shared memory when it is waited for. The bytes past
    `source_size` are zeros.
    """
    lanes = state.active
    destination, source, source_size = (
        np.broadcast_to(v, lanes.shape) for v in (destination, source, source_size)
    )
    check_aligned(source, size, lanes)
    if (source_size > size).any():
        raise LaneFault("cp.async of more bytes than its size", "", int(lanes[(source_size > size).argmax()]))
    data = np.zeros((len(lanes), size), np.uint8)
    for length in np.unique(source_size[source_size > 0]):
        part = np.flatnonzero(source_size == length)
        with state.narrowed(lanes[part]):
            for offset, piece in _pieces(int(length)):
                data[part, offset : offset + piece] = load(
                    state, "global", source[part] + offset, piece, 1, False
                ).view(np.uint8)
    (target,) = targets(state, "shared", destination, size, True)
    check_not_pending(target.state, target.position, size, lanes)
    target.shadow.write(target.position, size, lanes, state.clocks, "shared")
    mark(target.state, target.position, size, PENDING)
    state.copies.append(Copy(lanes, target.position, data, state.groups[lanes].copy()))


def _pieces(length):
    offset = 0
    while offset < length:
        piece = next(p for p in (8, 4, 2, 1) if p <= length - offset and offset % p == 0)
        yield offset, piece
        offset += piece


def wait_copies(state, pending):
    """The active lanes wait until at most `pending` of their groups are left (None: for all)."""
    waits = np.zeros(state.lane_count, bool)
    waits[state.active] = True
    left = []
    for copy in state.copies:
        done = waits[copy.lanes]
        if pending is not None:
            done &= copy.group < state.groups[copy.lanes] - pending
        if done.any():
            size = copy.data.shape[1]
            lanes, position = copy.lanes[done], copy.position[done]
            scatter(state.shared.bytes, position, copy.data[done].view(f"u{min(size, 8)}"))
            mark(state.shared.state, position, size, WRITTEN)
            state.shared_shadow.write(position, size, lanes, state.clocks, "shared")
        if not done.all():
            keep = ~done
            left.append(Copy(copy.lanes[keep], copy.position[keep], copy.data[keep], copy.group[keep]))
    state.copies = left
