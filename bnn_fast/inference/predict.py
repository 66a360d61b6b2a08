"""Predictions: any number of posterior draws in bounded memory."""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import named_layers
from .prediction import Prediction, prediction_class
from .sampling import pinned, repeated, sampling

__all__ = ["predict"]

KEPT_BYTES = 2 ** 30   # draws are kept, for quantiles and samples, up to this size
# Sizes of one call of the model, from timings on a CPU: many rows, as a call of a small network costs more in
# Python than in arithmetic; but several draws only where they have few rows, their products being slower.
_ROWS = 16384
_ROWS_OF_SEVERAL_DRAWS = 4096
_NUMBERS = 2 ** 22     # in x
_WEIGHTS = 2 ** 24     # of one layer, the draws counted
_BLOCK = 2 ** 18       # outputs that are taken into the mean and the variance at a time
_BAR_AFTER = 2.0       # seconds


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, likelihood: nn.Module | None = None, n_samples: int = 100,
            seed: int | None = None, batch_size: int | None = None,
            progress: bool | None = False) -> Prediction:
    """The predictive distribution of `model` at x, from n_samples posterior draws.

    Args:
        model: any module, x [B, ...] -> outputs [B, ...]. It runs in evaluation mode and without gradients;
            the mode of each of its modules is restored, also after an error or Ctrl-C.
        x: [B, ...].
        likelihood: None, for the outputs themselves; or the Gaussian, HeteroscedasticGaussian, Bernoulli or
            Categorical that the model was trained with.
        n_samples: S, the number of draws.
        seed: draw s is that of `sampling(model, seed=seed, first_sample=s)`; without one a fresh seed holds
            for the whole call.
        batch_size: the most rows to go through `model` in one call, draws counted; by default 16,384, or
            fewer if a row of x is large. The noise does not depend on it, the outputs only by rounding.
        progress: whether to show a bar (of tqdm); None shows it after two seconds.

    Returns a `Prediction`; with a likelihood a `GaussianPrediction` or a `ClassPrediction`. Mean and variance
    are summed up as the draws come, in float64 and for any S. The draws themselves, which quantiles need, are
    kept up to 1 GiB. Beyond the draws and the results, memory does not grow with S or B.

    Raises ValueError or TypeError naming the argument, what was given and what was expected;
    ModuleNotFoundError if a progress bar is asked for without tqdm.
    """
    checks.batch("x", x)
    checks.positive_int("n_samples", n_samples)
    kind = prediction_class(likelihood)
    n_rows, n_draws = _chunk(model, x, batch_size)
    kept, pieces, first_row = None, [], 0
    draws = pinned(model, n_samples, seed)
    with _bar(len(x) * n_samples, progress) as bar, _evaluation(model), draws:
        for rows in x.split(n_rows):
            moments = Moments()
            for first, block in _blocks(model, rows, draws, n_samples, n_draws, bar):
                if not pieces and not first:
                    kept = _room(block, n_samples, len(x))
                moments.add(*kind.terms(block, likelihood))
                if kept is not None:
                    kept[first:first + len(block), first_row:first_row + len(rows)] = block
            pieces.append(moments)
            first_row += len(rows)
    return kind(kept, Moments.joined(pieces), likelihood, block.dtype)


def _blocks(model: nn.Module, rows: Tensor, draws: sampling, n_samples: int, n_draws: int, bar):
    """(first draw, outputs [n, b, ...] of this and the following draws) for the given rows."""
    first, pending, size = 0, [], 0
    for s in range(0, n_samples, n_draws):
        count = min(n_draws, n_samples - s)
        draws._move(s, count)
        pending.append(_checked(repeated(model, rows, count)))
        bar.update(count * len(rows))
        size += pending[-1].numel()
        if size >= _BLOCK or s + count == n_samples:
            yield first, torch.cat(pending)
            first, pending, size = s + count, [], 0


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


def _chunk(model: nn.Module, x: Tensor, batch_size: int | None) -> tuple[int, int]:
    """(rows, draws) of one call."""
    if batch_size is None:
        rows = min(_ROWS, max(1, _NUMBERS // max(1, x.shape[1:].numel())))
        together = min(rows, _ROWS_OF_SEVERAL_DRAWS)
    else:
        rows = together = checks.positive_int("batch_size", batch_size)
    weights = max((layer.tensors()[0].numel() for _, layer in named_layers(model)), default=0)
    draws = min(together // max(1, min(rows, len(x))), _WEIGHTS // max(1, weights))
    return rows, max(1, draws)


def _checked(y: Tensor) -> Tensor:
    """The outputs, in float32 at least."""
    if not y.is_floating_point():
        raise TypeError(f"model: expected floating-point outputs, given {checks.describe(y)}")
    return y.float() if y.dtype in (torch.bfloat16, torch.float16) else y


def _room(block: Tensor, n_samples: int, rows: int) -> Tensor | None:
    """For the outputs of all draws, if they may be kept."""
    shape = torch.Size((n_samples, rows, *block.shape[2:]))
    return block.new_empty(shape) if shape.numel() * block.element_size() <= KEPT_BYTES else None


@contextlib.contextmanager
def _evaluation(model: nn.Module):
    """Evaluation mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


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
