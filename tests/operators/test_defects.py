"""Defects that other libraries of Bayesian layers have been seen to have: each would fail a test here.

Conversion of models, local reparameterization, flipout and mixture priors are not in this library.
"""
from __future__ import annotations

import copy
import math

import pytest
import torch
from common import twin  # noqa: F401
from torch import nn

import bnn_fast as bf


def test_sigma_gradients_of_several_forwards_before_one_backward(twin):
    """A noise buffer refilled in place gives every forward the gradient of the last one's noise."""
    layer = bf.VariationalLinear(3, 2, bias=False, scale="exp", dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    outputs, weights = [], []
    for seed in range(3):
        with bf.sampling(layer, seed=seed):
            outputs.append(layer(x))
        weights.append(bf.draw(layer, seed).weight.detach())
    sum(outputs).sum().backward()
    # d/d rho of sum(x W^T) with W = mu + e^rho eps is (column sums of x) * (W - mu)
    expected = sum(x.sum(0) * (w - layer.weight_mu.detach()) for w in weights)
    torch.testing.assert_close(layer.weight_rho.grad, expected)


def test_kl_is_summed_over_weights_and_layers(twin):
    """Not averaged over the weights and then summed over the layers, nor averaged over the layers."""
    layers = [bf.VariationalLinear(3, 7), bf.VariationalLinear(7, 2)]
    separate = [bf.kl_divergence(layer) for layer in layers]
    model = nn.Sequential(*layers)
    torch.testing.assert_close(bf.kl_divergence(model), sum(separate))
    torch.testing.assert_close(bf.kl_divergence(model, "mean"), sum(separate) / (21 + 7 + 14 + 2))


def test_kl_is_of_the_posterior_to_the_prior(twin):
    """KL(q || p), not KL(p || q), and without an offset: 0 where the two are the same."""
    layer = bf.VariationalLinear(5, 4, scale="exp", init="zeros", prior=bf.Normal(0.0, 1.0))
    assert bf.kl_divergence(layer) == 0
    with torch.no_grad():
        layer.weight_rho.fill_(math.log(0.1)), layer.bias_rho.fill_(math.log(0.1))
    forward = 24 * (math.log(10) + 0.01 / 2 - 0.5)
    torch.testing.assert_close(bf.kl_divergence(layer).item(), forward)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("rho, log_sigma",
                         [(100.0, math.log(100.0)), (-120.0, -120.0), (-50.0, -50.0),
                          (120.0, math.log(120.0))])
def test_softplus_far_out(twin, kl, rho, log_sigma):
    """log(1 + exp(100)) overflows when written so, and log(softplus(-120)) is -inf."""
    layer = bf.VariationalLinear(3, 2, bias=False, kl=kl)
    with torch.no_grad():
        layer.weight_mu.zero_(), layer.weight_rho.fill_(rho)
    y = layer(torch.ones(1, 3))
    value = bf.kl_divergence(layer)
    (y.sum() + value).backward()
    assert y.isfinite().all() and value.isfinite() and all(p.grad.isfinite().all()
                                                           for p in layer.parameters())
    if kl == "analytic":
        sigma = math.exp(log_sigma)
        torch.testing.assert_close(value.item(), 6 * (-log_sigma + sigma ** 2 / 2 - 0.5), rtol=1e-6, atol=0)
        derivative = 1.0 if rho < 0 else 1 / rho  # of log sigma
        torch.testing.assert_close(torch.autograd.grad(bf.kl_divergence(layer), layer.weight_rho)[0],
                                   torch.full((2, 3), derivative * (sigma ** 2 - 1)), rtol=1e-6, atol=0)


def test_prior_buffers_are_saved():
    prior = bf.Normal(torch.randn(2, 3), torch.rand(2, 3) + 0.5)
    layer = bf.VariationalLinear(3, 2, prior=prior, bias_prior=bf.Normal())
    other = bf.VariationalLinear(3, 2, prior=bf.Normal(torch.zeros(2, 3), torch.ones(2, 3)),
                                 bias_prior=bf.Normal())
    other.load_state_dict(layer.state_dict())
    assert other.prior == prior


def test_no_bias_parameters_without_a_bias():
    assert [n for n, _ in bf.VariationalLinear(3, 2, bias=False).named_parameters()] == ["weight_mu",
                                                                                         "weight_rho"]


def test_parameters_are_registered_once_and_to_keeps_them_together(twin):
    layer = bf.VariationalLinear(3, 2)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(2, 3), layer)
    before = len(list(model.parameters()))
    model.double()
    assert len(list(model.parameters())) == before == 6 and model[0] is model[3]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (model(torch.randn(2, 3).double()).sum() + bf.kl_divergence(model)).backward()
    mu = layer.weight_mu.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight_mu, mu), "what is trained is what is used"
    with bf.sampling(layer, mean=True):
        torch.testing.assert_close(layer(torch.eye(3).double()) - layer.bias_mu, layer.weight_mu.T)


def test_frozen_noise_does_not_break_loading():
    layer, other = bf.VariationalLinear(3, 2), bf.VariationalLinear(3, 2)
    bf.freeze(layer)
    other.load_state_dict(layer.state_dict())
    layer.load_state_dict(bf.VariationalLinear(3, 2).state_dict())
    assert layer.frozen_key is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_noise_has_the_layers_dtype_and_device(twin, dtype):
    layer = bf.VariationalLinear(3, 2, dtype=dtype)
    assert layer(torch.ones(4, 3, dtype=dtype)).dtype == dtype
    assert layer._state.key.device == layer.weight_mu.device
    if twin != "plain":
        with torch.device("meta"):
            layer = bf.VariationalLinear(3, 2)
            assert layer(torch.ones(4, 3)).is_meta and layer._state.key.is_meta


def test_gradients_on_rows_of_zeros(twin):
    """The square root of a zero variance has an infinite derivative: here none is taken."""
    layer = bf.VariationalLinear(3, 2)
    x = torch.zeros(4, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_global_seed_is_not_set(twin):
    layer, x = bf.VariationalLinear(3, 2), torch.randn(4, 3)
    model = copy.deepcopy(layer)
    torch.manual_seed(3)
    seeds = set()
    for module in (layer, model):
        for _ in range(3):
            module(x)
            seeds.add(torch.initial_seed())
    assert seeds == {3}
    states = [torch.get_rng_state()]
    layer(x)
    states.append(torch.get_rng_state())
    assert not torch.equal(*states)


def test_repr_says_what_the_layer_is():
    text = repr(bf.VariationalLinear(3, 2, prior=bf.Normal(0.0, 0.5)))
    start = "VariationalLinear(in_features=3, out_features=2, bias=True, prior=Normal(loc=0.0, scale=0.5)"
    assert text.startswith(start)


@pytest.mark.parametrize("t", [1e-8, 1e-3, 1e6])
def test_the_prior_is_not_floored(twin, t):
    layer = bf.VariationalLinear(3, 2, bias=False, prior=bf.Normal(0.0, t), scale="exp")
    with torch.no_grad():
        layer.weight_mu.fill_(t), layer.weight_rho.fill_(math.log(t))
    kl = bf.kl_divergence(layer)
    kl.backward()
    torch.testing.assert_close(kl.item(), 6 * 0.5, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.weight_mu.grad, torch.full((2, 3), 1 / t), rtol=1e-4, atol=0)
