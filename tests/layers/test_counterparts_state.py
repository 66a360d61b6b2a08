"""Counterparts of torch's modules: construction, copies, saving, empty batches, initialisation, and what they refuse."""
from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch
from torch import nn

import bnn_fast as bf

from .counterparts import CASES, Tied

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every
def test_copies_and_saving(case):
    torch.manual_seed(0)
    layer, inputs = case.make(init_sigma=0.2), case.inputs()
    layer(*inputs)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), case.make(init_sigma=0.3)]
    copies[2].load_state_dict(layer.state_dict())
    for other in copies:
        assert repr(other) == repr(layer) or other is copies[2]
        for a, b in zip((*layer.parameters(), *layer.buffers()), (*other.parameters(), *other.buffers())):
            assert a is not b and torch.equal(a, b)
        with bf.sampling(layer.eval(), seed=1), bf.sampling(other.eval(), seed=1):
            assert torch.equal(layer(*inputs), other(*inputs))
    with pytest.raises(ValueError, match="meaning: expected parameters of a layer with scale='exp'"):
        case.make(scale="exp").load_state_dict(layer.state_dict())


@every
def test_meta_device_and_reset(case):
    layer = case.make(device="meta", init_sigma=0.3)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers())) and "device='meta'" in repr(layer)
    assert bf.draw(layer, seed=0) is not None
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(3)
    layer.reset_parameters()
    for pair in layer.pairs():
        torch.testing.assert_close(getattr(layer, f"{pair.name}_sigma"), torch.full_like(pair.mu, 0.3))
    if hasattr(layer, "running_mean") and layer.running_mean is not None:
        assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all() and (layer.running_var == 1).all()


@every
def test_empty_batch(case):
    layer = case.make().eval()
    for n_samples in (1, 3):
        with bf.sampling(layer, n_samples, seed=1):
            try:
                expected = case.ordinary().eval()(*case.inputs(batch=0))
            except RuntimeError:
                pytest.skip("torch's module takes no empty batch")
            assert layer(*case.inputs(batch=0)).shape == expected.shape


@every
def test_names_and_words(case):
    layer, module = case.make(), case.ordinary()
    names = {name for name, _ in module.named_parameters()}
    assert {name.replace(".", "_") for name in names} == set(layer.posterior())
    assert set(bf.posterior(nn.Sequential(layer))) == {f"0.{pair.name}" for pair in layer.pairs()}
    assert (repr(module) in repr(layer).replace("\n  ", "\n") if isinstance(layer, bf.Variational)
            else repr(layer).startswith(f"Variational{repr(module)[:-1]}, prior=Normal(loc=0.0, scale=1.0), scale='softplus'"))
    assert bf.prune(layer, 0.5) > 0 and len(bf.signal_to_noise(layer)) == len(layer.pairs())


@pytest.mark.parametrize("init", ["default", "blundell", "tutorial", "zeros", "adv_bnn"])
def test_gains_begin_with_one(init):
    for layer in (bf.VariationalLayerNorm(50, init=init), bf.VariationalBatchNorm2d(50, init=init),
                  bf.VariationalGroupNorm(2, 50, init=init)):
        assert (layer.weight_mu == 1).all() and (layer.weight_sigma > 0).all() and layer.bias_mu.abs().mean() < 0.9
        with torch.no_grad():
            layer.weight_mu.zero_()
        layer.reset_parameters()
        assert (layer.weight_mu == 1).all()


def test_means_begin_scaled_by_the_inputs_of_one_output():
    for layer, fan_in in ((bf.VariationalConv2d(32, 64, 3, groups=2), 16 * 9), (bf.VariationalBilinear(20, 30, 40), 600),
                          (bf.VariationalConvTranspose2d(64, 32, 4, stride=2, groups=2), 32 * 16 // 4)):
        assert layer.weight_mu.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
        assert all(pair.fan_in == fan_in for pair in layer.pairs())
    # the size of activations stays as it is, through convolutions that halve and double
    torch.manual_seed(0)
    model = nn.Sequential(*(m for i in range(3) for m in (
        bf.VariationalConv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
        bf.VariationalConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.ReLU())))
    y = model(torch.randn(4, 32, 32, 32))
    assert 0.3 < y.square().mean() < 3


def test_settings_may_be_changed():
    layer, x = bf.VariationalConv2d(2, 2, 3), torch.randn(1, 2, 7, 7)
    layer.stride = (2, 2)
    assert bf.draw(layer, seed=0)(x).shape == layer(x).shape == (1, 2, 3, 3)
    norm = bf.VariationalBatchNorm2d(2)
    norm.track_running_stats = False    # from now on
    assert not bf.draw(norm, seed=0).track_running_stats
    norm(x + 1)
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


def test_the_two_ways_of_convolving_samples(monkeypatch):
    layer, x = bf.VariationalConv2d(2, 4, 3, groups=2, dtype=torch.float64), torch.randn(6, 2, 5, 5, dtype=torch.float64)
    calls, convolve = [], type(layer).operator
    monkeypatch.setattr(type(layer), "operator", staticmethod(lambda *given: calls.append(given[-1]) or convolve(*given)))
    found = []
    for most in (2 * 2 * 25, 2 * 2 * 25 - 1):
        monkeypatch.setattr("bnn_fast.layers.convolution._TOGETHER", most)
        with bf.sampling(layer, 3, seed=1):
            found.append(layer(x))
    assert calls == [6, 2, 2, 2]     # groups of each call
    torch.testing.assert_close(*found)


def test_transposed_convolutions_take_the_size_of_the_output():
    layer, x = bf.VariationalConvTranspose2d(2, 3, 3, stride=2), torch.randn(4, 2, 5, 5)
    for size in ([12, 11], torch.Size([4, 3, 12, 11])):
        with bf.sampling(layer, seed=1):
            assert torch.equal(layer(x, output_size=size), bf.draw(layer, 1)(x, size))
        with bf.sampling(layer, 2, seed=1):
            assert layer(x, size).shape == (4, 3, 12, 11)
    with pytest.raises(ValueError, match="requested an output size of"):
        layer(x, [20, 20])


def test_vmap():
    layer, x = bf.VariationalConv2d(2, 3, 3), torch.randn(4, 6, 2, 5, 5)
    with bf.sampling(layer, seed=1):
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(images) for images in x]))


def test_memory_formats():
    layer, x = bf.VariationalConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    with bf.sampling(layer, seed=1):
        expected = layer(x)
        layer.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


def test_variational_takes_over_the_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    before = copy.deepcopy(module)
    layer, x = bf.Variational(module, init_sigma=0.1, prior=bf.Normal(0.0, 2.0), bias_prior=bf.Normal(0.0, 3.0)), torch.randn(5, 3)
    assert torch.equal(layer.get_parameter("0_weight_mu"), module[0].weight) and layer.init_sigma == 0.1
    assert layer.bias_prior == bf.Normal(0.0, 3.0) and layer.pairs()[2].prior == bf.Normal(0.0, 2.0)  # 1.weight
    frozen = [name for name, p in layer.named_parameters() if not p.requires_grad]
    assert frozen == ["0_bias_mu", "0_bias_rho"] and not bf.draw(layer)[0].bias.requires_grad
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    (layer(x).square().sum() + bf.kl_divergence(layer)).backward()
    optimiser.step()
    for a, b in zip(module.state_dict().values(), before.state_dict().values()):
        assert torch.equal(a, b)
    assert layer.module[1].num_batches_tracked == 1 and all(p is None for m in layer.module for p in m._parameters.values())
    with torch.no_grad():
        layer.get_parameter("0_weight_rho").fill_(-9)
    mean = layer.get_parameter("0_weight_mu").clone()
    layer.reset_parameters()
    assert torch.equal(layer.get_parameter("0_weight_mu"), mean)
    torch.testing.assert_close(getattr(layer, "0_weight_sigma"), torch.full((4, 3), 0.1))


def test_variational_has_tied_parameters_once_and_names_of_its_own():
    layer = bf.Variational(Tied())
    assert [pair.name for pair in layer.pairs()] == ["first_weight", "first_bias", "norm_weight", "norm_bias"]
    drawn = bf.draw(layer, seed=1)
    assert drawn.first.weight is drawn.second.weight
    clash = nn.Module()
    clash.register_parameter("a_weight", nn.Parameter(torch.zeros(1)))
    clash.a = nn.Linear(1, 1, bias=False)
    clash.bias_net = nn.Linear(1, 1, bias=False)
    clash.forward = lambda x: x
    layer = bf.Variational(clash, bias_prior=bf.Normal(0.0, 5.0))
    assert [pair.name for pair in layer.pairs()] == ["a_weight", "a_weight_", "bias_net_weight"]
    assert layer.pairs()[2].prior == bf.Normal()


def test_variational_in_several_threads():
    layer, x = bf.Variational(nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)), init_sigma=0.5), torch.randn(5, 3)
    expected = [bf.draw(layer, seed=s)(x) for s in range(4)]
    wrong = []

    def run(seed):
        with bf.sampling(layer, seed=seed):
            wrong.extend(seed for _ in range(200) if not torch.equal(layer(x), expected[seed]))

    threads = [threading.Thread(target=run, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
