"""Predictions: any number of posterior draws in bounded memory."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import named_layers
from . import blocks
from .blocks import Run
from .evaluation import evaluation
from .mixture import prediction_class
from .moments import Moments
from .passes import checked_output, checked_way
from .prediction import Prediction
from .sampling import Draws
from .structure import count_rows, given, moved

__all__ = ["predict"]

_BAR_AFTER = 2.0       # seconds


@torch.no_grad()
def predict(model: nn.Module, x, likelihood: nn.Module | None = None, n_samples: int = 100,
            seed: int | None = None, batch_size: int | None = None,
            progress: bool | None = False, *, mean: bool = False, vectorized: bool | str = True, joint: bool = False,
            head: str | None = None, output: Callable | None = None) -> Prediction:
    """The predictive distribution of `model` at x, from n_samples posterior draws.

    Args:
        model: any module, x [B, ...] -> outputs [B, ...]. It runs in evaluation mode and without gradients (`mc_forward` keeps
            the graph, for what is to be differentiated by x or the parameters). The mode of its modules does not change for
            other threads, nor afterwards (within torch.compile and where else `inference.evaluation` says, it is restored, also
            after an error or Ctrl-C).
        x: [B, ...]; a tuple for model(*x), a dictionary for model(**x), or another structure for model(x), as `mc_forward` takes
            them. Or a DataLoader or another iterable of such batches (one without a method `to`, as inputs have): all are
            predicted under the same draws, and put together. Of a batch that is a tuple or list, as a dataset with targets
            gives, the first is the input, and a second is left alone; batches are moved to the device of the model's parameters.
        likelihood: None, for the outputs themselves; or that which the model was trained with.
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
            batch_size is given, and dimension 0 of the outputs may be anything. "vmap": see `mc_forward`.
        joint: True draws weights, whatever the layers' estimator: then draw s is one network for all rows (sample paths, Thompson
            sampling). Otherwise a layer with the estimator "local" or "flipout" gives each row its own distribution, and says
            nothing of several rows together.
        head: the name of the module that has all the variational layers and gives what the model gives ("fc"): the rest of the
            model runs once for all draws. Of an nn.Sequential, what comes before the first variational layer does so anyway,
            unless it draws random numbers (of torch's generator: one of its own, or numpy's, is not seen). What comes later in any
            other model runs for every draw.
        output: a function that chooses or makes the output, a tensor, from what the model gives.

    Returns a `Prediction`; with a likelihood a `GaussianPrediction` or a `ClassPrediction`. Mean and variance
    are summed up as the draws come, in float64 and for any S. The draws themselves, which quantiles need, are
    kept up to 1 GiB. Beyond the draws and the results, memory does not grow with S or B.

    Raises ValueError or TypeError naming the argument, what was given and what was expected, also where a draw comes out
    otherwise among several than alone (the rows of the model's dimension 0 mix); ModuleNotFoundError if a progress bar is
    asked for without tqdm. Warns if several draws are asked of a model without variational layers.
    """
    checks.module("model", model)
    vectorized = checked_way(vectorized)
    checks.flags(mean=mean, joint=joint)
    checked_output(output)
    n_samples = checks.positive_int("n_samples", n_samples)
    if batch_size is not None:
        batch_size = checks.positive_int("batch_size", batch_size)
    if n_samples > 1:
        checks.any_layers(model, named_layers(model), "its draws are all the same", stacklevel=4)
    kind = prediction_class(likelihood)
    compiled = _compiled(model)
    if head is not None and compiled:
        raise ValueError("head: expected None for a model that torch.compile has to do with, whose calls are not seen; compile "
                         f"the head and the rest by themselves, given {checks.describe(head)}")
    batches, rows = _batches(model, x, vectorized is True or batch_size is not None)
    kept, pieces = [], []
    with evaluation(model), Draws(model, n_samples, seed, mean, frozen=True, joint=joint) as draws:
        n_calls = 1 if draws.one else n_samples
        with _bar(None if rows is None else rows * n_calls, progress) as bar:
            run = Run(model, draws, n_calls, batch_size, vectorized, head, output, compiled and vectorized is True, bar)
            for batch in batches:
                outputs, moments, dtype = run.batch(batch, kind, likelihood)
                pieces.append(moments)
                kept.append(outputs)
                if any(o is None for o in kept) or sum(o.numel() * o.element_size() for o in kept) > blocks.KEPT_BYTES:
                    kept = [None]
    if not pieces:
        raise ValueError("x: expected at least one batch, given none")
    whole, outputs = Moments.joined(pieces), kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)
    if draws.one:
        whole.count = n_samples
        outputs = None if outputs is None else outputs.expand(n_samples, *outputs.shape[1:])
    return kind(outputs, whole, likelihood, dtype)


def _batches(model: nn.Module, x, stacked: bool) -> tuple[Iterable, int | None]:
    """(what the model is to be called with, one after the other; the rows of all, where they are known)."""
    many = isinstance(x, Iterator) or (isinstance(x, Iterable) and not isinstance(x, (Tensor, tuple, list, Mapping, str, bytes))
                                       and not is_dataclass(x) and not hasattr(x, "to") and not hasattr(x, "__array__"))
    if not many:
        x = given(model, x)
        return [x], count_rows(x, stacked)
    parameter = next(model.parameters(), None)
    return (_of_loader(model, batch, None if parameter is None else parameter.device) for batch in x), None


def _of_loader(model: nn.Module, batch, device: torch.device | None):
    """The input in a batch."""
    if type(batch) in (tuple, list):
        if len(batch) not in (1, 2):
            raise ValueError("x: expected batches that are an input or (input, targets), where a model of several has them in a "
                             f"tuple or dictionary, given {checks.describe(batch)}: ((a, b) for a, b, y in loader) gives "
                             "a and y as these, (((a, b), y) for a, b, y in loader) both as inputs")
        batch = batch[0]
    return moved(given(model, batch), device)


def _compiled(model: nn.Module) -> bool:
    """Whether torch.compile has to do with the model."""
    return any("_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) for m in model.modules())


class _NoBar(contextlib.AbstractContextManager):
    def update(self, n: int) -> None:
        pass

    def __exit__(self, *exception) -> None:
        pass


def _bar(total: int | None, progress: bool | None):
    if progress is False:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress: a bar needs tqdm (pip install tqdm)") from error
    delay = _BAR_AFTER if progress is None else 0.0
    return tqdm(total=total, desc="predict", unit="row", unit_scale=True, delay=delay)
