"""Draws by torch.vmap, and by calls where it has no rule; all against a call for each draw."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf

from .test_shared import by_single_calls, x  # noqa: F401


class Recurrent(nn.Module):
    def __init__(self, recurrence):
        super().__init__()
        self.layer, self.recurrence, self.calls = bf.VariationalLinear(3, 4), recurrence, 0

    def forward(self, x):
        self.calls += 1
        return self.recurrence(self.layer(x))[0]


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = bf.VariationalLinear(3, 4), 0

    def forward(self, x):
        self.calls += 1
        y = self.layer(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [lambda: Recurrent(nn.LSTM(4, 4)), lambda: Recurrent(nn.GRU(4, 4)), lambda: Recurrent(nn.RNN(4, 4)),
                                  lambda: Recurrent(bf.VariationalLSTM(4, 4)), Looking])
def test_what_vmap_has_no_rule_for_is_called_draw_by_draw(x, make, dtype):
    model, x = make().to(dtype), x.to(dtype)
    found = bf.mc_forward(model, x, 4, seed=2, vectorized="vmap")
    assert model.calls == 4
    expected = by_single_calls(model, x, 4, seed=2)
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(bf.predict(model, x, n_samples=4, seed=2, vectorized="vmap").samples, expected)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_vmap_calls_the_model_twice_and_has_the_gradients_of_the_loop(x, kl):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = bf.VariationalLinear(3, 4, kl=kl), bf.VariationalLinear(4, 1, kl=kl), 0

        def forward(self, x):
            self.calls += 1
            h = self.a(x).tanh()
            return self.b(h - h.mean(0))

    model, y, losses = Model().double(), torch.ones(7, 1, dtype=torch.float64), []
    for vectorized in (False, "vmap"):
        model.calls = 0
        elbo = bf.ELBO(model, bf.Gaussian(0.5), 20, seed=4, vectorized=vectorized)
        loss = elbo(x.double(), y, n_samples=6)
        losses.append((loss.detach(), elbo.kl, *torch.autograd.grad(loss, list(model.parameters()))))
    assert model.calls == 2
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_vmap_over_cells_and_factories(x, cell):
    class Model(Recurrent):
        def forward(self, x):
            self.calls += 1
            h = self.recurrence(self.layer(x))
            return torch.zeros(4) + (h[0] if isinstance(h, tuple) else h)

    model = Model(cell(4, 4))
    torch.testing.assert_close(bf.mc_forward(model, x, 4, seed=2, vectorized="vmap").detach(), by_single_calls(model, x, 4, seed=2))


def test_vectorized_is_checked(x):
    for call in (lambda v: bf.predict(nn.Sequential(bf.VariationalLinear(3, 2)), x, vectorized=v),
                 lambda v: bf.mc_forward(nn.Sequential(bf.VariationalLinear(3, 2)), x, 2, vectorized=v),
                 lambda v: bf.ELBO(nn.Sequential(bf.VariationalLinear(3, 2)), bf.Gaussian(), 2, vectorized=v)):
        with pytest.raises(ValueError, match="vectorized: expected one of True, False, 'vmap', given 'map'"):
            call("map")
