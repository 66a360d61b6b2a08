"""What a model takes and gives, where that is more than one tensor: the tensors in it, and their rows."""
from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import checks
from ..layers.chain import Sequential

_BATCHES = "; predict takes batches one after the other from an iterator, iter(x)"
_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type(None))


def flatten(tree) -> tuple[list, Callable[[list], object]]:
    """(leaves, what makes the like of `tree` of as many others): of tuples, lists, dictionaries, whatever else is registered with
    torch's pytree, and dataclasses.
    """
    given, form = pytree.tree_flatten(tree)
    leaves, parts = [], []
    for value in given:
        inner = None
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            inner, rebuild = flatten([getattr(value, name) for name in names])
            parts.append((len(inner), value, names, rebuild))
        else:
            parts.append(None)
        leaves.extend([value] if inner is None else inner)

    def rebuilt(new: list):
        found, at = [], 0
        for part in parts:
            if part is None:
                found.append(new[at])
                at += 1
                continue
            count, value, names, rebuild = part
            value = copy.copy(value)  # not made anew, which what is no argument of its __init__ would not survive
            for name, item in zip(names, rebuild(new[at:at + count])):
                object.__setattr__(value, name, item)
            found.append(value)
            at += count
        return pytree.tree_unflatten(found, form)

    return leaves, rebuilt


def with_rows(function: Callable[[Tensor], Tensor], tree):
    """`tree` with function(tensor) for its tensors that have a dimension; all else is as it was."""
    leaves, rebuild = flatten(tree)
    return rebuild([function(leaf) if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in leaves])


def moved(x, device: torch.device | None):
    """x with its tensors on the device; None leaves them where they are."""
    leaves, rebuild = flatten(x)
    return rebuild([leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) and device is not None else leaf for leaf in leaves])


def given(model: Callable, x):
    """x as `call` takes it: a mapping of any kind as a dictionary. TypeError for several inputs of an nn.Sequential."""
    x = dict(x) if isinstance(x, Mapping) else x
    several = type(x) is tuple and len(x) != 1 or type(x) is dict and set(x) != {"input"}  # as forward's argument is called
    if several and isinstance(model, nn.Sequential) and _own_forward(model) and not model._forward_pre_hooks:
        raise TypeError("x: expected the one input that an nn.Sequential has, such as a tensor [B, ...], given "
                        f"{checks.describe(x)}; a tuple or dictionary that is one input is (x,){_BATCHES}")
    return x


def _own_forward(model: nn.Sequential) -> bool:
    """Whether it is that of an nn.Sequential or ours, and not a subclass's or one set on the model."""
    return getattr(model.forward, "__func__", None) in (nn.Sequential.forward, Sequential.forward)


def call(model: Callable, x):
    """model(x), model(*x) for a tuple x, model(**x) for a dictionary. A named tuple is no tuple here, but one input.

    TypeError that names x where the model raises one, or an AttributeError, at a tuple or list: they may be meant as batches.
    """
    if type(x) not in (tuple, list) or torch.compiler.is_compiling():
        return model(*x) if type(x) is tuple else model(**x) if type(x) is dict else model(x)
    try:
        return model(*x) if type(x) is tuple else model(x)
    except (TypeError, AttributeError) as error:
        taken = "model(*x)" if type(x) is tuple else "model(x)"
        raise TypeError(f"x: expected one batch, as {taken} takes it, given a {type(x).__name__} of {len(x)}, at which it raised "
                        f"the {type(error).__name__} above{_BATCHES}") from error


def count_rows(x, stacked: bool = True) -> int:
    """B, the size of dimension 0 of all tensors of x; unless `stacked` they may differ, and it is that of the first.

    TypeError or ValueError if there is none, they differ, or x holds what can hold tensors that are not seen.
    """
    if isinstance(x, Tensor) and x.dim():
        return x.shape[0]
    leaves = flatten(x)[0]
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        raise TypeError(f"x: expected a tensor [B, ...], given {checks.describe(x)}; several are a tuple, dictionary or other structure")
    if not stacked:
        return sizes[0]
    if len(set(sizes)) > 1:
        raise ValueError(f"x: expected tensors with one size of dimension 0, the batch, given {', '.join(map(str, sizes))}; a 0-d tensor "
                         f"or vectorized=False do not need it{_BATCHES if isinstance(x, (tuple, list)) else ''}")
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise TypeError(f"x: expected tensors, numbers, strings and None in it, given {checks.describe(leaf)}, whose rows are not "
                            "known; vectorized=False hands over anything")
    return sizes[0]


def repeat(x, n_samples: int):
    """x with its rows n_samples times, sample-major."""
    if isinstance(x, Tensor):
        return _repeat(x, n_samples)
    return with_rows(lambda t: _repeat(t, n_samples), x)


def _repeat(x: Tensor, n_samples: int) -> Tensor:
    return x.expand(n_samples, *x.shape).flatten(0, 1)


def part(x, first: int, last: int):
    """Rows first to last of x."""
    return with_rows(lambda t: t[first:last], x)


def unstacked(y, n_samples: int, rows: int, x):
    """The outputs [n_samples * rows, ...] for x, as [n_samples, rows, ...]; ValueError if they are not."""
    if isinstance(y, Tensor):
        return _unstacked(y, n_samples, rows, y, x)
    leaves, rebuild = flatten(y)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return _unstacked(y, n_samples, rows, y, x)
    return rebuild([leaf if isinstance(leaf, _PLAIN) else _unstacked(leaf, n_samples, rows, y, x) for leaf in leaves])


def _unstacked(leaf, n_samples: int, rows: int, y, x) -> Tensor:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != n_samples * rows:
        within = "" if leaf is y else f" in {checks.describe(y)}; output= chooses among them,"
        where = f"x {list(x.shape)}" if isinstance(x, Tensor) else f"{rows} rows of {checks.describe(x)}"
        raise ValueError(f"model: expected an output with {n_samples} * {rows} rows in dimension 0, given {checks.describe(leaf)}{within} "
                         f"for {where}")
    return leaf.unsqueeze(0) if n_samples == 1 else leaf.reshape(n_samples, rows, *leaf.shape[1:])


def stack(outputs: list):
    """Outputs alike, as one whose tensors have a dimension more in front."""
    if all(isinstance(y, Tensor) for y in outputs):
        return torch.stack(outputs)
    leaves, rebuild = zip(*map(flatten, outputs))
    if len(set(map(len, leaves))) > 1:
        raise ValueError(f"model: expected outputs alike in all draws, given {' and '.join(map(checks.describe, outputs[:2]))}")
    return rebuild[0]([torch.stack(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*leaves)])


def sizes(y) -> tuple[int, ...]:
    """(S, B) of outputs [S, B, ...]: of the first tensor among them."""
    return tuple((y if isinstance(y, Tensor) else next(leaf for leaf in flatten(y)[0] if isinstance(leaf, Tensor))).shape[:2])
