"""What runs of a model, and why."""
from __future__ import annotations

import copy

import torch
from torch import nn

from .. import checks
from ..layers.base import VariationalLayer, named_layers
from ..layers.chain import Sequential, parts, runs_its_children, why_not
from ..layers.modes import enter, leave
from ..layers.variational_linear import VariationalLinear
from ..operators import raw
from .structure import call, given

_HEAD = ("layer", "operator", "regime", "device", "why")
_REGIMES = (("small", "at most 64 inputs and outputs: products straight from the rows"),
            ("fused", "drawn tile by tile and never written, as its rows are few for its weights, or products here faster than the GEMM"),
            ("drawn", "many rows for its weights: drawn once, the products are the vendor's GEMM"))


def explain(model: nn.Module, x) -> None:
    """Print, for every variational layer of `model`, by which operator and regime it runs on x, on which device, and why: as layers draw
    now, within `sampling` too.

    x: as `predict` takes it. A copy of the model runs once, without gradients; torch's random numbers are left as they were.
    TypeError if the model is no module.
    """
    checks.module("model", model)
    layers, inputs = named_layers(model), _inputs(model, given(model, x))
    of_chains, rows = _of_chains(model, inputs), [_HEAD]
    for name, layer in layers:
        if name not in inputs:
            rows.append((name, "-", "-", str(layer.device), "the model does not call it"))
        elif name in of_chains and len(of_chains[name]) == 1:
            rows.append((name, "variational_chain", "-", str(layer.device), *of_chains[name]))
        else:
            operator, regime, why = _of_layer(layer, inputs[name])
            rows.append((name, operator, regime, str(layer.device), "; ".join([why, *of_chains.get(name, ())[1:]])))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    print("\n".join("  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[4]]) for row in rows))


def _inputs(model: nn.Module, x) -> dict[str, object]:
    """The first argument of the first call of each layer and each nn.Linear."""
    twin, found = copy.deepcopy(model), {}

    def note(name: str, arguments: tuple) -> None:
        found.setdefault(name, arguments[0] if arguments else None)

    for name, module in twin.named_modules():
        if isinstance(module, (VariationalLayer, nn.Linear)):
            module.register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments))
    entry = enter([layer for _, layer in named_layers(twin)], [layer.drawing_mode() for _, layer in named_layers(model)])
    devices = list({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            call(twin, x)
    finally:
        leave(entry)
    return found


def _of_chains(model: nn.Module, inputs: dict[str, object]) -> dict[str, tuple[str, ...]]:
    """(why,) by the name of each layer that runs in a chain; (why, why the chain does not run) of one that could."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for top in model.modules():
        own = type(top).forward is Sequential.forward
        if not own and not (top is model and runs_its_children(model)):
            continue
        for part in parts(top._modules.values()):
            if not isinstance(part, list):
                continue
            of = [names[id(step.layer)] for step in part]
            text = f"narrow layers in one operator: {', '.join(of)}"
            text += "" if own else "; in ELBO, mc_forward, predict, and after fuse(model)"
            reason = why_not(part, inputs.get(of[0]))
            for name in of:
                found.setdefault(name, (text,) if reason is None else (text, f"not in one operator with {', '.join(of)}: {reason}"))
    return found


def _of_layer(layer: VariationalLayer, x) -> tuple[str, str, str]:
    """(operator, regime, why)"""
    if not isinstance(layer, VariationalLinear):
        return "sample_normal", "-", "its weights are drawn, then it is torch's module"
    estimated = layer.estimator != "weight"
    if not raw.compiled_for(layer.device):
        return "plain PyTorch", "-", "there is no compiled operator here for that"
    if estimated:
        return "estimated_linear", "-", f"estimator={layer.estimator!r}"
    mode = layer.drawing_mode()
    if mode.mean:
        return "linear", "-", "the means are asked for"
    regime, why = _REGIMES[torch.ops.bnn_fast._linear_regime(x, layer.weight_mu, mode.n_samples)]
    return "variational_linear", regime, why
