"""Evaluation mode for one call, which nobody else sees: no other thread, and nothing afterwards."""
from __future__ import annotations

import abc
import contextlib
import copyreg
import functools
import inspect
import threading
from contextvars import ContextVar

import torch
from torch import nn

from ..layers.ordinary import in_chains

_evaluated: ContextVar[frozenset[int]] = ContextVar("bnn_fast.evaluation", default=frozenset())
_lock = threading.Lock()
_borrowed: dict[int, list] = {}     # id of a module -> [module, its own class, how many evaluate it]


class _Thread:
    evaluating = False


class _Local(threading.local):
    """Whether this thread evaluates anything: for torch.compile, which does not trace context variables."""

    def __init__(self):
        self.state = _Thread()


_here = _Local()


@contextlib.contextmanager
def evaluation(model: nn.Module):
    """The modules of `model` answer False when asked for `training`, by this thread or task alone.

    A module in training mode is, for as long as anybody evaluates it, of a subclass of its class, in which `training` is a
    property; it goes by the class's name and is pickled and copied as of the class itself. Where that cannot be done (a
    ScriptModule; a module with a `train` of its own; what lies within torch.compile or DataParallel, which guard classes
    and use threads of their own) the module is put into evaluation mode and back again, and other threads notice.
    """
    modules = list(model.modules())
    if not any(module.training for module in modules):
        yield
        return
    inside = _switched(modules)
    switched = [module for module in modules if id(module) in inside]
    covered = [module for module in modules if id(module) not in inside]
    modes = [(module, module.training) for module in switched]
    taken, token, before = [], None, _here.state.evaluating
    try:
        for module in switched:
            module.eval()
        for module in covered:
            _borrow(module, taken)
        token = _evaluated.set(_evaluated.get() | set(map(id, covered)))
        _here.state.evaluating = True
        yield
    finally:
        _here.state.evaluating = before
        if token is not None:
            _evaluated.reset(token)
        for module in taken:
            _give_back(module)
        for module, training in modes:
            module.training = training


def _switched(modules: list[nn.Module]) -> set[int]:
    """ids of those that have to be switched over, as they or what is around them cannot be of another class."""
    found = set()
    for module in modules:
        if id(module) not in found and not _can_be_borrowed(module):
            found.update(map(id, module.modules()))
    return found


def _can_be_borrowed(module: nn.Module) -> bool:
    if torch.compiler.is_compiling() or isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)):
        return False
    if id(module) in _borrowed:
        return True
    return ("training" in module.__dict__ and getattr(module, "_compiled_call_impl", None) is None
            and _evaluating(type(module)) is not None)


@functools.lru_cache(maxsize=256)
def _evaluating(base: type) -> type | None:
    """The subclass of a class of modules in which `training` is a property; None if there cannot be one."""
    if (type(base) not in (type, abc.ABCMeta) or base.train is not nn.Module.train or base.eval is not nn.Module.eval
            or inspect.getattr_static(base, "training", None) is not None
            or any("__init_subclass__" in vars(cls) for cls in base.__mro__[:-1])):
        return None

    def get(self) -> bool:
        if torch.compiler.is_compiling():
            evaluating = _here.state.evaluating
        else:
            evaluating = id(self) in _evaluated.get()
        return False if evaluating else self.__dict__["training"]

    def put(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def reduce(self, protocol):
        found = base.__reduce_ex__(self, protocol)
        if not isinstance(found, tuple):
            return found
        make, arguments, *rest = found
        if make is copyreg.__newobj__ and len(arguments) == 1:
            # pickle compares __newobj__'s class with the object's
            return copyreg._reconstructor, (base, object, None), *rest
        of_base = [base if a is type(self) else a for a in (make, *arguments)]
        return of_base[0], tuple(of_base[1:]), *rest

    body = {"training": property(get, put), "__reduce_ex__": reduce, "__module__": base.__module__,
            "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    found = type(base)(base.__name__, (base,), body)
    if base in in_chains:
        in_chains[found] = in_chains[base]
    return found


def _borrow(module: nn.Module, taken: list[nn.Module]) -> None:
    with _lock:
        held = _borrowed.get(id(module))
        if held is None:
            held = _borrowed[id(module)] = [module, type(module), 0]
            module.__class__ = _evaluating(type(module))
        held[2] += 1
        taken.append(module)


def _give_back(module: nn.Module) -> None:
    with _lock:
        held = _borrowed[id(module)]
        held[2] -= 1
        if held[2] <= 0:
            del _borrowed[id(module)]
            if type(module).__bases__ == (held[1],):  # else somebody gave it another class meanwhile
                module.__class__ = held[1]
