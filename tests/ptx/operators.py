"""The operators on CUDA tensors, run on CPU tensors: the project's own bindings and launchers on the stand-in runtime
(build.py), every kernel they launch interpreted from its PTX.

Memory is what the kernels are held against. For each call
- the arguments' storages are copied into tracked memory, which kernels may read and not write;
- what is allocated in the call (outputs, workspaces) counts as uninitialised until a kernel has written it. ATen's
  writes are not seen one by one: a buffer that changes between two launches counts as written as a whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import NamedTuple

import torch

from . import build
from .interpreter import GlobalMemory, launch, parse

LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
MULTIPROCESSORS = 4  # enough that a launcher's splitting of work is exercised

Launcher = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p))


class Allocation(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("size", ctypes.c_int64), ("number", ctypes.c_int64)]


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


class Operators:
    """Has torch.ops.bnn_fast's operators by their names; `launches` lists the launches of the latest call."""

    def __init__(self, built: build.Operators):
        torch.ops.load_library(built.library)
        self.runtime = ctypes.CDLL(str(built.library))
        self.launches: list[Launch] = []
        self._modules = [parse(path.read_text()) for path in built.ptx]
        self._launcher = Launcher(self._launch)  # kept alive as long as the runtime may call it
        self.runtime.stand_in_set_launcher(self._launcher)
        self.runtime.stand_in_set_multiprocessors(MULTIPROCESSORS)
        self._fault: BaseException | None = None

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.bnn_fast_ptx, name)
        return functools.partial(self._call, operator)

    def _call(self, operator, *arguments):
        self.launches, self._fault = [], None
        with self._tracked():
            staged = [_staged(a) for a in arguments]
            self._memory = _Memory(self.allocations())
            try:
                results = operator(*staged)
            except RuntimeError:
                if self._fault is None:
                    raise
        if self._fault is not None:
            raise self._fault
        return tuple(r.clone() for r in results) if isinstance(results, tuple) else results.clone()

    @contextlib.contextmanager
    def _tracked(self):
        self.runtime.stand_in_track(True)
        try:
            yield
        finally:
            self.runtime.stand_in_track(False)

    def allocations(self) -> list[Allocation]:
        """What is alive of the tracked memory."""
        table = (Allocation * 1024)()
        count = self.runtime.stand_in_allocations(table, ctypes.c_int64(len(table)))
        assert count <= len(table), f"{count} tracked allocations are alive"
        return table[:count]

    def _launch(self, name, grid, block, shared, arguments) -> int:
        try:
            self._interpret(Launch(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared), arguments)
        except BaseException as fault:  # an exception cannot pass through C
            self._fault = fault
            return LAUNCH_FAILURE
        return 0

    def _interpret(self, at: Launch, arguments) -> None:
        self.launches.append(at)
        module = next(m for m in self._modules if at.kernel in m.kernels)
        parameters = module.kernels[at.kernel].params
        values = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(parameters)]
        self._memory.before_launch(self.allocations())
        launch(module, at.kernel, at.grid, at.block, at.shared, values, self._memory.known)
        self._memory.after_launch()


class _Memory:
    """What the interpreter knows of one call's memory, brought up to date around each launch."""

    def __init__(self, inputs: list[Allocation]):
        self.known = GlobalMemory()
        self._alive: dict[int, Allocation] = {}
        self._pending: dict[int, int] = {}  # a hash of what is not known to be initialised, by number
        for a in inputs:
            self._add(a, "input", read_only=True, initialised=True)

    def _add(self, a: Allocation, name: str, read_only: bool, initialised: bool) -> None:
        self._alive[a.number] = a
        self.known.add(a.address, a.size, f"{name} {a.number}", read_only=read_only, initialised=initialised)

    def before_launch(self, alive: list[Allocation]) -> None:
        numbers = {a.number for a in alive}
        for number in [n for n in self._alive if n not in numbers]:
            self.known.remove(self._alive.pop(number).address)
            self._pending.pop(number, None)
        for a in alive:
            if a.number not in self._alive:
                fresh = hash(b"\xff" * a.size)
                self._add(a, "buffer", read_only=False, initialised=_content(a) != fresh)
                if _content(a) == fresh:
                    self._pending[a.number] = fresh
            elif self._pending.get(a.number, _content(a)) != _content(a):
                del self._pending[a.number]
                self.known.remove(a.address)
                self._add(a, "buffer", read_only=False, initialised=True)

    def after_launch(self) -> None:
        for number in self._pending:
            self._pending[number] = _content(self._alive[number])


def _content(a: Allocation) -> int:
    return hash(ctypes.string_at(a.address, a.size))


def _staged(argument):
    """A tensor's copy in fresh memory, with its strides and all that its storage holds."""
    if not isinstance(argument, torch.Tensor):
        return argument
    storage = argument.untyped_storage().clone()
    return argument.new_empty(0).set_(storage, argument.storage_offset(), argument.shape, argument.stride())
