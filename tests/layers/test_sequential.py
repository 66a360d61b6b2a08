"""Sequential: chains of narrow layers run as one operator, with the keys, noise, KL and results of the layers one by one; and what ends
a chain."""
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

from .chains import net, node_names, step, twins

pytestmark = needs_nodes


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


@pytest.mark.parametrize("prior_tensors", [False, True])  # which are none of what the nodes' one step does
def test_a_kl_is_handed_over_only_whole(prior_tensors):
    fused, plain = twins()
    x = torch.randn(4, 3)
    for model in (fused, plain) if prior_tensors else ():
        model[0].prior = bf.Normal(torch.ones(8, 3), 2.0)
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
