"""Which weights carry a signal, and leaving out those that do not."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import Pair, VariationalLayer, named_layers
from ..priors.scales import deviation_of

__all__ = ["prune", "signal_to_noise"]


@torch.no_grad()
def signal_to_noise(model: nn.Module) -> dict[str, Tensor]:
    """|mu| / sigma of every weight and bias of the variational layers of `model` (Graves, "Practical Variational Inference
    for Neural Networks", 2011; Blundell et al., "Weight Uncertainty in Neural Networks", 2015, section 5.1).

    Returns a dictionary under the parameters' qualified names without "_mu" ("0.weight", "0.bias"), of tensors of the
    parameters' shapes, in float32 (float64 for float64 parameters). Pruned weights (rho = -inf) have 0, others whose sigma
    has underflowed inf. Parameters that layers share come once.
    """
    return {name: _ratio(pair, layer.scale) for name, layer, pair in _pairs(model)}


@torch.no_grad()
def prune(model: nn.Module, fraction: float, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Prune the given fraction of all weights, those with the lowest |mu| / sigma: mu = 0, rho = -inf.

    Args:
        fraction: from 0 to 1, of all the weights and biases of the variational layers together; those that are pruned
            already count, so that the same call again changes nothing.
        optimizer: the one that goes on training `model`: what it remembers of the pruned weights (momentum and the like)
            is set to 0.

    Returns how many weights are pruned now.

    A pruned weight has no noise, no KL and no gradients, and stays pruned: its layer sets it to these values again
    after every step of any optimizer, at every call, and when it is saved, so that neither weight decay nor averaged
    parameters (`torch.optim.swa_utils.AveragedModel`) make it NaN. That is true of loaded models and of copies too.

    TypeError or ValueError if fraction is not a number from 0 to 1.
    """
    if not checks.is_number(fraction):
        raise TypeError(f"fraction: expected a number from 0 to 1, given {checks.describe(fraction)}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number from 0 to 1, given {fraction}")
    pairs = [(layer, pair) for _, layer, pair in _pairs(model)]
    if not pairs:
        checks.any_layers(model, pairs, "nothing is pruned")
        return 0
    ratios = torch.cat([_ratio(pair, layer.scale).flatten().cpu() for layer, pair in pairs])
    count = round(fraction * len(ratios))
    chosen = torch.zeros(len(ratios), dtype=torch.bool)
    chosen[ratios.argsort(stable=True)[:count]] = True  # of equals the first
    for (_, pair), mask in zip(pairs, chosen.split([pair.mu.numel() for _, pair in pairs])):
        mask = mask.view(pair.mu.shape).to(pair.mu.device)
        pair.mu.masked_fill_(mask, 0.0)
        pair.rho.masked_fill_(mask, -math.inf)
        for parameter in (pair.mu, pair.rho) if optimizer is not None else ():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.masked_fill_(mask, 0.0)
    for _, layer in named_layers(model):
        layer.find_pruned()
    return int(sum((pair.rho == -math.inf).sum().item() for _, pair in pairs))


def _ratio(pair: Pair, scale: str) -> Tensor:
    dtype = torch.promote_types(pair.mu.dtype, torch.float32)
    mu, rho = pair.mu.detach().to(dtype), pair.rho.detach().to(dtype)
    return (mu.abs() / deviation_of(rho, scale)).masked_fill(rho == -math.inf, 0.0)


def _pairs(model: nn.Module) -> list[tuple[str, VariationalLayer, Pair]]:
    """(name, layer, pair), each pair once."""
    seen, found = set(), []
    for name, layer in named_layers(model):
        for identity, pair in zip(layer.identities(), layer.pairs()):
            if identity not in seen:
                seen.add(identity)
                found.append((f"{name}.{pair.name}" if name else pair.name, layer, pair))
    return found
