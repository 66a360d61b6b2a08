"""What a layer remembers between calls, per thread, never copied or saved: its mode, the latest KL."""
from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..operators import autograd
from . import steps
from .modes import ORDINARY

_modes = torch._C._len_torch_dispatch_stack   # of fake tensors and the like, which are to see every operator
_LOWEST, _HIGHEST = -2 ** 63, 2 ** 63 - 1


class State:
    """One layer's state in one thread."""

    def __init__(self):
        self.mode = ORDINARY    # the innermost `sampling` over the layer, for compiled code: see modes
        self.latest = None      # mode of the latest call outside a backward pass
        self.key = None         # key of that call
        self.record = None      # Record of the latest such call made with gradients on


class Local(threading.local):
    """A State for each thread; an object apart, as torch.compile loses what it writes to a local itself."""

    def __init__(self):
        self.state = State()

    def __deepcopy__(self, memo):
        return Local()

    def __reduce__(self):
        return Local, ()


class Shared:
    """What all threads see: backward may run, and checkpointing recompute, in one of autograd's."""
    latest = None       # mode of the latest call outside a backward pass

    def __deepcopy__(self, memo):
        return Shared()

    def __reduce__(self):
        return Shared, ()


class Record:
    """The KL of a call, or what it takes to have it again, and all that it was made of.

    tensors: the registered parameters and the prior's buffers; options: whatever else the KL depends on. `kl` is what there is of
    the KL: a tuple of Calls, or of tensors (torch.compile), whose sum it is, or None (also when it was handed over). Calls know
    whether their tensors have changed; where there are none, `versions` and `pointers` tell, but of a record that torch.compile
    made, within whose region they cannot be compared. `given` is what `estimated_kl` makes the KL of.
    """
    __slots__ = ("tensors", "options", "compiled", "calls", "versions", "pointers", "generation", "key", "n_samples", "kl", "given")

    def __init__(self, tensors: tuple, options: tuple, key: Tensor, n_samples: int, kl, compiling: bool, given=None):
        self.tensors = tensors
        self.options = options
        self.compiled, self.calls = compiling, None if compiling else kl
        self.versions = self.pointers = self.generation = None
        if not compiling:
            self.generation = steps.current
            if kl is None:
                self.versions, self.pointers = versions(tensors), pointers(tensors)
        self.key = key
        self.n_samples = n_samples
        self.kl = kl
        self.given = given

    def belongs_to(self, tensors: tuple, options: tuple) -> bool:
        """Whether it was made with these tensors and they are, as far as one can know, unchanged."""
        if len(tensors) != len(self.tensors) or options != self.options:
            return False
        for mine, given in zip(self.tensors, tensors):
            if mine is not given:
                return False
        if self.compiled:
            return True  # in a region: made by it, in all likelihood
        if torch.compiler.is_compiling():
            return False
        if self.calls is not None:
            return all([call.unchanged() for call in self.calls])
        return self.versions == versions(tensors) and self.pointers == pointers(tensors)

    def hand_over(self):
        """The KL of the call: once, with gradients on, and before any optimizer's next step; else None."""
        kl = self.kl
        if kl is None or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            if not any(part.requires_grad for part in kl) and any(t is not None and t.requires_grad for t in self.tensors):
                return None
        elif isinstance(kl[0], Tensor) or self.generation is not steps.current:
            return None
        self.kl = None  # nor must a later region take it for its own
        return kl


def versions(tensors: tuple) -> list:
    try:
        return [None if t is None else t._version for t in tensors]
    except RuntimeError:  # inference tensors have none: equal to nothing, so that nothing is taken for current
        return [object()]


def pointers(tensors: tuple) -> list:
    return [None if t is None else t.data_ptr() for t in tensors]


def fresh_keys(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Keys from the device's default generator, made in one launch without a look at the device's memory. The number of the first
    sample is random as the seed is: nobody knows it, and it takes no launch of its own.
    """
    if autograd.nodes is not None and device.type == "cpu" and not autograd.transformed() and not _modes():
        return autograd.nodes.fresh_keys(count)
    return torch.randint(_LOWEST, _HIGHEST, (count, 2), device=device).unbind()
