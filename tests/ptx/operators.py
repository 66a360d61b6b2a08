"""The operators on CUDA tensors, run on CPU tensors: the project's own bindings and launchers on the stand-in
runtime (build.py), every kernel they launch interpreted from its PTX.

Memory is what the kernels are held against. For each call
- the arguments' storages are copied into tracked memory, which kernels may read and not write;
- what is allocated in the call (outputs, workspaces) counts as uninitialised until a kernel has written it;
  ATen's writes are not seen one by one: a buffer that changes between two launches counts as written whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves_with_path, tree_map_only

from . import build
from .interpreter import GlobalMemory, Missed, launch, missed, parse

LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
MULTIPROCESSORS = 4  # enough that a launcher's splitting of work is exercised

Triple = ctypes.POINTER(ctypes.c_uint)
Launcher = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    Triple,
    Triple,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


class Allocation(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("size", ctypes.c_int64), ("number", ctypes.c_int64)]


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


class Operators:
    """torch.ops.bnn_fast's operators by their names; `launches` lists all launches, until it is cleared."""

    def __init__(self, built: build.Operators):
        torch.ops.load_library(built.library)
        self.runtime = ctypes.CDLL(str(built.library))
        self.launches: list[Launch] = []
        self._files = {
            name: path for path in built.ptx for name in re.findall(r"\.entry ([\w$]+)", path.read_text())
        }
        self._launcher = Launcher(self._launch)  # kept alive as long as the runtime may call it
        self.runtime.stand_in_set_launcher(self._launcher)
        self.runtime.stand_in_set_multiprocessors(MULTIPROCESSORS)
        self._fault: BaseException | None = None

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.bnn_fast_ptx, name)
        return functools.partial(self._call, operator)

    def _call(self, operator, *arguments):
        self._fault = None
        with self._tracked():
            older = {a.number for a in self.allocations()}  # what a fault's traceback keeps alive
            staged = tree_map_only(torch.Tensor, _staged, arguments)
            names = {
                t.untyped_storage().data_ptr(): argument.name + "".join(map(str, path))
                for argument, a in zip(operator.default._schema.arguments, staged)
                for path, t in tree_leaves_with_path(a)
                if isinstance(t, torch.Tensor)
            }
            self._memory = _Memory(self.allocations(), names, older)
            try:
                results = operator(*staged)
            except RuntimeError:
                if self._fault is None:
                    raise
        if self._fault is not None:
            raise self._fault
        return tree_map_only(torch.Tensor, torch.clone, results)

    def missed(self) -> list[Missed]:
        """What of the kernels has not been executed in this process."""
        files = {path.name for path in build.CSRC.rglob("*")}
        return [one for path in set(self._files.values()) for one in missed(_parsed(path), files)]

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

    def _launch(self, name, grid, block, shared, shared_at_most, arguments) -> int:
        try:
            at = Launch(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared)
            self._interpret(at, shared_at_most, arguments)
        except BaseException as fault:  # an exception cannot pass through C
            self._fault = fault
            return LAUNCH_FAILURE
        return 0

    def _interpret(self, at: Launch, shared_at_most: int, arguments) -> None:
        self.launches.append(at)
        module = _parsed(self._files[at.kernel])
        parameters = module.kernels[at.kernel].params
        values = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(parameters)]
        self._memory.before_launch(self.allocations())
        launch(module, at.kernel, at.grid, at.block, at.shared, values, self._memory.known)
        self._memory.after_launch()
        static = module.programs[at.kernel].sizes["shared"]
        if static + at.shared > shared_at_most:
            raise RuntimeError(
                f"{at.kernel} takes {static} + {at.shared} bytes of shared memory, allowed {shared_at_most}"
            )


class _Memory:
    """What the interpreter knows of one call's memory, brought up to date around each launch."""

    def __init__(self, alive: list[Allocation], names: dict[int, str], older: set[int]):
        self.known = GlobalMemory()
        self._alive: dict[int, Allocation] = {}
        self._pending: dict[int, int] = {}  # a hash of what is not known to be initialised, by number
        self._older = older
        self._first = 1 + max((a.number for a in alive), default=-1)
        for a in alive:
            if a.number not in older:
                self._add(a, names[a.address], read_only=True, initialised=True)

    def _add(self, a: Allocation, name: str, read_only: bool, initialised: bool) -> None:
        self._alive[a.number] = a
        self.known.add(a.address, a.size, name, read_only=read_only, initialised=initialised)

    def before_launch(self, alive: list[Allocation]) -> None:
        numbers = {a.number for a in alive}
        for number in [n for n in self._alive if n not in numbers]:
            self.known.remove(self._alive.pop(number).address)
            self._pending.pop(number, None)
        for a in alive:
            if a.number not in self._alive and a.number not in self._older:
                self._add(a, f"buffer {a.number - self._first}", read_only=False, initialised=False)
                self._pending[a.number] = hash(b"\xff" * a.size)
        for number in [n for n, content in self._pending.items() if content != _content(self._alive[n])]:
            self.known.mark_written(self._alive[number].address, self._alive[number].size)
            del self._pending[number]

    def after_launch(self) -> None:
        for number in self._pending:
            self._pending[number] = _content(self._alive[number])


@functools.cache
def _parsed(path: Path):
    return parse(path.read_text())


def _content(a: Allocation) -> int:
    return hash(ctypes.string_at(a.address, a.size))


def _staged(argument: torch.Tensor) -> torch.Tensor:
    """A tensor's copy in fresh memory, with its strides and all that its storage holds."""
    given = argument.untyped_storage()
    storage = torch.empty(given.nbytes(), dtype=torch.uint8).untyped_storage().copy_(given)
    return argument.new_empty(0).set_(storage, argument.storage_offset(), argument.shape, argument.stride())
