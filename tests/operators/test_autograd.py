"""Gradients through the layers: orders of backward, freed graphs, checkpointing, torch.func."""
from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from common import gradients, key_of, needs_extension, network, posterior, twin  # noqa: F401
from torch.utils.checkpoint import checkpoint

import bnn_fast as bf
from bnn_fast import reference

KLS = ("analytic", "sampled")


def losses(model, x):
    return model(x).square().sum(), bf.kl_divergence(model)


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kl", KLS)
def test_every_order_of_backward_gives_the_same_gradient(twin, x, kl):
    """Three layers with activations between: neither backward may walk the other's graph."""
    model = network(kl=kl)
    orders = {
        "sum": lambda nll, kl: (nll + kl).backward(),
        "nll, kl": lambda nll, kl: (nll.backward(), kl.backward()),
        "kl, nll": lambda nll, kl: (kl.backward(), nll.backward()),
        "list": lambda nll, kl: torch.autograd.backward([kl, nll]),
        "kept": lambda nll,
        kl: ((nll + kl).backward(retain_graph=True), model.zero_grad(), (nll + kl).backward()),
        "grad": lambda nll, kl: [setattr(p, "grad", g) for p, g in
                                 zip(model.parameters(),
                                     torch.autograd.grad(nll + kl, list(model.parameters())))],
    }
    results = {}
    for name, backward in orders.items():
        with bf.sampling(model, seed=3):
            backward(*losses(model, x))
        results[name] = gradients(model)
    for name, result in results.items():
        torch.testing.assert_close(result, results["sum"], msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kl", KLS)
def test_gradient_is_the_reference_twins(twin, x, kl):
    """The whole model, written out with the reference and autograd."""
    model = network(kl=kl, scale="exp", prior=bf.Normal(0.2, 0.5))
    keys = [key_of(i) for i in range(3)]
    layers = [model[0], model[2], model[4]]
    h, total = x, 0
    for layer, key, after in zip(layers, keys, (torch.relu, torch.tanh, lambda h: h)):
        h, value = reference.variational_linear(h, layer.weight_mu, layer.weight_rho, layer.bias_mu,
                                                layer.bias_rho, key,
                                                prior=layer.prior, scale="exp", kl=kl)
        h, total = after(h), total + value
    (h.square().sum() + total / 7).backward()
    expected = gradients(model)
    for layer, key in zip(layers, keys):
        layer.frozen_key = key
    nll, value = losses(model, x)
    torch.testing.assert_close(value, total)
    (nll + value / 7).backward()
    torch.testing.assert_close(gradients(model), expected)


def test_reading_the_kl_twice_counts_twice(twin, x):
    model = network()
    with bf.sampling(model, seed=1):
        nll, kl = losses(model, x)
        (nll + 2 * kl).backward()
        expected = gradients(model)
        nll, kl = losses(model, x)
        (nll + kl + bf.kl_divergence(model)).backward()
        torch.testing.assert_close(gradients(model), expected)
        nll, kl = losses(model, x)
        (nll + kl).backward()
        bf.kl_divergence(model).backward()
        torch.testing.assert_close(gradients(model), expected)


def test_several_forwards_before_one_backward(twin, x):
    """Each call has its own noise: nothing refilled in place is read by an earlier call's backward."""
    model = network()
    separate = []
    for seed in (1, 2, 3):
        with bf.sampling(model, seed=seed):
            model(x).square().sum().backward()
        separate.append(gradients(model))
    total = 0
    for seed in (1, 2, 3):
        with bf.sampling(model, seed=seed):
            total = total + model(x).square().sum()
    total.backward()
    torch.testing.assert_close(gradients(model), [sum(g) for g in zip(*separate)])


def test_layer_called_twice_in_a_forward(twin):
    layer = bf.VariationalLinear(3, 3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    with bf.sampling(layer, seed=2):
        (layer(torch.tanh(layer(x))).sum() + bf.kl_divergence(layer)).backward()
    found = gradients(layer)
    sigma = torch.nn.functional.softplus
    with bf.sampling(layer, seed=2):
        w0, b0 = bf.draw(layer, 2).weight.detach(), bf.draw(layer, 2).bias.detach()
    noise_w = (w0 - layer.weight_mu) / sigma(layer.weight_rho)
    noise_b = (b0 - layer.bias_mu) / sigma(layer.bias_rho)
    w = layer.weight_mu + sigma(layer.weight_rho) * noise_w.detach()
    b = layer.bias_mu + sigma(layer.bias_rho) * noise_b.detach()
    y = torch.tanh(x @ w.T + b) @ w.T + b
    kl = reference.kl_normal(layer.weight_mu, layer.weight_rho) + reference.kl_normal(layer.bias_mu,
                                                                                      layer.bias_rho)
    (y.sum() + kl).backward()
    torch.testing.assert_close(found, gradients(layer))


@needs_extension
def test_input_is_freed_by_backward_and_a_second_backward_raises(x):
    model = network()
    nll = model(x).square().sum()
    nll.backward()
    with pytest.raises(RuntimeError, match="second time"):
        nll.backward()
    layer = bf.VariationalLinear(3, 2, dtype=torch.float64)
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@needs_extension
def test_in_place_change_between_forward_and_backward_raises():
    layer = bf.VariationalLinear(3, 2)
    x = torch.randn(4, 3)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, kl = layer(x), bf.kl_divergence(layer)
    with torch.no_grad():
        layer.bias_rho.add_(1)
    for loss in (y.sum(), kl):
        with pytest.raises(RuntimeError,
                           match="^bias_rho, needed for the gradient, has been modified by an inplace"):
            loss.backward()


def test_deepcopy_between_forward_and_backward(twin, x):
    model = network()
    with bf.sampling(model, seed=1):
        nll, kl = losses(model, x)
        twin_model = copy.deepcopy(model)
        (nll + kl).backward()
        expected = gradients(model)
    with bf.sampling(twin_model, seed=1):
        sum(losses(twin_model, x)).backward()
    torch.testing.assert_close(gradients(twin_model), expected)


def test_only_some_parameters_need_gradients(twin, x):
    model = network()
    with bf.sampling(model, seed=1):
        sum(losses(model, x)).backward()
        expected = gradients(model)
        model[0].weight_mu.requires_grad_(False)
        model[2].requires_grad_(False)
        sum(losses(model, x)).backward()
    for (name, p), g in zip(model.named_parameters(), expected):
        assert (p.grad is None) == (not p.requires_grad), name
        if p.requires_grad:
            torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("context", ["none", "left", "inside"])
def test_checkpointing_repeats_the_draw(twin, x, reentrant, kl, context):
    """Also after `with sampling(...)` was left, when recomputation has only the layer's memory to go by."""
    x = x.requires_grad_()

    def step(run, forget=False):
        model = network(kl=kl)
        torch.manual_seed(11)
        with bf.sampling(model, n_samples=2) if context != "none" else contextlib.nullcontext():
            y = run(model, x)
            if forget:
                for layer in model[::2]:
                    layer._state.record = None
            torch.manual_seed(12)
            loss = y.square().sum() + bf.kl_divergence(model)
            if context == "inside":
                loss.backward()
        if context != "inside":
            loss.backward()
        return y.detach(), gradients(model)

    # Reentrant checkpointing has no gradients on in its first pass, so that a sampled KL is of a draw of its
    # own.
    y, expected = step(lambda m, x: m(x), forget=reentrant)
    y2, found = step(lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert torch.equal(y, y2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_leaves_the_kl_alone(twin, x, reentrant, kl):
    model = network(kl=kl)
    model(x)  # with reentrant checkpointing the latest call with gradients on
    y = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    before, keys = bf.kl_divergence(model), [layer._state.key for layer in model[::2]]
    y.sum().backward()
    torch.testing.assert_close(bf.kl_divergence(model), before)
    assert all(layer._state.key is key for layer, key in zip(model[::2], keys))


@needs_extension
def test_saved_tensor_hooks_see_the_input(x):
    packed = []
    layer = bf.VariationalLinear(3, 2, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1,
                                                  lambda i: packed[i]):
        y = layer(x)
    assert any(t.shape == x.shape and torch.equal(t, x) for t in packed)
    assert not any(t.shape == layer.weight_mu.shape for t in packed)
    y.sum().backward()
    assert layer.weight_mu.grad is not None


@pytest.mark.parametrize("loss", [lambda layer, x: layer(x).square().sum() + bf.kl_divergence(layer),
                                  lambda layer, x: bf.kl_divergence(layer)], ids=["layer and KL", "KL"])
def test_double_backward_raises_or_is_right(twin, x, loss):
    """Never silent zeros. In plain PyTorch second derivatives are those that finite differences give."""
    layer = bf.VariationalLinear(3, 2, dtype=torch.float64)
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]

    def squared_gradient():
        grads = torch.autograd.grad(loss(layer, x), leaves, create_graph=True, materialize_grads=True)
        return sum(g.square().sum() for g in grads)

    with bf.sampling(layer, seed=1):
        if twin != "plain":
            with pytest.raises(RuntimeError, match="double backward"):
                squared_gradient().backward()
            return
        found = torch.autograd.grad(squared_gradient(), leaves, materialize_grads=True)
        for leaf, gradient in zip(leaves, found):
            step, values = torch.randn_like(leaf) * 1e-5, []
            for sign in (1, -1):
                leaf.data.add_(sign * step)
                values.append(squared_gradient().item())
                leaf.data.sub_(sign * step)
            expected = (gradient * step).sum().item()
            assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=1e-6)
        assert found[1].abs().sum() > 0 and found[2].abs().sum() > 0


def test_backward_in_other_threads(twin, x):
    """Losses made here, differentiated in threads of their own."""
    model = network()
    with bf.sampling(model, seed=1):
        sum(losses(model, x)).backward()
        expected = gradients(model)
        pairs = [losses(model, x) for _ in range(4)]
    threads = [threading.Thread(target=lambda nll=nll, kl=kl: (nll + kl).backward()) for nll, kl in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(gradients(model), [4 * g for g in expected])
