"""torch's FLOP counter counts a variational layer's products as nn.Linear's."""
from __future__ import annotations

import pytest
import torch
from common import needs_extension
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bnn_fast as bf


def flops(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


@needs_extension
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
@pytest.mark.parametrize("need_x", [True, False])
def test_a_layer_counts_as_nn_linear(shape, need_x):
    x = torch.randn(shape, requires_grad=need_x)
    found = flops(bf.VariationalLinear(3, 7), x)
    assert found == flops(nn.Linear(3, 7), x) == (3 if need_x else 2) * 2 * x[..., 0].numel() * 3 * 7


@needs_extension
def test_draws_count_each():
    layer = bf.VariationalLinear(3, 7)
    with bf.sampling(layer, n_samples=4):
        assert flops(layer, torch.randn(20, 3)) == flops(nn.Linear(3, 7), torch.randn(20, 3))
