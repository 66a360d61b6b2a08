"""Predictions: any number of posterior draws in bounded memory."""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import named_layers
from .evaluation import evaluation
from .mixture import prediction_class
from .prediction import Prediction
from .sampling import Draws, repeated, single

__all__ = ["predict"]

KEPT_BYTES = 2 ** 30   # draws are kept, for quantiles and samples, up to this size
# Sizes of one call of the model, from timings on a CPU: many rows, as a call of a small network costs more in
# Python than in arithmetic; but several draws only where they have few rows, their products being slower.
_ROWS = 16384
_ROWS_OF_SEVERAL_DRAWS = 4096
_NUMBERS = 2 ** 22     # in x
_WEIGHTS = 2 ** 24     # of one layer, the draws counted
_BLOCK = 2 ** 18       # outputs that are taken into the mean and the variance at a time
_DRAWS_COMPILED = (1, 16, 256)  # of a call: torch.compile compiles anew for each number, and gives up after eight
_BAR_AFTER = 2.0       # seconds
_HALVES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, likelihood: nn.Module | None = None, n_samples: int = 100,
            seed: int | None = None, batch_size: int | None = None,
            progress: bool | None = False, *, mean: bool = False, vectorized: bool = True, joint: bool = False) -> Prediction:
    """The predictive distribution of `model` at x, from n_samples posterior draws.

    Args:
        model: any module, x [B, ...] -> outputs [B, ...]. It runs in evaluation mode and without gradients. The mode of
            its modules does not change for other threads, nor afterwards (within torch.compile and where else
            `inference.evaluation` says, it is restored, also after an error or Ctrl-C).
        x: [B, ...].
        likelihood: None, for the outputs themselves; or the Gaussian, HeteroscedasticGaussian, Bernoulli or
            Categorical that the model was trained with.
        n_samples: S, the number of draws.
        seed: draw s is that of `sampling(model, seed=seed, first_sample=s)`. Without one, an explicit mode counts: within
            `sampling(model, seed=a)` the draws are those of seed a, within `sampling(model, pinned=True)` those of the
            block's, whose first is the block's network; within `sampling(model, mean=True)` and after `freeze` there is one
            network, of which S draws are S times the same, computed once: std is 0. Otherwise a fresh seed holds for
            the whole call.
        batch_size: the most rows to go through `model` in one call, draws counted; by default 16,384, or
            fewer if a row of x is large. The noise does not depend on it, the outputs only by rounding.
        progress: whether to show a bar (of tqdm); None shows it after two seconds.
        mean: predict with the means of the weights: one network, as above. Without a seed.
        vectorized: False makes one call a draw, for models whose dimension 0 is not a batch of independent rows (the nodes
            of a graph, time first): several draws cannot be stacked there. All rows of x then go through in one call, unless
            batch_size is given, and dimension 0 of the outputs may be anything.
        joint: True draws weights, whatever the layers' estimator: then draw s is one network for all rows (sample paths, Thompson
            sampling). Otherwise a layer with the estimator "local" or "flipout" gives each row its own distribution, and says
            nothing of several rows together.

    Returns a `Prediction`; with a likelihood a `GaussianPrediction` or a `ClassPrediction`. Mean and variance
    are summed up as the draws come, in float64 and for any S. The draws themselves, which quantiles need, are
    kept up to 1 GiB. Beyond the draws and the results, memory does not grow with S or B.

    Raises ValueError or TypeError naming the argument, what was given and what was expected, also where a draw comes out
    otherwise among several than alone (the rows of the model's dimension 0 mix); ModuleNotFoundError if a progress bar is
    asked for without tqdm. Warns if several draws are asked of a model without variational layers.
    """
    checks.module("model", model)
    checks.batch("x", x)
    checks.flags(mean=mean, vectorized=vectorized, joint=joint)
    n_samples = checks.positive_int("n_samples", n_samples)
    if n_samples > 1:
        checks.any_layers(model, named_layers(model), "its draws are all the same", stacklevel=4)
    kind = prediction_class(likelihood)
    n_rows, n_draws = _chunk(model, x, batch_size, vectorized)
    whole_calls = vectorized and _compiled(model)
    kept, pieces, first_row = None, [], 0
    with evaluation(model), Draws(model, n_samples, seed, mean, frozen=True, joint=joint) as draws:
        n_calls = 1 if draws.one else n_samples
        if whole_calls:
            n_draws = max(n for n in _DRAWS_COMPILED if n <= max(1, min(n_draws, n_calls)))
        with _bar(len(x) * n_calls, progress) as bar:
            for rows in x.split(n_rows):
                moments = Moments()
                split = n_rows < len(x)
                place = (first_row, len(rows)) if split else None
                for first, block in _blocks(model, rows, draws, n_calls, n_draws if vectorized else None, bar, not pieces,
                                            whole_calls, place):
                    if not pieces and not first:
                        kept = _room(block, n_calls, len(x) if split else block.shape[1])
                    moments.add(*kind.terms(block, likelihood))
                    if kept is not None:
                        kept[first:first + len(block), first_row:first_row + block.shape[1]] = block
                pieces.append(moments)
                first_row += len(rows)
    whole = Moments.joined(pieces)
    if draws.one:
        whole.count = n_samples
        kept = None if kept is None else kept.expand(n_samples, *kept.shape[1:])
    return kind(kept, whole, likelihood, block.dtype)


def _blocks(model: nn.Module, rows: Tensor, draws: Draws, n_samples: int, n_draws: int | None, bar, checking: bool,
            whole: bool, place: tuple[int, int] | None):
    """(first draw, outputs [n, b, ...] of this and the following draws) for the given rows; n_draws of them in one call
    (in the last one too, if `whole`, where those beyond n_samples are dropped), or each in a call of its own (None).
    place: of rows that are not all of them, the first and how many."""
    first, pending, size = 0, [], 0
    for s in range(0, n_samples, n_draws or 1):
        count = min(n_draws or 1, n_samples - s)
        together = n_draws if whole else count
        draws.move(s, together, place)
        y = single(model, rows, draws, s, place)[None] if n_draws is None else repeated(model, rows, together)[:count]
        if n_draws is None and (y.dim() < 2 or (place and y.shape[1] != len(rows))):
            raise ValueError(f"model: expected outputs with {len(rows) if place else 'any number of'} rows in dimension 0, "
                             f"given {checks.describe(y[0])}")
        pending.append(_checked(y))
        if checking and s == 0 and count > 1 and draws.any and not whole:  # that would compile again
            _check_rows_apart(model, rows, draws, y[-1], count, place)
        bar.update(count * len(rows))
        size += pending[-1].numel()
        if size >= _BLOCK or s + count == n_samples:
            yield first, torch.cat(pending)
            first, pending, size = s + count, [], 0


def _check_rows_apart(model: nn.Module, rows: Tensor, draws: Draws, among: Tensor, n_samples: int,
                      place: tuple[int, int] | None) -> None:
    """ValueError if the last draw of a call differs from the same draw in a call of its own by more than rounding."""
    low = among.dtype in _HALVES or torch.is_autocast_enabled(among.device.type) or any(
        p.dtype in _HALVES for p in model.parameters())
    tolerance = 0.1 if low else 1e-6 if among.dtype == torch.float64 else 0.02  # TensorFloat-32 has ten bits

    def differ(a: Tensor, b: Tensor) -> bool:
        a, b = a.double(), b.double()
        size = torch.maximum(a.abs().mean(), b.abs().mean())
        return bool((a - b).abs().mean() > tolerance * size)

    alone = single(model, rows, draws, n_samples - 1, place)
    if alone.shape == among.shape and not differ(among, alone):
        return
    # Nor need it be the same again: dropout that is always on, parameters that another thread trains.
    again = single(model, rows, draws, n_samples - 1, place)
    draws.move(0, n_samples, place)
    if not differ(alone, again) and not differ(among, repeated(model, rows, n_samples)[-1]):
        raise ValueError(
            "model: expected outputs whose rows do not depend on the other rows, as several draws are stacked along dimension "
            "0, but rows of different draws mix: a draw comes out otherwise alone. If dimension 0 is not the batch (nodes of "
            "a graph, time), use vectorized=False")


class Moments:
    """Mean and summed squared deviations of the draws' values, and the mean of their spreads, in float64.

    Blocks are merged by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979), which does not subtract large sums from each other.
    """

    def __init__(self):
        self.count = 0
        self.mean = self.squares = self.spread = 0.0

    def add(self, values: Tensor, spread: Tensor | None) -> None:
        """values [n, ...]; spread [n, ...] or None."""
        values = values.double()
        mean, n = values.mean(0), len(values)
        total = self.count + n
        shift = mean - self.mean
        within = (values - mean).square().sum(0)
        self.squares = self.squares + within + shift.square() * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        if spread is not None:
            self.spread = self.spread + (spread.double().mean(0) - self.spread) * (n / total)
        self.count = total

    @staticmethod
    def joined(pieces: list[Moments]) -> Moments:
        """Those of all the rows."""
        whole = Moments()
        whole.count = pieces[0].count
        for name in ("mean", "squares", "spread"):
            parts = [getattr(piece, name) for piece in pieces]
            if isinstance(parts[0], Tensor):
                setattr(whole, name, torch.cat(parts))
        return whole


def _chunk(model: nn.Module, x: Tensor, batch_size: int | None, vectorized: bool) -> tuple[int, int]:
    """(rows, draws) of one call."""
    if batch_size is None and not vectorized:
        return max(1, len(x)), 1
    if batch_size is None:
        rows = min(_ROWS, max(1, _NUMBERS // max(1, x.shape[1:].numel())))
        together = min(rows, _ROWS_OF_SEVERAL_DRAWS)
    else:
        rows = together = checks.positive_int("batch_size", batch_size)
    weights = max((pair.mu.numel() for _, layer in named_layers(model) for pair in layer.pairs()), default=0)
    draws = min(together // max(1, min(rows, len(x))), _WEIGHTS // max(1, weights))
    return rows, max(1, draws)


def _compiled(model: nn.Module) -> bool:
    """Whether torch.compile has to do with the model."""
    return any("_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) for m in model.modules())


def _checked(y: Tensor) -> Tensor:
    """The outputs, in float32 at least."""
    if not y.is_floating_point():
        raise TypeError(f"model: expected floating-point outputs, given {checks.describe(y)}")
    return y.float() if y.dtype in _HALVES else y


def _room(block: Tensor, n_samples: int, rows: int) -> Tensor | None:
    """For the outputs of all draws, if they may be kept."""
    shape = torch.Size((n_samples, rows, *block.shape[2:]))
    return block.new_empty(shape) if shape.numel() * block.element_size() <= KEPT_BYTES else None


class _NoBar(contextlib.AbstractContextManager):
    def update(self, n: int) -> None:
        pass

    def __exit__(self, *exception) -> None:
        pass


def _bar(total: int, progress: bool | None):
    if progress is False:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress: a bar needs tqdm (pip install tqdm)") from error
    delay = _BAR_AFTER if progress is None else 0.0
    return tqdm(total=total, desc="predict", unit="row", unit_scale=True, delay=delay)
