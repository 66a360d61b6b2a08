"""Shared by the tests of the Python side."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf
from bnn_fast.operators import autograd
from bnn_fast.operators import raw as ops

needs_extension = pytest.mark.skipif(not ops.HAS_EXTENSION,
                                     reason="bnn_fast was installed without its extension")


needs_nodes = pytest.mark.skipif(autograd.nodes is None, reason="bnn_fast was installed without autograd's compiled nodes")


@pytest.fixture(params=[pytest.param("compiled", marks=needs_nodes), pytest.param("without nodes", marks=needs_extension),
                        "plain"])
def twin(request, monkeypatch):
    """Runs a test with the compiled operators, with and without autograd's nodes, and with what runs where they are missing."""
    monkeypatch.setattr(ops, "HAS_EXTENSION", request.param != "plain")
    if request.param != "compiled":
        monkeypatch.setattr(autograd, "nodes", None)
    return request.param


def key_of(seed: int, first_sample: int = 0) -> torch.Tensor:
    return torch.tensor([seed, first_sample])


def posterior(*shape, dtype=torch.float64, seed=0, grad=True):
    """(mu, rho) of a shape."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    rho = (torch.randn(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
    return mu.requires_grad_(grad), rho.requires_grad_(grad)


def network(*, dtype=torch.float64, seed=0, **options) -> nn.Sequential:
    """Three variational layers 3-5-4-2, the middle one without a bias."""
    torch.manual_seed(seed)
    return nn.Sequential(bf.VariationalLinear(3, 5, dtype=dtype, **options), nn.ReLU(),
                         bf.VariationalLinear(5, 4, bias=False, dtype=dtype, **options), nn.Tanh(),
                         bf.VariationalLinear(4, 2, dtype=dtype, **options))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """The parameters' gradients, which are then cleared."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found
