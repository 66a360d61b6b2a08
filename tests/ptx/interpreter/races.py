"""Which accesses are ordered, and which are not: the race detector.

Every block has a clock that ticks whenever threads of it synchronise. `seen[b, v, w]` is the time before
which all that warp w did is ordered before what warp v does next: a vector clock over warps. A barrier among
some warps joins theirs; a `bar.warp.sync` of a whole warp sets its `seen[b, w, w]`, which orders its own
threads. One of a part of a warp sets `within[b, w]`, the same between single lanes. Different blocks are
never ordered: fences with atomics, by which they could be, are not modelled. Atomic and volatile accesses
("strong" ones) do not race with one another.

A cell of memory remembers its last writer and two readers, preferably of different warps. That may miss a
race with a third reader where only some warps meet at a barrier; it never invents one.
"""

from __future__ import annotations

import numpy as np

from .faults import LaneFault


class Clocks:
    """The clocks of the blocks of one chunk, whose first thread is number `first` of the launch."""

    def __init__(self, blocks, warps, first):
        self.blocks, self.warps, self.first = blocks, warps, first
        self.per_block = 32 * warps
        self.time = np.zeros(blocks, np.int32)
        self.seen = np.zeros((blocks, warps, warps), np.int32)
        self.within = None  # [blocks, warps, 32, 32], once it is needed
        self._refresh()

    def _refresh(self):
        lanes = np.repeat(np.arange(self.blocks), self.per_block)
        self.now = self.time[lanes]  # of every lane
        floor = self.seen.min(axis=(1, 2))
        self.floor = floor[lanes]  # what is older is ordered before everything in the block

    def barrier(self, blocks, members):
        """Warps `members[i]` (boolean) of block `blocks[i]` meet."""
        self.time[blocks] += 1
        joined = np.where(members[:, :, None], self.seen[blocks], 0).max(1)
        joined = np.where(members, self.time[blocks][:, None], joined)
        self.seen[blocks] = np.where(members[:, :, None], joined[:, None, :], self.seen[blocks])
        self._refresh()

    def warp_barrier(self, warps, members):
        """Lanes `members[i]` (boolean) of warp `warps[i]`, counted over all blocks, meet; `members` has all
        live lanes or a part.
        """
        block, warp = warps // self.warps, warps % self.warps
        self.time[np.unique(block)] += 1
        whole = members.all(1)
        self.seen[block[whole], warp[whole], warp[whole]] = self.time[block[whole]]
        if not whole.all():
            if self.within is None:
                self.within = np.zeros((self.blocks, self.warps, 32, 32), np.int32)
            block, warp, members = block[~whole], warp[~whole], members[~whole]
            rows = self.within[block, warp]
            joined = np.where(members[:, :, None], rows, 0).max(1)
            joined = np.where(members, self.time[block][:, None], joined)
            self.within[block, warp] = np.where(members[:, :, None], joined[:, None, :], rows)
        self._refresh()

    def unordered(self, other, stamp, lane):
        """Whether what thread `other` of the launch did at `stamp` is not ordered before what `lane` of this
        chunk does now.
        """
        other = other - self.first
        foreign = other // self.per_block != lane // self.per_block
        recent = foreign | (stamp >= self.floor[lane])
        if not recent.any():
            return recent
        there = np.where(foreign, 0, other)
        block, warp, other_warp = (
            lane // self.per_block,
            lane % self.per_block // 32,
            there % self.per_block // 32,
        )
        seen = self.seen[block, warp, other_warp]
        if self.within is not None:
            closer = np.where(warp == other_warp, self.within[block, warp, lane % 32, there % 32], 0)
            seen = np.maximum(seen, closer)
        return foreign | (stamp >= seen)


class Shadow:
    """Who wrote and who read each cell of `1 << shift` bytes. Threads are numbered through the launch."""

    def __init__(self, size, shift):
        cells = (size >> shift) + 1
        self.shift = shift
        self.thread = np.full((3, cells), -1, np.int32)  # writer, reader, another reader
        self.stamp = np.full((3, cells), -1, np.int32)  # twice the time, plus one for a strong access

    def cells(self, position, size, lane):
        """The cells that `size` bytes at each position cover, and the lane of each, both flat."""
        first, count = position >> self.shift, max(size >> self.shift, 1)
        if count == 1:
            return first, lane
        return (first[:, None] + np.arange(count)).reshape(-1), np.repeat(lane, count)

    def _check(self, slot, cell, lane, me, clocks, strong, kind):
        other, stamp = self.thread[slot, cell], self.stamp[slot, cell]
        near = (other >= 0) & (other != me)
        if strong:
            near &= stamp & 1 == 0
        i = np.flatnonzero(near)
        if len(i):
            wrong = clocks.unordered(other[i], stamp[i] >> 1, lane[i])
            if wrong.any():
                first = i[wrong.argmax()]
                raise LaneFault(kind, "", int(lane[first]), int(other[first]))

    def read(self, position, size, lane, clocks, where, strong=False):
        cell, lane = self.cells(position, size, lane)
        me = (lane + clocks.first).astype(np.int32)
        self._check(0, cell, lane, me, clocks, strong, f"race in {where} memory: read after write")
        stamp = clocks.now[lane] * 2 + strong
        thread, last = self.thread, self.stamp
        before = thread[1, cell]
        i = np.flatnonzero((before >= 0) & (before != me))
        if len(i):
            i = i[
                self._elsewhere(1, cell[i], lane[i], me[i], clocks)
                | ~self._elsewhere(2, cell[i], lane[i], me[i], clocks)
            ]
            thread[2, cell[i]], last[2, cell[i]] = before[i], last[1, cell[i]]
        thread[1, cell], last[1, cell] = me, stamp
        after = thread[1, cell]
        i = np.flatnonzero(after != me)  # several lanes read one cell in one instruction
        if len(i):
            other_warp = after[i] >> 5 != me[i] >> 5
            for i in (i[~other_warp & ~self._elsewhere(2, cell[i], lane[i], me[i], clocks)], i[other_warp]):
                thread[2, cell[i]], last[2, cell[i]] = me[i], stamp[i]

    def _elsewhere(self, slot, cell, lane, me, clocks):
        """Whether a slot holds an access of another warp that may still race."""
        other = self.thread[slot, cell]
        recent = self.stamp[slot, cell] >> 1 >= clocks.floor[lane]
        recent |= (other - clocks.first) // clocks.per_block != lane // clocks.per_block
        return (other >= 0) & (other >> 5 != me >> 5) & recent

    def write(self, position, size, lane, clocks, where, strong=False):
        cell, lane = self.cells(position, size, lane)
        me = (lane + clocks.first).astype(np.int32)
        self._check(0, cell, lane, me, clocks, strong, f"race in {where} memory: write after write")
        for slot in (1, 2):
            self._check(slot, cell, lane, me, clocks, strong, f"race in {where} memory: write after read")
        self.thread[0, cell], self.stamp[0, cell] = me, clocks.now[lane] * 2 + strong
        clash = self.thread[0, cell] != me
        if clash.any() and not strong:
            first = int(clash.argmax())
            raise LaneFault(
                f"race in {where} memory: write after write",
                "in one instruction",
                int(lane[first]),
                int(self.thread[0, cell[first]]),
            )
