"""The part of a model that is the same in all draws, and so runs once for them."""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import VariationalLayer, named_layers
from ..layers.chain import flat, parts, run, runs_its_children, takes_shared, why_not
from .structure import call, flatten, repeat, with_rows

_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)

_random: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()  # what ran and was random, training or not


class Rest:
    """The modules that make the outputs from what the draws share; called like a model with that, repeated or not.

    names: of the last inputs, those that the first module takes as keywords.
    """

    def __init__(self, modules: list[nn.Module], shared, names: tuple[str, ...] = ()):
        self.modules, self.names = modules, names
        # A layer leaves its inputs as they are; what else comes first may work in place, and the next draw needs them.
        self._kept = set() if isinstance(modules[0], VariationalLayer) else {id(t) for t in flatten(shared)[0]}

    def __call__(self, *inputs):
        if self._kept:
            inputs = with_rows(lambda t: t.clone() if id(t) in self._kept else t, inputs)
        positional = len(inputs) - len(self.names)
        if len(inputs) == 1 == positional:
            return run(self.modules, *inputs)
        y = self.modules[0](*inputs[:positional], **dict(zip(self.names, inputs[positional:])))
        return run(self.modules[1:], y)

    def chain_outputs(self, x) -> int | None:
        """How many outputs a row has if all of it runs as one operator on x, whatever the number of draws; else None."""
        found = list(parts(self.modules))
        one = len(found) == 1 and isinstance(found[0], list) and isinstance(x, Tensor) and why_not(found[0], x) is None
        return found[0][-1].layer.out_features if one else None

    def repeated(self, x, n_samples: int):
        """On x repeated for so many draws; a chain or a linear layer that comes first reads the x that they share where it is."""
        inputs = x if type(x) is tuple else (x,)
        if n_samples == 1 or self.names or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            return call(self, x if n_samples == 1 else repeat(x, n_samples))
        return run(self.modules, *inputs, n_samples)


def shared(model: nn.Module, x) -> tuple[Callable, object]:
    """(what is to be called for the draws, with what): the children of an nn.Sequential before its first variational one have run;
    any other model, and what is random and comes after it, is left as it is.
    """
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return model, x
    before, after = _parts(model) if isinstance(model, nn.Sequential) else ([], [model])
    if not before and takes_shared(model, x):
        return Rest(after, x), x
    known = next((i for i, module in enumerate(before) if _may_be_random(module)), len(before))
    before, after = before[:known], before[known:] + after
    training = any(m.training for module in before for m in module.modules())
    if not before and runs_its_children(model):
        return Rest(list(flat(after)), x), x
    if not before or not after or training in _random.get(model, ()):
        return model, x
    state = _random_state(x.device)
    h = x.clone()  # what comes first may work in place
    for module in before:
        h = module(h)
    if state is not None and not torch.equal(state, _random_state(x.device)):
        _random.setdefault(model, set()).add(training)  # a BatchNorm in it shall not see every batch twice
        return model, x  # dropout in a module of another's: each draw has its own
    if isinstance(h, Tensor) and h.shape[:1] != x.shape[:1]:
        return model, x  # several of its rows are one of x, and of the outputs
    h = h if isinstance(h, Tensor) else (h,)
    return Rest(after, h), h


def _parts(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that an nn.Sequential runs one after the other: those before the first variational one, the others."""
    children = list(model._modules.values())
    for i, child in enumerate(children):
        if child is None or named_layers(child):
            break
    else:
        return children, []
    before, after = children[:i], children[i:]
    if child is not None and runs_its_children(child):
        inner_before, inner_after = _parts(child)
        before, after = before + inner_before, inner_after + after[1:]
    return (before, after) if runs_its_children(model) else ([], [model])


def _may_be_random(module: nn.Module) -> bool:
    """Whether it may draw numbers as it is in training mode: torch's modules that do. What does so always is seen when it runs."""
    return any(m.training and (isinstance(m, _RANDOM) or isinstance(getattr(m, "dropout", None), float) and m.dropout > 0.0)
               for m in module.modules())


def _random_state(device: torch.device) -> Tensor | None:
    """The state of torch's generator; None where it must not be looked at."""
    if device.type == "cuda":
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def of_head(model: nn.Module, head: str, x, output: Callable | None) -> tuple[Callable, object, Callable | None]:
    """(the module called `head`, what the rest of the model gives it for x, what is to choose from its outputs): the model runs
    once, under the draw as it is now.

    ValueError unless the head has all the variational layers, is called once, and gives what the model, or `output`, gives.
    """
    module, me, calls = _head_module(model, head), threading.get_ident(), []

    def before(_, inputs: tuple, keywords: dict) -> None:
        if threading.get_ident() == me:
            taken = (*inputs, *keywords.values())
            taken = taken if isinstance(module, VariationalLayer) else with_rows(torch.clone, taken)
            calls.append([tuple(keywords), taken])

    def after(_, inputs: tuple, y) -> None:
        if threading.get_ident() == me:
            calls[-1].extend((y, with_rows(torch.clone, y)))  # the model may go on in place

    hooks = [module.register_forward_pre_hook(before, prepend=True, with_kwargs=True), module.register_forward_hook(after)]
    try:
        y = call(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise ValueError(f"head: expected a module that the model calls once, given {head!r}, called {len(calls)} times")
    names, values, own, as_given = calls[0]
    if own is not y or not _same(own, as_given):
        if output is None or own is not output(y) or not _same(own, as_given):
            raise ValueError(f"head: expected a module whose output is the model's, or is what output= chooses of it, given {head!r}, "
                             f"which gives {checks.describe(own)}; what the model makes of it is {checks.describe(y)}")
        output = None
    return Rest([module], values, names), values, output


def _same(a, b) -> bool:
    """Whether all tensors of both, alike in structure, have the same values, nan among them."""
    pairs = zip(flatten(a)[0], flatten(b)[0])
    return all(bool(((s == t) | ((s != s) & (t != t))).all()) for s, t in pairs if isinstance(s, Tensor))


def _head_module(model: nn.Module, head) -> nn.Module:
    """The submodule of this name, ValueError unless all the variational layers are in it."""
    if not isinstance(head, str):
        raise TypeError(f"head: expected the name of a module of the model, given {checks.describe(head)}")
    named = dict(model.named_modules(remove_duplicate=False))
    if not head or head not in named:
        direct = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ValueError(f"head: expected the name of a module of the model (its children: {direct}), given {head!r}")
    inside = {id(layer) for _, layer in named_layers(named[head])}
    outside = [name for name, layer in named_layers(model) if id(layer) not in inside]
    if outside:
        raise ValueError(f"head: expected the module that has all the variational layers, given {head!r}, which lacks {outside[0]}")
    return named[head]
