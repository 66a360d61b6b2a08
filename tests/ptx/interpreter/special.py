"""Special registers: where a thread is."""

from __future__ import annotations

import numpy as np

from .faults import LaneFault


def position_in(number, shape):
    """(x, y, z) of what has this number in a block or grid of this shape."""
    return number % shape[0], number // shape[0] % shape[1], number // (shape[0] * shape[1])


def special_register(chunk, name):
    lane = np.arange(chunk.lane_count)
    thread, block = lane % chunk.block_lanes, lane // chunk.block_lanes + chunk.first
    name, _, axis = name[1:].partition(".")
    lane_id = lane & 31
    if name in ("tid", "ctaid", "ntid", "nctaid"):
        shape, place = (chunk.launch.block, thread) if name in ("tid", "ntid") else (chunk.launch.grid, block)
        if name[0] == "n":
            return np.array([shape["xyz".index(axis)]])
        return position_in(place, shape)["xyz".index(axis)]
    constants = {
        "nwarpid": chunk.warps,
        "dynamic_smem_size": chunk.launch.dynamic_shared,
        "total_smem_size": chunk.shared.size,
    }
    if name in constants:
        return np.array([constants[name]])
    values = {
        "laneid": lane_id,
        "warpid": thread >> 5,
        "lanemask_eq": 1 << lane_id,
        "lanemask_lt": (1 << lane_id) - 1,
        "lanemask_le": (2 << lane_id) - 1,
        "lanemask_gt": 0xFFFFFFFF & ~((2 << lane_id) - 1),
        "lanemask_ge": 0xFFFFFFFF & ~((1 << lane_id) - 1),
    }
    if name not in values:
        raise LaneFault("unknown special register", f"%{name}")
    return values[name]
