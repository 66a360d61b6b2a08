"""What the rows of predictions allow, whatever they are of: to be put together, chosen, moved, saved and loaded."""
from __future__ import annotations

import copy
import operator
import os

import torch
from torch import Tensor, nn

from .. import checks
from .moments import Moments


class Stored:
    """Of a class that has n_samples S, `_outputs` [S, B, ...] or None, `_moments` of [B, ...], `_likelihood` and `_dtype`."""

    def __len__(self) -> int:
        """B."""
        return self._moments.mean.shape[0]

    def __getitem__(self, rows):
        """The prediction of these rows: a number, for one row [1, ...], a slice, a list of numbers, or a tensor of them or of bool."""
        if not isinstance(rows, (slice, list, Tensor)) or isinstance(rows, Tensor) and rows.dim() == 0:
            try:
                i = operator.index(rows)
            except TypeError:
                raise TypeError(f"rows: expected a number, a slice, a list or a tensor, given {checks.describe(rows)}") from None
            if not -len(self) <= i < len(self):
                raise IndexError(f"rows: expected {-len(self)} to {len(self) - 1}, given {i}")
            rows = slice(i, i + 1 or None)
        elif isinstance(rows, slice):
            if rows.step is not None and rows.step < 1:
                raise ValueError(f"rows: expected a slice with a positive step, given {rows}")
        else:
            rows = torch.as_tensor(rows if len(rows) else torch.zeros(0, dtype=torch.int64), device=self._moments.mean.device)
            if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool and len(rows) != len(self):
                raise IndexError(f"rows: expected a list or tensor of numbers, or {len(self)} of bool, given {checks.describe(rows)}")
        return self._with(lambda t, dim: t[rows] if dim == 0 else t[:, rows])

    def to(self, device):
        """The same prediction on another device."""
        found = self._with(lambda t, dim: t.to(device))
        if isinstance(found._likelihood, nn.Module):
            found._likelihood = copy.deepcopy(found._likelihood).to(device)
        return found

    @classmethod
    def cat(cls, predictions):
        """The rows of several predictions as one, in their order. Draw s of the whole is one network only if they were made with
        the same seed.

        Raises TypeError or ValueError unless they are of one class, number of draws, likelihood, dtype and shape of a row.
        """
        predictions = list(predictions)
        if not predictions or not all(isinstance(p, Stored) for p in predictions):
            raise TypeError(f"predictions: expected one or several predictions, given {checks.describe(predictions)}")
        first = predictions[0]
        for other in predictions[1:]:
            for what, a, b in (("of one class", type(first).__name__, type(other).__name__),
                               ("with one number of draws", first.n_samples, other.n_samples),
                               ("with one dtype", first._dtype, other._dtype),
                               ("with rows of one shape", list(first._moments.mean.shape[1:]), list(other._moments.mean.shape[1:])),
                               ("with one likelihood", *_both(first._likelihood, other._likelihood))):
                if a != b:
                    raise ValueError(f"predictions: expected all {what}, given {a} and {b}")
        outputs = [p._outputs for p in predictions]
        whole = copy.copy(first)
        whole._moments = Moments.joined([p._moments for p in predictions])
        whole._outputs = None if any(o is None for o in outputs) else torch.cat(outputs, dim=1)
        return whole

    def save(self, path: str | os.PathLike) -> None:
        """Write the prediction, its draws included where they are kept, to a file for `load`."""
        torch.save(self._with(lambda t, dim: t.clone()), path)  # of a view the whole storage would be written

    @classmethod
    def load(cls, path: str | os.PathLike, map_location=None):
        """The prediction in a file that `save` wrote, on the device map_location, or where it was. Nothing but tensors and bnn_fast's
        own classes is unpickled.
        """
        known = [Moments, *_below(Stored), *(c for c in _below(nn.Module) if c.__module__.startswith(f"{__package__}."))]
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location=map_location, weights_only=True)
        if not isinstance(found, cls):
            raise TypeError(f"path: expected a {cls.__name__} in {os.fspath(path)!r}, found {checks.describe(found)}")
        return found

    def _with(self, function):
        """The prediction whose tensors are function(tensor, the dimension of the rows)."""
        found = copy.copy(self)
        found._moments = self._moments.mapped(lambda t: function(t, 0))
        found._outputs = None if self._outputs is None else function(self._outputs, 1)
        return found


def _both(a: nn.Module | None, b: nn.Module | None) -> tuple[str, str]:
    """Both likelihoods in words, which are the same only if they are."""
    words = repr(a), repr(b)
    if words[0] == words[1] and isinstance(a, nn.Module):
        here, there = a.state_dict(), b.state_dict()
        if any(not torch.equal(value.cpu(), there[name].cpu()) for name, value in here.items()):
            return f"{words[0]} with {here}", f"with {there}"
    return words


def _below(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_below(sub))]
