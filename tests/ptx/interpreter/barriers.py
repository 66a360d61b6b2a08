"""Barriers of blocks: who waits where, and who may go on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .faults import LaneFault


class Arrivals(NamedTuple):
    """Of threads at barriers that are not complete, one element each."""

    lane: np.ndarray
    barrier: np.ndarray  # its number
    expected: np.ndarray  # threads of the block that complete it
    place: np.ndarray  # the instruction
    waits: np.ndarray  # bar.sync; bar.arrive goes on
    named: np.ndarray  # with a number of threads: some of the block's, and from any place

    def where(self, chosen) -> Arrivals:
        return Arrivals(*(column[chosen] for column in self))


class Barriers:
    def __init__(self, chunk):
        nothing = np.zeros(0, np.int64)
        self._chunk, self._arrivals = chunk, Arrivals(*[nothing] * 4, *[nothing.astype(bool)] * 2)

    def __len__(self):
        return len(self._arrivals.lane)

    def arrive(self, barrier, expected, waits):
        """The active lanes come to a barrier that expects a number of threads of their block (with None,
        all).
        """
        chunk = self._chunk
        columns = (
            barrier,
            chunk.threads if expected is None else expected,
            chunk.pc,
            waits,
            expected is not None,
        )
        new = [chunk.active, *(np.broadcast_to(column, chunk.active.shape) for column in columns)]
        self._arrivals = Arrivals(*map(np.concatenate, zip(self._arrivals, new)))
        if not waits:
            chunk.enqueue(chunk.pc + 1, chunk.mask)
        for one in np.unique(barrier):
            self._complete(self._arrivals.barrier == one)

    def _complete(self, here):
        """Lets the threads of one barrier go on in the blocks where it is complete."""
        chunk, at = self._chunk, self._arrivals.where(here)
        blocks, inverse, counts = np.unique(
            at.lane // chunk.block_lanes, return_inverse=True, return_counts=True
        )
        order = np.argsort(inverse, kind="stable")
        self._check(at.where(order), np.searchsorted(inverse[order], np.arange(len(blocks))))
        expected = np.zeros(len(blocks), np.int64)
        expected[inverse] = at.expected
        full = counts == expected
        if not full.any():
            return
        members = np.zeros((len(blocks), chunk.warps), bool)
        members[inverse, at.lane % chunk.block_lanes // 32] = True
        chunk.clocks.barrier(blocks[full], members[full])
        done = full[inverse]
        going = at.where(done & at.waits)
        for place in np.unique(going.place):
            mask = np.zeros(chunk.lane_count, bool)
            mask[going.lane[going.place == place]] = True
            chunk.enqueue(int(place) + 1, mask)
        here[here] = done
        self._arrivals = self._arrivals.where(~here)

    def _check(self, at, first):
        """`at` is in the order of blocks, which start at `first`."""
        differ = np.minimum.reduceat(at.expected, first) != np.maximum.reduceat(at.expected, first)
        if differ.any():
            lane = int(at.lane[first[differ.argmax()]])
            raise LaneFault(
                "divergent barrier", "threads meet at it that expect different numbers of threads", lane
            )
        plain = at.waits & ~at.named
        lowest = np.minimum.reduceat(np.where(plain, at.place, np.iinfo(np.int64).max), first)
        highest = np.maximum.reduceat(np.where(plain, at.place, -1), first)
        apart = highest > lowest
        if apart.any():
            i = apart.argmax()
            places = (
                " inlined at ".join(self._chunk.program.instructions[p].lines)
                for p in (lowest[i], highest[i])
            )
            raise LaneFault(
                "divergent barrier",
                "threads of one block wait at " + " and ".join(places),
                int(at.lane[first[i]]),
            )

    def check_empty(self):
        """Nothing can run any more: no thread may be waiting."""
        at = self._arrivals.where(self._arrivals.waits)
        if len(at.lane):
            block = self._chunk.block_lanes
            met = (self._arrivals.lane // block == at.lane[0] // block) & (
                self._arrivals.barrier == at.barrier[0]
            )
            self._chunk.pc = int(at.place[0])
            detail = (
                f"{met.sum()} of {at.expected[0]} threads have come, the others have exited or wait elsewhere"
            )
            raise LaneFault("divergent barrier", detail, int(at.lane[0]))
