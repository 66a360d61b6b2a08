"""The memory a kernel sees: real host buffers as global memory, and arrays for shared, local and parameter
space.

An address is checked before anything is touched. Addresses of the other spaces, once made generic, lie in
windows of their own, far from every host address.
"""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

from .faults import LaneFault

SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61, 1 << 62
EMPTY, WRITTEN, PENDING = 0, 1, 2  # states of a byte; PENDING: cp.async has been issued and not waited for


class Region:
    """A live host buffer. Its arrays start at the address rounded down to 16 bytes, so that they can be seen
    as any type.
    """

    def __init__(self, address, size, name, read_only, initialised):
        self.address, self.end = address, address + size
        self.name = name or f"buffer at {address:#x}"
        self.read_only = read_only
        self.origin = address & ~15
        length = (self.end - self.origin + 15) & ~15
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * max(length, 16)).from_address(self.origin or 16))
        self.state = None if initialised else np.zeros(len(self.bytes), np.uint8)


class GlobalMemory:
    """Which host addresses are a device's memory: `add` what is allocated, `remove` what is freed."""

    def __init__(self):
        self._starts, self._regions = [], []

    def add(self, address: int, size: int, name: str = "", read_only: bool = False, initialised: bool = True):
        """`size` bytes at `address`, which must stay alive. With `initialised=False`, reading what was never
        written is a fault.
        """
        if address <= 0 or size < 0:
            raise ValueError(f"GlobalMemory.add: no buffer of {size} bytes can be at {address:#x}")
        i = bisect.bisect_right(self._starts, address)
        near = self._regions[max(i - 1, 0) : i + 1]
        for other in near:
            if address < other.end and other.address < address + size:
                raise ValueError(f"GlobalMemory.add: {size} bytes at {address:#x} overlap {other.name}")
        self._starts.insert(i, address)
        self._regions.insert(i, Region(address, size, name, read_only, initialised))

    def remove(self, address: int):
        """Forgets the buffer that was added at `address`. Raises KeyError where there is none."""
        i = bisect.bisect_left(self._starts, address)
        if i == len(self._starts) or self._starts[i] != address:
            raise KeyError(f"GlobalMemory.remove: nothing was added at {address:#x}")
        del self._starts[i], self._regions[i]

    def mark_written(self, address: int, size: int):
        """The host has written these bytes (a copy, a memset)."""
        region = self.region_of(address)
        if region is None or address + size > region.end:
            raise ValueError(f"GlobalMemory.mark_written: {size} bytes at {address:#x} are not in one buffer")
        if region.state is not None:
            region.state[address - region.origin : address - region.origin + size] = WRITTEN

    def region_of(self, address):
        i = bisect.bisect_right(self._starts, address) - 1
        region = self._regions[i] if i >= 0 else None
        return region if region and address < region.end else None

    def describe(self, address, size):
        """Where an address lies that is in no buffer."""
        i = bisect.bisect_right(self._starts, address) - 1
        parts = [f"{size} bytes at {address:#x}"]
        if i >= 0:
            region = self._regions[i]
            parts.append(
                f"{address - region.address} bytes into {region.name} of {region.end - region.address} bytes"
            )
        if i + 1 < len(self._regions):
            after = self._regions[i + 1]
            parts.append(f"{after.address - address} bytes before {after.name}")
        return ", ".join(parts)


class Variables(GlobalMemory):
    """A module's const and global variables."""

    def __init__(self, variables):
        super().__init__()
        self.addresses, self._data = {}, []
        for variable in variables:
            data = np.zeros(variable.size + variable.alignment, np.uint8)
            start = -data.ctypes.data % variable.alignment
            data[start : start + variable.size] = np.frombuffer(variable.data, np.uint8)
            self.addresses[variable.name] = data.ctypes.data + start
            self.add(data.ctypes.data + start, variable.size, variable.name, variable.space == "const")
            self._data.append(data)


class Block:
    """Shared or local memory of all lanes in a chunk: rows of `stride` bytes, of which `size` exist."""

    def __init__(self, rows, size):
        self.size = size
        self.stride = (size + 15) & ~15
        self.bytes = np.zeros(max(rows * self.stride, 16), np.uint8)
        self.state = np.zeros(len(self.bytes), np.uint8)


def check_aligned(address, size, lanes):
    wrong = address & (size - 1) != 0
    if wrong.any():
        i = int(wrong.argmax())
        raise LaneFault("misaligned access", f"{size} bytes at {int(address[i]):#x}", int(lanes[i]))


def gather(memory_bytes, position, size, count):
    """[lanes, count] values of `size` bytes each as unsigned integers, from aligned byte positions."""
    kind = np.dtype(f"u{size}")
    values = memory_bytes.view(kind)
    if count == 1:
        return values[position >> (size.bit_length() - 1)][:, None]
    return values.reshape(-1, count)[position >> ((size * count).bit_length() - 1)]


def scatter(memory_bytes, position, values):
    """The inverse of gather; of several lanes at one position the last wins."""
    size, count = values.dtype.itemsize, values.shape[1]
    cells = memory_bytes.view(values.dtype)
    if count == 1:
        cells[position >> (size.bit_length() - 1)] = values[:, 0]
    else:
        cells.reshape(-1, count)[position >> ((size * count).bit_length() - 1)] = values


def states(state, position, size):
    """[lanes, parts]: the states of `size` bytes (at most 16) at each position, as words of up to eight
    bytes.
    """
    return gather(state, position, min(size, 8), max(size // 8, 1))


def every(state_value, size):
    """The word in which each of `size` bytes (at most eight) has this state."""
    return np.dtype(f"u{min(size, 8)}").type(int.from_bytes(bytes([state_value]) * min(size, 8), "little"))


def check_written(state, position, size, lanes, where):
    """No byte may be EMPTY or PENDING."""
    wrong = (states(state, position, size) != every(WRITTEN, size)).any(1)
    if wrong.any():
        i = int(wrong.argmax())
        found = state[position[i] : position[i] + size]
        pending = (found == PENDING).any()
        kind = "read of cp.async data before its wait" if pending else f"read of uninitialised {where} memory"
        raise LaneFault(kind, "", int(lanes[i]))


def check_not_pending(state, position, size, lanes):
    found = state[position[:, None] + np.arange(size)] == PENDING
    if found.any():
        raise LaneFault("write over cp.async data before its wait", "", int(lanes[found.any(1).argmax()]))


def mark(state, position, size, value):
    """Sets the state of `size` bytes at each position."""
    words = np.full((1, max(size // 8, 1)), every(value, size))
    scatter(state, position, np.broadcast_to(words, (len(position), words.shape[1])))
