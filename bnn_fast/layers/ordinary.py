"""What a training step of linear layers asks for where nothing is unusual, each in one step of the compiled nodes: csrc/autograd/
ordinary.h. Whatever they leave alone is done in Python.
"""
from __future__ import annotations

import torch

from .. import checks
from ..operators import autograd, raw
from .base import VariationalLayer
from .modes import ORDINARY, sampling_stack
from .state import Record

# How wide a chain's layers are at most, with gradients and without, and how many (kChainWidth, kChainLayers in csrc/problem.h). Forward
# the operator has the rate of a large GEMM at any width; backward its sums by lane leave the cache.
WIDEST_TRAINED, WIDEST, LONGEST = 128, 1024, 15

in_chains: dict[type, object] = {}  # what a chain is made of (chain.py), as Ordinary takes it

_steps = None if autograd.nodes is None else autograd.nodes.Ordinary(
    autograd.LINEAR.node, autograd.CHAIN.node, sampling_stack, raw.in_plain, ORDINARY, Record, VariationalLayer, checks.SCALES,
    checks.KLS, in_chains, (WIDEST_TRAINED, LONGEST))


def ordinary():
    """Those steps; None where there are none."""
    return None if torch.compiler.is_compiling() or autograd.nodes is None else _steps
