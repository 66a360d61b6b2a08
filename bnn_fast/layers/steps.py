"""Optimizer steps: what a version counter does not tell of parameters."""
from __future__ import annotations

import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Generation:
    """The time between two steps, of whatever optimizer. Known by its identity: torch.compile, which traces the hook with
    the step, would compile anew for every value of a number.
    """
    __slots__ = ()


current = Generation()
pruned: weakref.WeakSet = weakref.WeakSet()  # layers with pruned weights, which no step may bring back


def _stepped(optimizer, *_) -> None:
    global current
    current = Generation()
    if torch.compiler.is_compiling():
        return
    # Fused kernels write without raising _version, by which autograd, and the nodes here, see a change in place.
    written = [p for group in optimizer.param_groups if group.get("fused")
               for p in group["params"] if p.grad is not None and not p.is_inference()]
    if written:
        torch.autograd.graph.increment_version(written)
    for layer in list(pruned):
        layer.keep_pruned()


register_optimizer_step_post_hook(_stepped)
