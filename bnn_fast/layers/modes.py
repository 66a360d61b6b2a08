"""How layers draw at present: the `sampling` contexts entered, and what activation checkpointing repeats.

In eager mode what is entered is a context variable: a thread, or a task of asyncio, has its own. torch.compile does not
trace those, so that compiled code reads each layer's state of the thread; entering writes both.
"""
from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Mode(NamedTuple):
    """How a layer draws. key: pinned, or None for a new one at every call; explicit: set by `sampling`; one: one network
    for all draws of a call; repeatable: whether a backward pass may have to repeat the call.

    What layers with another estimator than "weight" look at: weights: whether to draw weights all the same, as of one network;
    calls: the calls made under the key so far; place: of a part of a batch, its first row and how many rows it has.
    """
    n_samples: int = 1
    first_sample: int = 0
    key: Tensor | None = None
    mean: bool = False
    explicit: bool = True
    one: bool = False
    repeatable: bool = True
    weights: bool = False
    calls: list | None = None
    place: tuple[int, int] | None = None


ORDINARY = Mode(explicit=False)


class Entry:
    """What one `with sampling(...)` covers, for as long as it lasts, wherever a copy of the stack has gone."""
    __slots__ = ("layers", "modes", "before", "active", "task")

    def __init__(self, layers: list, before: list | None):
        self.layers = layers
        self.modes = None
        self.before = before    # the layers' modes, where torch.compile traces
        self.active = True
        self.task = -1 if before is not None else torch._C._current_graph_task_id()

    def put(self, modes: list[Mode]) -> None:
        if self.before is None:
            self.modes = dict(zip(self.layers, modes))
        for layer, mode in zip(self.layers, modes):
            layer._state.mode = mode


sampling_stack: ContextVar[tuple[Entry, ...]] = ContextVar("bnn_fast.sampling", default=())
stack = sampling_stack.get


def entered(layer, task: int | None = None) -> Mode | None:
    """The mode of the innermost context over the layer (entered within this backward pass), in eager mode."""
    for entry in reversed(stack()):
        if entry.active and (task is None or entry.task == task):
            mode = entry.modes.get(layer)
            if mode is not None:
                return mode
    return None


def enter(layers: list, modes: list[Mode] | dict) -> Entry:
    """A dictionary's modes are the layers' states' already."""
    compiling = torch.compiler.is_compiling()
    entry = Entry(layers, [layer._state.mode for layer in layers] if compiling else None)
    if isinstance(modes, dict):
        entry.modes = modes
    else:
        entry.put(modes)
    if not compiling:
        sampling_stack.set((*(e for e in stack() if e.active), entry))
    return entry


def innermost(entries: list[Entry]) -> Entry:
    """That of the entries which was entered last by whoever runs now, or by anybody."""
    if not torch.compiler.is_compiling():
        for entry in reversed(stack()):
            if entry in entries:
                return entry
    return entries[-1]


def leave(entry: Entry) -> bool:
    """Take the entry away; whether it was the innermost."""
    if entry.before is not None:
        entry.put(entry.before)
        return True
    entries = [e for e in stack() if e.active]
    proper = bool(entries) and entries[-1] is entry
    entry.active = False
    others = tuple([e for e in entries if e is not entry])
    sampling_stack.set(others)
    for layer in entry.layers:
        layer._local.state.mode = entered(layer) or ORDINARY if others else ORDINARY
    return proper


class Checkpoint:
    """What repeats of a checkpointed function need of its first pass: the modes of each layer's calls, in their order."""

    def __init__(self):
        self.modes = {}
        self.repeated = {}

    def note(self, layer, mode: Mode) -> None:
        self.modes.setdefault(layer, []).append(mode)

    def repeat(self, layer, task: int) -> Mode | None:
        modes, at = self.modes.get(layer, ()), self.repeated.get((task, layer), 0)
        self.repeated[task, layer] = at + 1
        return modes[at] if at < len(modes) else None


top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def checkpoint(hooks: tuple) -> Checkpoint | None:
    """That of the torch.utils.checkpoint(use_reentrant=False) around the call, in its first pass as when repeated.

    It lives in torch's own frame of the checkpoint, which torch's hooks for saved tensors (top_hooks) hold. Where they do
    not (a hook of another kind within it, another version of torch) there is none, as with the reentrant kind.
    """
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    held = dict(zip(pack.__code__.co_freevars, pack.__closure__ or ())) if hasattr(pack, "__code__") else {}
    try:
        frame = held["target_frame_ref"].cell_contents() if "target_frame_ref" in held else held["frame"].cell_contents
        return frame.__dict__.setdefault("_bnn_fast", Checkpoint())
    except (KeyError, AttributeError):
        return None
