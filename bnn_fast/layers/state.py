"""What a layer remembers between calls, per thread, never copied or saved: how to draw, the latest KL."""
from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

_LOWEST, _HIGHEST = -2 ** 63, 2 ** 63 - 1


class Mode(NamedTuple):
    """How a layer draws. key: pinned, or None for a new one at every call; explicit: set by `sampling`."""
    n_samples: int = 1
    first_sample: int = 0
    key: Tensor | None = None
    mean: bool = False
    explicit: bool = True


ORDINARY = Mode(explicit=False)


class State:
    """One layer's state in one thread."""

    def __init__(self):
        self.mode = ORDINARY    # the innermost `sampling` over the layer
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
    """The KL of a call, or what it takes to have it again, and the very parameters it belongs to.

    versions is None if torch.compile made the record: they cannot be compared within a region. `kl` is what
    there is of the KL: a Call of the compiled nodes, a tensor (torch.compile), or None.
    """
    __slots__ = ("parameters", "versions", "pointers", "key", "n_samples", "kl")

    def __init__(self, parameters: tuple, versions, key: Tensor, n_samples: int, kl):
        self.parameters = parameters
        self.versions = versions
        self.pointers = None if versions is None else pointers(parameters)
        self.key = key
        self.n_samples = n_samples
        self.kl = kl

    def belongs_to(self, parameters: tuple) -> bool:
        """Whether it was made with these parameters and they are, as far as one can know, unchanged."""
        for mine, given in zip(self.parameters, parameters):
            if mine is not given:
                return False
        if torch.compiler.is_compiling():
            return self.versions is None  # made by this region, in all likelihood
        return self.versions is None or (self.versions == versions(parameters)
                                         and self.pointers == pointers(parameters))


def versions(parameters: tuple) -> list:
    return [None if p is None else p._version for p in parameters]


def pointers(parameters: tuple) -> list:
    return [None if p is None else p.data_ptr() for p in parameters]


def fresh_key(device: torch.device, first_sample: int) -> Tensor:
    """A key from the device's default generator, made without a look at the device's memory."""
    key = torch.randint(_LOWEST, _HIGHEST, (2,), device=device)
    key.select(0, 1).fill_(first_sample)
    return key

