"""Sequential, fuse and VariationalMLP: chains of narrow layers run as one operator, with the keys, noise, KL and results of the layers
one by one; and what ends a chain."""
from __future__ import annotations

import copy
import threading

import pytest
import torch
from common import needs_nodes
from torch import nn
from torch.nn.modules import module as torch_module

import bnn_fast as bf
from bnn_fast.layers.chain import parts
from bnn_fast.operators import autograd

pytestmark = needs_nodes


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


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_that_of_the_layers_one_by_one(kl, dtype):
    fused, plain = twins(kl=kl, dtype=dtype)
    x = torch.randn(7, 3, dtype=dtype)
    assert len(node_names(fused(x))) == 1 and len(node_names(plain(x))) == 2
    one, many = step(fused, x), step(plain, x)
    wide = dtype == torch.float64
    assert torch.equal(one[1].float(), many[1].float())
    for a, b in zip(one, many):
        torch.testing.assert_close(a, b, rtol=1e-10 if wide else 1e-4, atol=1e-12 if wide else 1e-5)


def test_state_dict_names_and_copies_are_those_of_nn_sequential():
    fused, plain = twins()
    assert list(fused.state_dict()) == list(plain.state_dict()) and isinstance(fused, nn.Sequential)
    plain.load_state_dict(fused.state_dict())
    assert type(copy.deepcopy(fused)) is bf.Sequential and type(fused[:2]) is bf.Sequential


@pytest.mark.parametrize("given", ["prior tensors", "pruned", "frozen", "seeded", "samples", "mean"])
def test_whatever_layers_may_have(given):
    fused, plain = twins()
    x = torch.randn(8, 3)
    for model in (fused, plain):
        if given == "prior tensors":
            model[0].prior = bf.Normal(torch.ones(8, 3), torch.full((8, 3), 2.0))
        if given == "pruned":
            bf.prune(model, 0.4)
        if given == "frozen":
            torch.manual_seed(3)
            bf.freeze(model)
    context = {"seeded": dict(seed=4), "samples": dict(n_samples=4), "mean": dict(mean=True)}.get(given)
    results = []
    for model in (fused, plain):
        if context is None:
            results.append(step(model, x))
        else:
            with bf.sampling(model, **context):
                results.append(step(model, x))
                assert len(node_names(model(x))) == (1 if model is fused else 0 if given == "mean" else 2)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][1], results[1][1])


def test_a_kl_is_handed_over_only_whole():
    fused, plain = twins()
    x = torch.randn(4, 3)
    torch.manual_seed(0), fused(x)
    part = bf.kl_divergence(fused[0])
    assert torch.equal(part, bf.kl_divergence(plain[0]))
    calls = fused[0]._state.record.kl
    assert calls is not None and calls[0] is fused[4]._state.record.kl[0]
    whole = bf.kl_divergence(fused)
    assert fused[0]._state.record.kl is None and fused[4]._state.record.kl is None
    assert torch.equal(whole, bf.kl_divergence(plain))
    (part + whole).backward()
    assert all(p.grad is not None for n, p in fused.named_parameters() if "mu" in n or "rho" in n)


@pytest.mark.parametrize("kl_first", [True, False])
def test_backward_passes_in_either_order(kl_first):
    fused, plain = twins()
    x, grads = torch.randn(4, 3), []
    for model in (fused, plain):
        torch.manual_seed(2)
        y, kl = model(x).square().sum(), bf.kl_divergence(model)
        for loss in (kl, y) if kl_first else (y, kl):
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def hook_on_a_layer(model):
    model[4].register_forward_hook(lambda *_: None)


def hook_on_an_activation(model):
    model[1].register_forward_pre_hook(lambda *_: None)


def own_forward(model):
    model[2].forward = lambda x: nn.functional.linear(x, model[2].weight, model[2].bias)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model[2])


def another_module(model):
    model[3] = nn.Dropout(0.0)


def another_estimator(model):
    model[4].estimator = "local"


def another_scale(model):
    model[4].scale = "exp"


def too_wide(model):
    model[2], model[4] = nn.Linear(8, 129), bf.VariationalLinear(129, 2)


def shared_parameters(model):
    model[2], model[4] = nn.Linear(8, 3), model[0]


@pytest.mark.parametrize("change, draws", [
    (None, 1), (hook_on_a_layer, 2), (hook_on_an_activation, 2), (own_forward, 2), (parametrized, 2), (another_module, 2),
    (another_estimator, 2), (another_scale, 2), (too_wide, 2), (shared_parameters, 2)])
def test_what_ends_a_chain(change, draws):
    fused = net()
    if change is not None:
        change(fused)
    plain = nn.Sequential(*fused)
    x = torch.randn(6, 3)
    with bf.sampling(fused, seed=5):
        y = fused(x)
    assert len(node_names(y)) == draws
    with bf.sampling(plain, seed=5):
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)


def test_global_hooks_see_every_layer():
    fused, seen = net(), []
    handle = torch_module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fused(torch.randn(2, 3))
    finally:
        handle.remove()
    assert seen == [bf.VariationalLinear, nn.Tanh, nn.Linear, nn.Tanh, bf.VariationalLinear, bf.Sequential]


def test_chains_around_another_module():
    inner = nn.Sequential(bf.VariationalLinear(3, 4), nn.ReLU())
    model = bf.Sequential(inner, bf.VariationalLinear(4, 4), nn.LayerNorm(4), bf.VariationalLinear(4, 4), nn.SiLU(), nn.Linear(4, 1))
    assert [isinstance(part, list) for part in parts(model)] == [True, False, True]
    assert len(node_names(model(torch.randn(5, 3)))) == 2


@pytest.mark.parametrize("around", ["autocast", "plain", "compile", "checkpoint", "grad transform", "without nodes"])
def test_layers_run_one_by_one_where_something_is_to_see_them(around, monkeypatch):
    fused, plain = twins()
    x = torch.randn(5, 3)

    def y_of(model):
        with bf.sampling(model, seed=3):
            if around == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return model(x)
            if around == "plain":
                with bf.plain():
                    return model(x)
            if around == "compile":
                return torch.compile(model, backend="eager")(x)
            if around == "checkpoint":
                return torch.utils.checkpoint.checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
            if around == "grad transform":
                return torch.func.grad(lambda x: model(x).sum())(x)
            return model(x)

    if around == "without nodes":
        monkeypatch.setattr(autograd, "nodes", None)
    a, b = y_of(fused), y_of(plain)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b)
    if around == "checkpoint":
        a.sum().backward()


def test_wrong_inputs_raise_what_the_layer_raises():
    fused = net()
    for x, error in ((torch.randn(2, 4), ValueError), (None, TypeError), ([1.0], TypeError), (torch.randn(2, 3).double(), TypeError)):
        with pytest.raises(error, match="x: expected"):
            fused(x)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 5, 3)])
def test_other_shapes(shape):
    fused, plain = twins()
    x = torch.randn(shape)
    for seed in (1, 2):
        with bf.sampling(fused, seed=seed), bf.sampling(plain, seed=seed):
            torch.testing.assert_close(fused(x), plain(x))


def test_without_gradients_keys_are_the_same():
    fused, plain = twins()
    x, found = torch.randn(5, 3), []
    for model in (fused, plain):
        torch.manual_seed(6)
        with torch.no_grad():
            found += [model(x), model(x)]
        bf.freeze(model)
        found.append(model(x))
    torch.testing.assert_close(found[0], found[3])
    torch.testing.assert_close(found[1], found[4])
    torch.testing.assert_close(found[1], found[2])
    torch.testing.assert_close(found[4], found[5])


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


def test_threads_have_their_own_modes():
    fused, x, found = net(), torch.randn(4, 3), {}

    def run(seed):
        with bf.sampling(fused, seed=seed):
            found[seed] = fused(x).detach()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, y in found.items():
        torch.testing.assert_close(y, bf.draw(fused, seed)(x).detach())


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
