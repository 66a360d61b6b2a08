"""Draws as ordinary modules, and frozen noise."""
from __future__ import annotations

import copy

import pytest
import torch
from common import network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_draw_is_bit_equal_and_ordinary(twin, x):
    model = network()
    drawn = bf.draw(model, seed=7)
    assert [type(m) for m in drawn] == [nn.Linear, nn.ReLU, nn.Linear, nn.Tanh, nn.Linear]
    assert drawn[2].bias is None and all(p.dtype == torch.float64 for p in drawn.parameters())
    with bf.sampling(model, seed=7):
        for layer, linear in zip(model[::2], drawn[::2]):
            eye = torch.eye(layer.in_features).double()
            w = layer(eye) if layer.bias_mu is None else layer(eye) - layer(torch.zeros_like(eye))
            torch.testing.assert_close(w.T, linear.weight)
        torch.testing.assert_close(model(x), drawn(x))
    again = bf.draw(model, 7)
    for (name, p), q in zip(drawn.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
    drawn[0].weight.data.zero_()
    assert model[0].weight_mu.abs().sum() > 0
    nn.Linear(2, 1)(drawn(x).float()).sum().backward()
    assert type(bf.draw(model[0], 7)) is nn.Linear


def test_draw_weights_are_bit_equal_to_those_of_sampling(twin):
    """Float32: with x = a row of the identity the output is a column of W, exactly."""
    layer = bf.VariationalLinear(17, 9, bias=False)
    with bf.sampling(layer, seed=3):
        w = torch.cat([layer(row[None]) for row in torch.eye(17)]).T
    assert torch.equal(w, bf.draw(layer, 3).weight)


def test_draw_keeps_sharing(twin):
    layer = bf.VariationalLinear(3, 3)
    drawn = bf.draw(nn.Sequential(layer, nn.ReLU(), layer), 1)
    assert drawn[0] is drawn[2]


def test_freeze_keeps_the_current_noise(twin, x):
    model = network()
    torch.manual_seed(0)
    y = model(x)
    bf.freeze(model)
    assert torch.equal(model(x), y)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), y)
    with bf.sampling(model):
        assert not torch.equal(model(x), y)
    with bf.sampling(model, seed=1):
        pinned = model(x)
    assert torch.equal(model(x), y)
    with torch.no_grad():
        model[4].bias_mu += 1
    torch.testing.assert_close(model(x), y + 1)
    bf.unfreeze(model)
    assert not torch.equal(model(x), model(x))
    with bf.sampling(model, seed=1):
        torch.testing.assert_close(model(x), pinned + 1)
    fresh = network(seed=1)
    bf.freeze(fresh)  # without a draw to keep
    assert torch.equal(fresh(x), fresh(x))


def test_frozen_key_is_not_saved_and_moves(twin):
    model = network()
    names = set(model.state_dict())
    bf.freeze(model)
    assert set(model.state_dict()) == names
    assert copy.deepcopy(model).to("meta")[0].frozen_key.is_meta
    assert model.half()[0].frozen_key.dtype == torch.int64
    bf.freeze(model)
    network().load_state_dict(model.state_dict())


def test_frozen_noise_with_gradients(twin, x):
    """The weights still follow mu and rho."""
    layer = bf.VariationalLinear(3, 2, scale="exp", dtype=torch.float64)
    bf.freeze(layer)
    y = layer(x)
    y.sum().backward()
    assert layer.weight_rho.grad.abs().sum() > 0


def test_a_model_without_variational_layers(x):
    model = nn.Linear(3, 2).double()
    with bf.sampling(model, seed=1):
        y = model(x)
    torch.testing.assert_close(bf.mc_forward(model, x, 2), y.expand(2, 4, 2))
    torch.testing.assert_close(bf.draw(model, 1)(x), y)
