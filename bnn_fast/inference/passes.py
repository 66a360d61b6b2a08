"""Several draws of a model's outputs: in one call, in a call each, or by torch.vmap over the layers' keys."""
from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import checks
from ..layers.chain import run, runs_its_children
from .sampling import Draws
from .shared import Rest, shared
from .structure import call, count_rows, flatten, given, repeat, stack, unstacked

__all__ = ["mc_forward"]

_WAYS = {True: 0, False: 1, "vmap": 2}


def mc_forward(model: nn.Module, x, n_samples: int, seed: int | None = None, *,
               vectorized: bool | str = True, output: Callable | None = None) -> Tensor:
    """n_samples posterior draws of the outputs: x [B, ...] -> [n_samples, B, ...], with gradients of x and of the parameters.

    The weights are those of `sampling(model, n_samples, seed)`; without a seed those of a context around, or a fresh seed
    holds for the call.

    x: [B, ...]; a tuple for model(*x); a dictionary for model(**x); or another structure (a list, a dataclass, what torch's pytree
        knows) for model(x), as is each of those in a tuple of one. Dimension 0 of all tensors in it is the batch; 0-d tensors,
        numbers and strings are handed over as they are.
    vectorized: True makes all draws in one call of `model`, on x repeated along dimension 0, which has to be the batch in every
        module of it; ValueError if the output has another size there. Of an nn.Sequential what comes before the first
        variational layer runs once for all draws, and a VariationalLinear that comes first reads what they share where it is, expanded
        to [n_samples, B, ...]. False makes one call a draw, on x itself, for models whose dimension 0 is something else (time, the
        nodes of a graph): the output may then have any shape. "vmap" is the same by torch.vmap over
        the draws, where only what depends on them is repeated, if torch can map all that the model runs (not torch's LSTM,
        nor what looks at values), else call by call; on a GPU many small calls become few.
    output: a function that chooses or makes the output from what the model gives, which may be a dictionary, tuple or dataclass.
        Without one, all tensors of such an output are drawn, and have their draws in dimension 0.

    `predict` does the same in pieces, for any number of draws, without gradients.
    """
    vectorized = checked_way(vectorized)
    n_samples = checks.positive_int("n_samples", n_samples)
    checked_output(output)
    x = given(model, x)
    count_rows(x, vectorized is True)
    with Draws(model, n_samples, seed) as draws:
        return drawn(model, x, n_samples, draws, vectorized, output)[0]


def checked_way(vectorized):
    checks.choice("vectorized", vectorized, _WAYS)
    return vectorized if vectorized == "vmap" else bool(vectorized)


def checked_output(output) -> None:
    if output is not None and (isinstance(output, type) or not callable(output)):
        raise TypeError(f"output: expected a function of what the model gives, or None, given {checks.describe(output)}")


def drawn(model: nn.Module, x, n_samples: int, draws: Draws, vectorized: bool | str, output: Callable | None = None,
          kl: Callable | None = None) -> tuple[object, Tensor | None]:
    """(outputs [S, B, ...], the mean of kl(draws) after each pass) of draws 0 to n_samples - 1."""
    if n_samples > 1:
        model, x = shared(model, x)
    if vectorized is True:
        return repeated(model, x, n_samples, output), None if kl is None else kl(draws)
    outputs, kls = [], []
    for s in range(n_samples):
        draws.move(s, 1)
        with Unmapped() if s == 0 and vectorized == "vmap" else contextlib.nullcontext() as looked_at:
            outputs.append(single(model, x, output))
        kls.extend([] if kl is None else [kl(draws)])  # a sampled one is that of this draw
        if looked_at is not None and draws.any and n_samples > 1 and not looked_at.found:
            y, more = mapped(model, x, draws, 1, n_samples - 1, output, kl)
            return joined([stack(outputs), y]), (kls[0] + more.sum()) / n_samples if kls else None
    return stack(outputs), sum(kls) / n_samples if kls else None


def repeated(model: Callable, x, n_samples: int, output: Callable | None = None):
    """model on x, its rows repeated n_samples times along dimension 0, as [n_samples, B, ...]."""
    if isinstance(model, Rest):
        y = model.repeated(x, n_samples)
    else:
        y = _called(model, x if n_samples == 1 else repeat(x, n_samples))
    return unstacked(chosen(y, output), n_samples, count_rows(x), x)


def _called(model: Callable, x):
    """A call of the model; of an nn.Sequential that does nothing but call its children, with its chains as one operator."""
    if isinstance(x, Tensor) and isinstance(model, nn.Sequential) and not torch.compiler.is_compiling() and runs_its_children(model):
        return run(model._modules.values(), x)
    return call(model, x)


def single(model: Callable, x, output: Callable | None = None):
    """model on x under one draw."""
    y = chosen(_called(model, x), output)
    if not isinstance(y, Tensor) and not any(isinstance(leaf, Tensor) for leaf in flatten(y)[0]):
        raise TypeError(f"model: expected a tensor as output, or tensors in it, given {checks.describe(y)}")
    return y


def chosen(y, output: Callable | None):
    return y if output is None else output(y)


def mapped(model: Callable, x, draws: Draws, first_sample: int, n_samples: int, output: Callable | None = None,
           kl: Callable | None = None, place: tuple[int, int] | None = None) -> tuple[object, Tensor | None]:
    """(outputs [S, ...], kl(draws) [S]) by torch.vmap over the keys of these draws."""
    form = []

    def one(keys: list[Tensor]):
        draws.move_to(keys, place)
        leaves, rebuild = flatten(single(model, x, output))
        form[:] = [leaves, rebuild]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return tensors if kl is None else [*tensors, kl(draws)]

    found = torch.vmap(one, randomness="different")(draws.keys(first_sample, n_samples))
    kls = None if kl is None else found.pop()
    leaves, rebuild = form
    tensors = iter(found)
    return rebuild([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]), kls


def joined(parts: list):
    """Outputs [S, ...] of several draws each, as one."""
    leaves, rebuild = zip(*map(flatten, parts))
    return rebuild[0]([torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*leaves)])


_BATCHED = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "FuncTorchVmapMode", "CompositeImplicitAutograd")
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_WHOLE = {name: f"aten::{name}" + ("" if "cell" in name else ".input") for name in (
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")}


class Unmapped(TorchDispatchMode):
    """Notes in `found` what runs within it that torch.vmap has no rule for, by what torch's dispatcher knows.

    Operators that read values, or whose result has as many rows as the values say, cannot be mapped. Those of bnn_fast are
    within functions that have rules of their own. The recurrences are looked at before they are taken apart.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._recurrences = _Recurrences(self.found)

    def __enter__(self):
        self._recurrences.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._recurrences.__exit__(*exception)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((arguments, keywords))):
            return function(*arguments, **(keywords or {}))  # nothing that could be mapped
        looks = torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags
        if looks or not (function.namespace == "bnn_fast" or any(_has_kernel(name, key) for key in _BATCHED)):
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


class _Recurrences(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name = _WHOLE.get(getattr(function, "__name__", ""))
        if name is not None and not any(_has_kernel(name, key) for key in _BATCHED[:2]):
            self._found.append(name)
        return function(*arguments, **(keywords or {}))
