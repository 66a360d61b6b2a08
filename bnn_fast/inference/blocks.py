"""How `predict` calls a model for all draws of a batch: so many rows and draws at a time."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import named_layers
from .moments import Moments
from .passes import Unmapped, mapped, repeated, single
from .prediction import Prediction
from .sampling import Draws
from .shared import Rest, of_head, shared
from .structure import count_rows, flatten, part

KEPT_BYTES = 2 ** 30   # draws are kept, for quantiles and samples, up to this size
# Sizes of one call of the model, from timings on a CPU: many rows, as a call of a small network costs more in
# Python than in arithmetic; but several draws only where they have few rows, their products being slower.
_ROWS = 16384
_ROWS_OF_SEVERAL_DRAWS = 4096
_NUMBERS = 2 ** 22     # in x
_WEIGHTS = 2 ** 24     # of one layer, the draws counted
_BLOCK = 2 ** 18       # outputs that are taken into the mean and the variance at a time
_DRAWS_COMPILED = (1, 16, 256)  # of a call: torch.compile compiles anew for each number, and gives up after eight
_HALVES = (torch.bfloat16, torch.float16)


@dataclass
class Run:
    """How the model is called for all the draws of a batch."""
    model: nn.Module
    draws: Draws
    n_samples: int
    batch_size: int | None
    way: bool | str         # as `vectorized`
    head: str | None
    output: Callable | None
    whole: bool             # whether all calls have one of a few numbers of draws
    bar: object
    checked: bool = False   # whether rows were seen not to mix, and vmap to know all that runs
    first_row: int = 0      # of the batch among the rows of all

    def batch(self, x, kind: type[Prediction], likelihood) -> tuple[Tensor | None, Moments, torch.dtype]:
        """(the outputs of all draws, if they may be kept; their moments; their dtype)."""
        rows = count_rows(x, self.way is True or self.batch_size is not None)
        n_rows = self._rows(x, rows)
        split = n_rows < rows
        kept, pieces, first_row = None, [], 0
        for i in range(0, max(rows, 1), max(n_rows, 1)):
            moments = Moments()
            place = (self.first_row + first_row, min(n_rows, rows - i)) if split or self.first_row else None
            for first, block in self._blocks(part(x, i, i + n_rows) if split else x, split, place):
                if not pieces and not first:
                    kept = _room(block, self.n_samples, rows if split else block.shape[1])
                moments.add(*kind.terms(block, likelihood))
                if kept is not None:
                    kept[first:first + len(block), first_row:first_row + block.shape[1]] = block
            pieces.append(moments)
            first_row += block.shape[1]
        self.first_row += first_row
        return kept, Moments.joined(pieces), block.dtype

    def _blocks(self, x, split: bool, place: tuple[int, int] | None):
        """(first draw, outputs [n, b, ...] of this and the following draws) for these rows; split: they are not all of the batch;
        place: the first among the rows of all batches, and how many they are."""
        model, output, rows = self.model, self.output, count_rows(x, False)
        self.draws.move(0, 1, place)
        if self.head is not None:
            model, x, output = of_head(model, self.head, x, output)
        elif self.n_samples > 1 and not self.whole:
            model, x = shared(model, x)
        way = self._way(model, x, output)
        n_draws = 1 if way is False else self._draws(model, x, rows)
        first, pending, size = 0, [], 0
        for s in range(0, self.n_samples, n_draws):
            count = min(n_draws, self.n_samples - s)
            y = _checked(self._call(model, x, s, count, n_draws, way, output, place))
            if way is not True and (y.dim() < 2 or (split and y.shape[1] != rows)):
                raise ValueError(f"model: expected outputs with {rows if split else 'any number of'} rows in dimension 0, "
                                 f"given {checks.describe(y[0])}")
            pending.append(y)
            if way is True and not self.checked and count > 1 and self.draws.any and not self.whole:  # that would compile again
                _check_rows_apart(model, x, self.draws, y[-1], count, output, place)
            self.checked = True
            self.bar.update(count * rows)
            size += y.numel()
            if size >= _BLOCK or s + count == self.n_samples:
                yield first, torch.cat(pending)
                first, pending, size = s + count, [], 0

    def _call(self, model: Callable, x, s: int, count: int, n_draws: int, way: bool | str, output: Callable | None,
              place: tuple[int, int] | None):
        if way == "vmap":
            return mapped(model, x, self.draws, s, count, output, place=place)[0]
        together = n_draws if self.whole else count
        self.draws.move(s, together, place)
        if way is True:
            return _tensor(repeated(model, x, together, output))[:count]
        return _tensor(single(model, x, output))[None]

    def _way(self, model: Callable, x, output: Callable | None) -> bool | str:
        if self.way == "vmap" and not self.checked:
            with Unmapped() as looked_at:
                single(model, x, output)
            if looked_at.found or not self.draws.any:
                self.way = False
        return self.way

    def _rows(self, x, rows: int) -> int:
        """The rows of one call."""
        if self.batch_size is None:
            return max(1, rows) if self.way is not True else min(_ROWS, max(1, _NUMBERS // _numbers(x)))
        return self.batch_size

    def _draws(self, model: Callable, x, rows: int) -> int:
        """The draws of one call."""
        outputs = model.chain_outputs(x) if isinstance(model, Rest) else None
        if outputs is not None:  # a chain repeats nothing and has nothing between its layers in memory
            return max(1, min(self.n_samples, (self.batch_size or _BLOCK // max(1, outputs)) // max(1, rows)))
        together = self.batch_size or min(_ROWS_OF_SEVERAL_DRAWS, max(1, _NUMBERS // _numbers(x)))
        weights = max((pair.mu.numel() for _, layer in named_layers(self.model) for pair in layer.pairs()), default=0)
        draws = max(1, min(together // max(1, rows), _WEIGHTS // max(1, weights)))
        return max(n for n in _DRAWS_COMPILED if n <= max(1, min(draws, self.n_samples))) if self.whole else draws


def _numbers(x) -> int:
    """How many there are in a row of x."""
    return max(1, sum(t.shape[1:].numel() for t in flatten(x)[0] if isinstance(t, Tensor) and t.dim()))


def _check_rows_apart(model: Callable, x, draws: Draws, among: Tensor, n_samples: int, output: Callable | None,
                      place: tuple[int, int] | None) -> None:
    """ValueError if the last draw of a call differs from the same draw in a call of its own by more than rounding."""
    low = among.dtype in _HALVES or torch.is_autocast_enabled(among.device.type) or any(
        p.dtype in _HALVES for p in draws.model.parameters())
    tolerance = 0.1 if low else 1e-6 if among.dtype == torch.float64 else 0.02  # TensorFloat-32 has ten bits

    def differ(a: Tensor, b: Tensor) -> bool:
        a, b = a.double(), b.double()
        size = torch.maximum(a.abs().mean(), b.abs().mean())
        return bool((a - b).abs().mean() > tolerance * size)

    draws.move(n_samples - 1, 1, place)
    alone = single(model, x, output)
    if alone.shape == among.shape and not differ(among, alone):
        return
    # Nor need it be the same again: dropout that is always on, parameters that another thread trains.
    draws.move(n_samples - 1, 1, place)
    again = single(model, x, output)
    draws.move(0, n_samples, place)
    if not differ(alone, again) and not differ(among, repeated(model, x, n_samples, output)[-1]):
        raise ValueError(
            "model: expected outputs whose rows do not depend on the other rows, as several draws are stacked along dimension "
            "0, but rows of different draws mix: a draw comes out otherwise alone. If dimension 0 is not the batch (nodes of "
            "a graph, time), use vectorized=False")


def _tensor(y) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"model: expected a tensor as output, given {checks.describe(y)}; output= chooses one of several")
    return y


def _checked(y: Tensor) -> Tensor:
    """The outputs, in float32 at least."""
    y = _tensor(y)
    if not y.is_floating_point():
        raise TypeError(f"model: expected floating-point outputs, given {checks.describe(y)}")
    return y.float() if y.dtype in _HALVES else y


def _room(block: Tensor, n_samples: int, rows: int) -> Tensor | None:
    """For the outputs of all draws, if they may be kept."""
    shape = torch.Size((n_samples, rows, *block.shape[2:]))
    return block.new_empty(shape) if shape.numel() * block.element_size() <= KEPT_BYTES else None
