"""Whole models and their chains: ELBO, predict and mc_forward, fuse, VariationalMLP, explain."""
from __future__ import annotations

import pytest
import torch
from common import needs_nodes
from torch import nn

import bnn_fast as bf
from bnn_fast.inference import blocks
from bnn_fast.layers import chain

from .chains import net, node_names

pytestmark = needs_nodes


@pytest.mark.parametrize("kind", [nn.Sequential, bf.Sequential])
@pytest.mark.parametrize("n_samples", [1, 4])
def test_elbo_predict_and_mc_forward(kind, n_samples):
    """Of a plain nn.Sequential too; against a module that hides what it runs."""
    class Hidden(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            for module in self.model:
                x = module(x)
            return x

    model = net(kind=kind)
    hidden, x, y = Hidden(model), torch.randn(9, 3), torch.randn(9, 2)
    found = []
    for m in (model, hidden):  # by manual_seed, as a layer's own seed depends on its qualified name
        elbo = bf.ELBO(m, bf.Gaussian(0.3), 100)
        torch.manual_seed(8)
        loss = elbo(x, y, n_samples=n_samples)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
        torch.manual_seed(8)
        found[-1].append(bf.mc_forward(m, x, n_samples).detach())
        torch.manual_seed(8)
        found[-1].append(bf.predict(m, x, n_samples=2 * n_samples).mean)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    drawn = bf.draw(model, 3, first_sample=2)
    samples = bf.predict(model, x, n_samples=4, seed=3).samples
    torch.testing.assert_close(samples[2], drawn(x).detach())


def test_fuse_changes_what_fits_in_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow = nn.Sequential(bf.VariationalLinear(3, 4), nn.ReLU(), bf.VariationalLinear(4, 1))
            self.wide = nn.Sequential(bf.VariationalLinear(300, 300), bf.VariationalLinear(300, 1))
            self.fixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    model = Model()
    before, names = model.narrow, list(model.state_dict())
    assert bf.fuse(model) is model and model.narrow is before
    assert [type(m) for m in model.children()] == [bf.Sequential, nn.Sequential, nn.Sequential]
    assert list(model.state_dict()) == names and len(node_names(model.narrow(torch.randn(2, 3)))) == 1
    whole = nn.Sequential(*net())
    assert type(bf.fuse(whole)) is bf.Sequential
    with pytest.raises(TypeError, match="model: expected an nn.Module"):
        bf.fuse(None)


def test_variational_mlp():
    model = bf.VariationalMLP([3, 8, 8, 2], "gelu_tanh", prior=bf.Normal(0.0, 0.5), bias=False)
    assert [type(m).__name__ for m in model] == ["VariationalLinear", "GELU"] * 2 + ["VariationalLinear"]
    assert model[0].prior == bf.Normal(0.0, 0.5) and model[0].bias_mu is None and model[1].approximate == "tanh"
    assert len(node_names(model(torch.randn(2, 3)))) == 1
    assert isinstance(bf.VariationalMLP((2, 3, 1), nn.Hardswish)[1], nn.Hardswish)
    for arguments, error, message in (
            (([3],), ValueError, "sizes: expected at least 2"), ((3,), TypeError, "sizes: expected a list or tuple"),
            (([3, 1.5],), TypeError, r"sizes\[1\]: expected an integer"), (([3, 1], "swish"), ValueError, "activation: expected one of"),
            (([3, 1], lambda: 3), TypeError, "activation: expected a name or what makes a module")):
        with pytest.raises(error, match=message):
            bf.VariationalMLP(*arguments)


def test_explain(capsys):
    model = bf.Sequential(bf.VariationalLinear(300, 40), nn.ReLU(), bf.VariationalLinear(40, 8), nn.ReLU(), bf.VariationalLinear(8, 1))
    x = torch.randn(16, 300)
    state = torch.get_rng_state()
    bf.explain(model, x)
    assert torch.equal(state, torch.get_rng_state())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "operator", "regime", "device", "why"]
    told = {line.split()[0]: line.split()[1:4] for line in lines[1:]}
    assert told == {"0": ["variational_linear", "fused", "cpu"], "2": ["variational_chain", "-", "cpu"], "4": ["variational_chain", "-", "cpu"]}
    with bf.plain():
        bf.explain(model, torch.randn(16, 300))
    out = capsys.readouterr().out
    assert "plain PyTorch" in out and "bnn_fast.plain()" in out
    bf.explain(nn.Sequential(*model), torch.randn(16, 300))
    assert "after fuse(model)" in capsys.readouterr().out
    with pytest.raises(TypeError, match="model: expected an nn.Module"):
        bf.explain(None, torch.ones(1))


def test_wide_layers_are_a_chain_without_gradients_and_with_rows_enough(monkeypatch):
    model, ran = bf.Sequential(bf.VariationalLinear(20, 200), nn.ReLU(), bf.VariationalLinear(200, 3)), []
    run = chain._run_chain
    monkeypatch.setattr(chain, "_run_chain", lambda *a: ran.append(run(*a)) or ran[-1])
    for rows, chained in ((chain.FEWEST_ROWS, True), (chain.FEWEST_ROWS - 1, False)):
        x, drawn = torch.randn(rows, 20), bf.draw(model, 3)
        ran.clear()
        with torch.no_grad(), bf.sampling(model, seed=3):
            torch.testing.assert_close(model(x), drawn(x).detach(), rtol=1e-4, atol=1e-5)
        assert [y is not None for y in ran] == [chained]
    assert len(node_names(model(torch.randn(40, 20)))) == 2
    samples = bf.predict(model, torch.randn(50, 20), n_samples=3, seed=4)
    assert samples.samples.shape == (3, 50, 3)


def test_predict_calls_as_many_draws_at_once_as_a_chain_has_room_for(monkeypatch):
    """Not where the layers run one by one, whose results would be repeated between them."""
    drawn, repeated = [], blocks.repeated
    monkeypatch.setattr(blocks, "repeated", lambda model, x, n, *rest: drawn.append(n) or repeated(model, x, n, *rest))
    narrow = nn.Sequential(bf.VariationalLinear(2, 8), nn.ReLU(), bf.VariationalLinear(8, 4))
    wide = nn.Sequential(bf.VariationalLinear(2, 200), nn.ReLU(), bf.VariationalLinear(200, 4))
    for model, rows, options, expected in (
            (narrow, 10, {}, 6553), (narrow, 10, {"batch_size": 50}, 5), (wide, 40, {}, 1638), (wide, 20, {}, 4096 // 20)):
        drawn.clear()
        bf.predict(model, torch.randn(rows, 2), n_samples=7000, seed=1, progress=False, **options)
        assert max(drawn) == expected
