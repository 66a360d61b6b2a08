"""kl_divergence: values, reductions, sharing, and when the KL of a call is handed over."""
from __future__ import annotations

import copy
import threading

import pytest
import torch
from common import gradients, key_of, needs_extension, network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast import reference
from bnn_fast.operators import autograd

SCALES = tuple(bf.checks.SCALES)


def exact(layer):
    """The layer's KL by torch.distributions, elementwise, as kl_divergence(..., "none") has it."""
    parts = {}
    for pair in layer.pairs():
        sigma = layer.weight_sigma if pair.name == "weight" else layer.bias_sigma
        prior = torch.distributions.Normal(torch.as_tensor(pair.prior.loc).to(sigma),
                                           torch.as_tensor(pair.prior.scale).to(sigma))
        parts[pair.name] = torch.distributions.kl_divergence(torch.distributions.Normal(pair.mu, sigma),
                                                             prior)
    return parts


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64)


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often a KL is computed on its own."""
    calls = []
    original = autograd.kl_call
    monkeypatch.setattr(autograd, "kl_call", lambda arguments: calls.append(arguments) or original(arguments))
    return calls


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("after_forward", [True, False])
def test_values_and_reductions(twin, x, scale, after_forward):
    model = network(scale=scale, prior=bf.Normal(0.2, 0.7))
    if after_forward:
        model(x)
    parts = {f"{name}.{part}": value for name,
             layer in model.named_children() if isinstance(layer, bf.VariationalLinear)
             for part, value in exact(layer).items()}
    total = sum(value.sum() for value in parts.values())
    torch.testing.assert_close(bf.kl_divergence(model), total)
    torch.testing.assert_close(bf.kl_divergence(model, "mean"),
                               total / sum(v.numel() for v in parts.values()))
    found = bf.kl_divergence(model, "none")
    assert list(found) == ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]
    torch.testing.assert_close(found, parts)
    torch.testing.assert_close(bf.kl_divergence(model[0], "none"), exact(model[0]))
    with pytest.raises(ValueError, match="reduction: expected one of 'sum', 'mean', 'none', given 'avg'"):
        bf.kl_divergence(model, "avg")


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("after_forward", [True, False])
def test_gradients_of_every_reduction(twin, x, reduction, after_forward):
    model = network()
    parts = [value for layer in model[::2] for value in exact(layer).values()]
    total = sum(value.sum() for value in parts)
    (total / (sum(v.numel() for v in parts) if reduction == "mean" else 1)).backward()
    expected = gradients(model)
    if after_forward:
        model(x)
    kl = bf.kl_divergence(model, reduction)
    (sum(value.sum() for value in kl.values()) if reduction == "none" else kl).backward()
    torch.testing.assert_close(gradients(model), expected)


def test_tensor_priors(twin, x):
    layer = bf.VariationalLinear(3, 2, prior=bf.Normal(torch.randn(2, 3), torch.rand(2, 3) + 0.5),
                                 bias_prior=bf.Normal(0.0, torch.rand(2) + 0.5), dtype=torch.float64)
    expected = sum(value.sum() for value in exact(layer).values())
    torch.testing.assert_close(bf.kl_divergence(layer), expected)
    layer(x)
    torch.testing.assert_close(bf.kl_divergence(layer), expected)


def test_pruned_weights_are_not_counted(twin):
    layer = bf.VariationalLinear(3, 2)
    with torch.no_grad():
        layer.weight_rho[0] = -torch.inf
    kl = bf.kl_divergence(layer, "none")
    assert (kl["weight"][0] == 0).all() and (kl["weight"][1] != 0).all()
    torch.testing.assert_close(bf.kl_divergence(layer, "mean"), (kl["weight"].sum() + kl["bias"].sum()) / 5)
    with torch.no_grad():
        layer.weight_rho.fill_(-torch.inf), layer.bias_rho.fill_(-torch.inf)
    assert bf.kl_divergence(layer, "mean") == 0


def test_a_model_without_variational_layers():
    assert bf.kl_divergence(nn.Linear(3, 2)) == 0 and bf.kl_divergence(nn.ReLU()) == 0
    assert bf.kl_divergence(nn.Linear(3, 2), "mean") == 0
    assert bf.kl_divergence(nn.Linear(3, 2), "none") == {}


def test_shared_parameters_count_once(twin):
    a, b = bf.VariationalLinear(4, 4), bf.VariationalLinear(4, 4)
    alone = bf.kl_divergence(a), bf.kl_divergence(b, "none")["bias"].sum()
    b.weight_mu, b.weight_rho = a.weight_mu, a.weight_rho
    model = nn.Sequential(a, nn.ReLU(), a, b)
    names = ["0.weight", "0.bias", "3.bias"]
    for _ in range(2):
        torch.testing.assert_close(bf.kl_divergence(model), alone[0] + alone[1])
        assert list(bf.kl_divergence(model, "none")) == names
        torch.testing.assert_close(bf.kl_divergence(model, "mean"), (alone[0] + alone[1]) / (16 + 4 + 4))
        model(torch.randn(2, 4))  # and now with the calls' own
    bf.kl_divergence(model).backward()
    found = a.weight_mu.grad
    a.weight_mu.grad = None
    bf.kl_divergence(a).backward()
    torch.testing.assert_close(found, a.weight_mu.grad)


@needs_extension
def test_the_call_hands_its_kl_over(x, kernel_calls):
    model = network()
    model(x)
    with torch.no_grad():
        model(x)
        before = bf.kl_divergence(model)  # without gradients it is computed, and what there is stays
    assert len(kernel_calls) == 5
    first = bf.kl_divergence(model)
    assert len(kernel_calls) == 5
    torch.testing.assert_close(first, before)
    # Once: a later read must not depend on whether a change in between could be seen.
    torch.testing.assert_close(bf.kl_divergence(model), first)
    assert len(kernel_calls) == 10
    first.backward()
    assert model[0].weight_rho.grad is not None


@needs_extension
@pytest.mark.parametrize("change",
                         ["step", "in place", "data", "new parameter", "load", "thread", "copy", "none"])
def test_it_is_not_handed_over_for_other_parameters(x, kernel_calls, change):
    model = network()
    if change != "none":
        model(x)
    if change == "step":
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    elif change == "in place":
        with torch.no_grad():
            model[0].weight_mu.add_(1), model[2].weight_rho.add_(1), model[4].bias_rho.add_(1)
    elif change == "data":
        for p in model.parameters():
            p.data = p.data + 1
    elif change == "new parameter":
        for layer in model[::2]:
            layer.weight_mu = nn.Parameter(layer.weight_mu.detach() + 1)
    elif change == "load":
        model.load_state_dict(network(seed=1).state_dict())
    elif change == "copy":
        model = copy.deepcopy(model)
    values = []
    if change == "thread":
        thread = threading.Thread(target=lambda: values.append(bf.kl_divergence(model)))
        thread.start()
        thread.join()
    else:
        values.append(bf.kl_divergence(model))
    assert len(kernel_calls) == 5
    torch.testing.assert_close(values[0], sum(v.sum() for layer in model[::2] for v in exact(layer).values()))


def test_no_grad_calls_leave_nothing(twin, x):
    model = network(kl="sampled")
    with torch.no_grad():
        model(x)
    assert all(layer._state.record is None for layer in model[::2])
    a, b = bf.kl_divergence(model), bf.kl_divergence(model)
    assert a != b, "nothing to hand over: each reading draws"


def test_writing_into_the_result_does_no_harm(twin, x):
    model = network()
    model(x)
    with torch.no_grad():
        kl = bf.kl_divergence(model[0])
        before = kl.clone()
        kl.mul_(0)
        assert torch.equal(bf.kl_divergence(model[0]), before)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_sampled_kl_is_that_of_the_latest_call(twin, x, n_samples):
    """The latest one with gradients on, the mean over its draws: what the reference gives."""
    layer = bf.VariationalLinear(3, 2, kl="sampled", scale="exp", prior=bf.Normal(0.1, 0.6),
                                 dtype=torch.float64)
    with bf.sampling(layer, n_samples=n_samples, seed=3):
        layer(x.repeat(n_samples, 1))
        key = layer._state.mode.key
        expected = sum(reference.sample_normal(pair.mu, pair.rho, key, prior=pair.prior, scale="exp",
                                               kl="sampled",
                                               n_samples=n_samples, stream=pair.stream)[1]
                                               for pair in layer.pairs())
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(bf.kl_divergence(layer), expected)
    elements = bf.kl_divergence(layer, "none")
    torch.testing.assert_close(sum(v.sum() for v in elements.values()), expected)
    expected.backward()
    expected_gradients = gradients(layer)
    bf.kl_divergence(layer).backward()
    torch.testing.assert_close(gradients(layer), expected_gradients)
    sum(v.sum() for v in elements.values()).backward()
    torch.testing.assert_close(gradients(layer), expected_gradients)
    with torch.no_grad():
        layer.weight_mu.add_(1.0)
    torch.manual_seed(0)
    fresh = bf.kl_divergence(layer)
    torch.manual_seed(1)
    assert fresh != bf.kl_divergence(layer), "the parameters changed: drawn anew"
    with bf.sampling(layer, seed=3):
        assert torch.equal(bf.kl_divergence(layer), bf.kl_divergence(layer))


def test_sampled_kl_of_partly_shared_layers(twin):
    a, b = bf.VariationalLinear(4, 4, kl="sampled"), bf.VariationalLinear(4, 4, kl="sampled")
    b.weight_mu, b.weight_rho = a.weight_mu, a.weight_rho
    model = nn.Sequential(a, b)
    model(torch.randn(2, 4))
    expected = bf.kl_divergence(a) + bf.kl_divergence(b, "none")["bias"].sum()
    torch.testing.assert_close(bf.kl_divergence(model), expected)


def test_sampled_kl_has_the_analytic_one_as_its_mean(twin):
    layer = bf.VariationalLinear(20, 20, kl="sampled", init="blundell")
    with torch.no_grad(), bf.sampling(layer, n_samples=400, seed=1):
        sampled = bf.kl_divergence(layer)
    layer.kl = "analytic"
    torch.testing.assert_close(sampled, bf.kl_divergence(layer), rtol=2e-3, atol=0)


def test_mixed_dtypes_and_frozen_parameters(twin):
    model = nn.Sequential(bf.VariationalLinear(3, 2), bf.VariationalLinear(2, 2, dtype=torch.float64),
                          bf.VariationalLinear(2, 2).bfloat16())
    kl = bf.kl_divergence(model)
    kl.backward()
    assert kl.dtype == torch.float64 and all(p.grad.dtype == p.dtype for p in model.parameters())
    assert not bf.kl_divergence(model.requires_grad_(False)).requires_grad
    model[0](torch.randn(1, 3))
    assert not bf.kl_divergence(model).requires_grad
    model.requires_grad_(True)
    assert bf.kl_divergence(model).requires_grad
