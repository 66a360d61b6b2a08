"""The KL divergence of a model's posterior to its prior."""
from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import Pair, VariationalLayer, named_layers
from ..layers import steps
from ..layers.ordinary import ordinary
from ..layers.state import Record
from ..operators import arguments as packing
from ..operators import autograd, functional, raw, reference
from .sampling import Draws


def kl_divergence(model: nn.Module, reduction: str = "sum") -> Tensor | dict[str, Tensor]:
    """KL(q || p) of all the variational layers of `model`, at their parameters as they are now, with its
    gradient.

    Args:
        reduction: "sum"; "mean", the sum divided by the number of weights, a (mu, rho) pair counting once and
            pruned ones (rho = -inf) not at all; "none", a dictionary of elementwise tensors under the
            parameters' qualified names without "_mu" ("0.weight", "0.bias").

    Parameters that layers share count once. A model without variational layers gives 0, and a warning.

    If a layer's latest call with gradients on was made with these very parameters, its KL was computed there and is handed
    over, once, to the first read with gradients on; every other read computes it, in one pass over the parameters.
    Parameters count as unchanged while they, and the prior, have the same storage and version and no optimizer has made
    a step. What writes through `.data` in place is not seen, and only by a read that comes between a call and any other
    read. `nll.backward()` and `kl.backward()` work in either order as well as `(nll + kl).backward()`.

    A layer with kl="sampled" gives log q(w) - log p(w) at the weights of its latest call made with gradients
    on (the mean over its draws), where no recomputation under activation checkpointing counts; if there is
    none for the parameters as they are, at weights drawn now. Under torch.func nothing is handed over.

    A table with kl_rows="batch" (see `VariationalEmbedding`) gives, with gradients on, the estimate made of the rows that its
    latest such call looked up; with gradients off, for "none", and where there is no such call, the KL of all its rows.
    """
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.module("model", model)
    if reduction == "sum" and (total := _handed_over(model, False)) is not None:
        return total
    layers = named_layers(model)
    owned = _owned(layers, [layer.identities() for _, layer in layers])
    checks.any_layers(model, owned, "the KL is 0")
    if reduction == "none":
        return {f"{name}.{pair.name}" if name else pair.name: value for name, layer, new in owned
                for pair, value in zip(_pairs(layer, new), _elementwise(layer, new))}
    total = _total(model, owned, lambda layer, record: record is not None)
    if reduction == "mean" and owned:
        rhos = [pair.rho for _, layer, new in owned for pair in _pairs(layer, new)]
        counts = [functional.alive(rho).to(total.device) for rho in rhos]
        total = total / sum(counts).clamp(min=1)
    return total


def kl_of_pass(draws: Draws) -> Tensor:
    """The KL of the pass that a model just made within the context of pinned keys that is around: it takes over what that pass
    computed, and nothing that an earlier one left.
    """
    if (total := _handed_over(draws.model, True)) is not None:
        return total
    compiling = torch.compiler.is_compiling()  # a record that holds is then the region's own
    layers = named_layers(draws.model)
    return _total(draws.model, _owned(layers, [layer.identities() for _, layer in layers]), lambda layer, record: record is not None
                  and (compiling or record.key is layer.drawing_mode().key))


def _handed_over(model: nn.Module, of_pass: bool) -> Tensor | None:
    """The sum of what the latest calls of all layers left, in one step; None where not all left something, or anything is unusual."""
    in_one = ordinary()
    return None if in_one is None else in_one.handed_over(model, steps.current, of_pass)


def _total(model: nn.Module, owned: list, holds) -> Tensor:
    """The sum of the KLs. holds(layer, its record or None): whether the record is the one to use."""
    calls, values, records = [], [], []
    for _, layer, _ in owned:
        record = layer.recorded()
        records.append(record if holds(layer, record) else None)
    whole = [True] * len(records) if torch.compiler.is_compiling() else _whole(records, [new for _, _, new in owned])
    for (_, layer, new), record, all_met in zip(owned, records, whole):
        for item in _layer_kl(layer, new, record, all_met):
            if isinstance(item, Tensor):
                values.append(item)
            elif item not in calls:
                calls.append(item)
    if calls:
        values.insert(0, autograd.read(calls))
    if not values:
        return _zero(model)
    total = values[0]
    for value in values[1:]:
        total = total + value.to(total.device)
    return total


def _whole(records: list[Record | None], which: list[list[int] | None]) -> list[bool]:
    """Whether all the layers that each record's calls are of are met: a chain has one KL for all of its layers."""
    met = Counter(call for record, new in zip(records, which) if record is not None and new is None for call in record.kl or ())
    return [record is None or all(getattr(call, "layers", 1) == met[call] for call in record.kl or ()) for record in records]


def _owned(layers: list[tuple[str, VariationalLayer]],
           identities: list[list[tuple[int, ...]]]) -> list[tuple[str, VariationalLayer, list[int] | None]]:
    """(name, layer, which of its pairs no layer before it has; None for all)."""
    seen, owned = set(), []
    for (name, layer), pairs in zip(layers, identities):
        new = [i for i, pair in enumerate(pairs) if pair not in seen]
        seen.update(pairs)
        if new:
            owned.append((name, layer, None if len(new) == len(pairs) else new))
    return owned


def _pairs(layer: VariationalLayer, which: list[int] | None) -> list[Pair]:
    pairs = layer.pairs()
    return pairs if which is None else [pairs[i] for i in which]


def _layer_kl(layer: VariationalLayer, which: list[int] | None, record: Record | None, whole: bool) -> list:
    """The KL of these pairs of the layer: calls to be read, or tensors. whole: see `_whole`."""
    if record is not None and which is None:
        kl = record.hand_over() if whole else None
        if kl is not None:
            return list(kl)
        kl = layer.estimated_kl(record)
        if kl is not None:
            return [kl]
    if layer.kl == "analytic":
        return [_analytic(pair, layer.scale) for pair in _pairs(layer, which)]
    key, n_samples = _key(layer, record)
    return [_sampled(pair, layer.scale, key, n_samples) for pair in _pairs(layer, which)]


def _key(layer: VariationalLayer, record: Record | None) -> tuple[Tensor, int]:
    if record is not None:
        return record.key, record.n_samples
    mode = layer.drawing_mode()
    return layer._key(mode, layer.device), mode.n_samples


def _analytic(pair: Pair, scale: str) -> object:
    if autograd.nodes is None or autograd.transformed() or not raw.compiled_for(pair.mu.device):
        return functional.kl_normal(pair.mu, pair.rho, prior=pair.prior, scale=scale)
    return autograd.kl_call(packing.to_compare([pair.mu, pair.rho], packing.pack_priors(pair.prior), scale, True))


def _sampled(pair: Pair, scale: str, key: Tensor, n_samples: int) -> Tensor:
    return functional.sample_normal(pair.mu, pair.rho, key, prior=pair.prior, scale=scale, kl="sampled",
                                    n_samples=n_samples, stream=pair.stream)[1]


def _elementwise(layer: VariationalLayer, which: list[int] | None) -> list[Tensor]:
    pairs = _pairs(layer, which)
    if layer.kl == "analytic":
        return [functional.kl_normal(pair.mu, pair.rho, prior=pair.prior, scale=layer.scale, reduction="none")
                for pair in pairs]
    key, n_samples = _key(layer, layer.recorded())
    return [reference.sampled_kl(pair.mu, pair.rho, key, prior=pair.prior, scale=layer.scale,
                                 n_samples=n_samples, stream=pair.stream) for pair in pairs]


def _zero(model: nn.Module) -> Tensor:
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)
