"""Shared by the tests of Sequential."""
from __future__ import annotations

import copy

import torch
from torch import nn

import bnn_fast as bf


def node_names(y: torch.Tensor) -> list[str]:
    """The nodes behind y that draw."""
    found, queue = [], [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            found += [node.name()] if node.name() == "VariationalDraw" else []
            queue += [n for n, _ in node.next_functions]
    return found


def net(*, kind=bf.Sequential, activation=nn.Tanh, dtype=torch.float32, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(bf.VariationalLinear(3, 8, dtype=dtype, **options), activation(), nn.Linear(8, 5, dtype=dtype), activation(),
                bf.VariationalLinear(5, 2, bias=False, dtype=dtype, **options))


def twins(**options) -> tuple[nn.Sequential, nn.Sequential]:
    """(a Sequential, the nn.Sequential of the same modules' copies)"""
    fused = net(**options)
    return fused, nn.Sequential(*copy.deepcopy(fused))


def step(model: nn.Module, x: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """[y, KL, gradients] of a call after manual_seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    kl = bf.kl_divergence(model)
    (y.square().sum() + 0.1 * kl).backward()
    return [y.detach(), kl.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
