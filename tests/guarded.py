"""Tensors whose memory ends, or begins, at a page that cannot be touched."""
from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
PROT_NONE = 0  # which mmap has no name for
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor, at: str) -> torch.Tensor:
    """A copy of a contiguous tensor whose last byte ("end") or first byte ("begin") lies beside an unreadable page."""
    if tensor.numel() == 0:
        return tensor.clone()
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # holds the map, which lives as long as the process
    for page in (address, address + PAGE + whole):
        if _libc.mprotect(ctypes.c_void_p(page), PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE if at == "begin" else PAGE + whole - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)
