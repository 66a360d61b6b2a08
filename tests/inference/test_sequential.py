"""What an nn.Sequential takes as x: one input."""
from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

import bnn_fast as bf

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))


class Summed(nn.Sequential):
    """With a forward of its own, of two inputs."""

    def forward(self, a, b):
        return super().forward(a + b)


@pytest.mark.parametrize("several", [lambda a: (a, a), lambda a: {"a": a}, lambda a: UserDict(a=a), lambda a: ()])
@pytest.mark.parametrize("call", [
    bf.predict, lambda m, x: bf.mc_forward(m, x, 5), lambda m, x: bf.ELBO(m, bf.Gaussian(), 10)(x, torch.zeros(7, 4))])
def test_several_inputs_of_a_sequential(several, call):
    """Refused before a seed is drawn."""
    model, before = nn.Sequential(nn.Identity(), bf.VariationalLinear(3, 4)), torch.get_rng_state()
    given = several(X)
    words = f"x: expected the one input that an nn.Sequential has, .* given (tuple|dict) of {len(given)}"
    with pytest.raises(TypeError, match=words):
        call(model, given)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match=words):
        bf.predict(model, iter([(given, None)]))


def test_what_a_sequential_takes():
    model, zero = nn.Sequential(nn.Identity(), bf.VariationalLinear(3, 4)), torch.zeros_like(X)
    wanted = bf.mc_forward(model, X, 5, seed=3)
    for one in ((X,), {"input": X}):
        assert torch.equal(bf.mc_forward(model, one, 5, seed=3), wanted)
    own = Summed(*model)
    assert torch.equal(bf.mc_forward(own, (X, zero), 5, seed=3), wanted)
    model.forward = lambda a, b: own(a, b)
    assert torch.equal(bf.mc_forward(model, {"a": X, "b": zero}, 5, seed=3), wanted)
    del model.forward
    model.register_forward_pre_hook(lambda module, inputs: inputs[0] + inputs[1])
    assert torch.equal(bf.mc_forward(model, (X, zero), 5, seed=3), wanted)
