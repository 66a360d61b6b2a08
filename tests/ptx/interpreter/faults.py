"""What the interpreter reports."""

from __future__ import annotations


class PtxFault(Exception):
    """What a kernel did wrong: `kind`, in a few words, and where: `kernel`, `lines`, `block`, `thread`."""

    def __init__(self, kind, detail="", kernel="", lines=(), block=None, thread=None):
        self.kind, self.detail, self.kernel, self.lines = kind, detail, kernel, tuple(lines)
        self.block, self.thread = block, thread
        where = " inlined at ".join(self.lines) or "unknown line"
        who = f", block {block}, thread {thread}" if thread is not None else ""
        super().__init__(f"{kind} in {kernel} at {where}{who}" + (f": {detail}" if detail else ""))


class LaneFault(Exception):
    """Raised where only the lane is known; the machine turns it into a PtxFault with its place.

    `lane` counts within the chunk that is executed, `other`, a second thread involved, within the launch.
    """

    def __init__(self, kind, detail="", lane=None, other=None):
        super().__init__(kind, detail, lane, other)
        self.kind, self.detail, self.lane, self.other = kind, detail, lane, other


class NotConverged(LaneFault):
    """Lanes that an instruction needs are elsewhere; it has done nothing yet."""
