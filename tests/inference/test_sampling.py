"""sampling, mc_forward, draw, freeze and unfreeze."""
from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from common import network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_a_seed_pins_the_network(twin, x):
    model = network()
    with bf.sampling(model, seed=1):
        first = model(x)
        assert torch.equal(first, model(x))
        parts = [layer(torch.ones(1, layer.in_features).double())
                 for layer in reversed(model[::2])]  # in any order of calls
    with bf.sampling(model, seed=1):
        assert torch.equal(first, model(x))
        for layer, part in zip(model[::2], reversed(parts)):
            assert torch.equal(layer(torch.ones(1, layer.in_features).double()), part)
    with bf.sampling(model, seed=2):
        assert not torch.equal(first, model(x))
    with bf.sampling(model):
        assert not torch.equal(model(x), model(x))


def test_layers_draw_independently(twin):
    model = nn.Sequential(bf.VariationalLinear(4, 4), bf.VariationalLinear(4, 4))
    model[1].load_state_dict(model[0].state_dict())
    with bf.sampling(model, seed=1):
        assert not torch.equal(model[0](torch.eye(4)), model[1](torch.eye(4)))


def test_seed_of_a_layer_is_sha256_of_seed_and_name(x):
    model = network()
    with bf.sampling(model, seed=12, first_sample=3):
        key = model[2]._state.mode.key
    expected = int.from_bytes(hashlib.sha256(b"12:2").digest()[:8], "little", signed=True)
    assert key.tolist() == [expected, 3]


class Wrapper(nn.Module):
    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


@pytest.mark.parametrize("wrap", [lambda m: Wrapper("module", m), lambda m: torch.compile(m, backend="eager"),
                                  lambda m: Wrapper("module", Wrapper("_orig_mod", m))])
def test_wrappers_do_not_change_the_draw(x, wrap):
    model = network()
    with bf.sampling(model, seed=1):
        expected = model(x)
    wrapped = wrap(model)
    with bf.sampling(wrapped, seed=1):
        assert torch.equal(wrapped(x), expected)
    inside = nn.Sequential(Wrapper("_orig_mod", model[0]), *list(model)[1:])
    with bf.sampling(inside, seed=1):
        assert torch.equal(inside(x), expected)


def test_a_module_called_like_a_wrapper_has_a_draw_of_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = bf.VariationalLinear(4, 4)
            self.module = nn.Module()
            self.module.fc = bf.VariationalLinear(4, 4)

    model = Model()
    model.module.fc.load_state_dict(model.fc.state_dict())
    with bf.sampling(model, seed=1):
        assert not torch.equal(model.fc(torch.eye(4)), model.module.fc(torch.eye(4)))


def test_shared_layers_and_shared_parameters_have_one_draw(twin):
    a, b = bf.VariationalLinear(4, 4), bf.VariationalLinear(4, 4)
    b.weight_mu, b.weight_rho, b.bias_mu, b.bias_rho = a.weight_mu, a.weight_rho, a.bias_mu, a.bias_rho
    model = nn.Sequential(a, b, a)
    x = torch.eye(4)
    with bf.sampling(model, seed=1):
        assert torch.equal(a(x), b(x))
    seen = []
    b.register_forward_hook(lambda *_: seen.append((a(x), b.forward(x))))
    bf.mc_forward(model, x, 1)
    assert torch.equal(*seen[0])
    bf.freeze(model)
    assert torch.equal(a(x), b.forward(x))


@pytest.mark.parametrize("n_samples", [1, 3])
def test_mc_forward(twin, x, n_samples):
    model = network()
    y = bf.mc_forward(model, x, n_samples, seed=4)
    assert y.shape == (n_samples, 4, 2)
    for s in range(n_samples):
        with bf.sampling(model, seed=4, first_sample=s):
            torch.testing.assert_close(y[s], model(x))
    with bf.sampling(model, n_samples=n_samples, seed=4):
        torch.testing.assert_close(model(x.repeat(n_samples, 1)), y.flatten(0, 1))
    assert torch.equal(y, bf.mc_forward(model, x, n_samples, seed=4))
    a, b = bf.mc_forward(model, x, n_samples), bf.mc_forward(model, x, n_samples)
    assert not torch.equal(a, b)


def test_mc_forward_draws_differ_and_each_holds_for_a_whole_call(twin):
    layer = bf.VariationalLinear(3, 3, bias=False, init="zeros")
    twice = nn.Sequential(layer, layer)
    eye = torch.eye(3)
    assert len({one.sum().item() for one in bf.mc_forward(twice, eye, 5)}) == 5
    with bf.sampling(twice, n_samples=5, seed=1):
        w = layer(eye.repeat(5, 1)).reshape(5, 3, 3)
        torch.testing.assert_close(twice(eye.repeat(5, 1)).reshape(5, 3, 3), w @ w)
    torch.manual_seed(0)
    both = bf.mc_forward(twice, eye, 1)[0]
    torch.manual_seed(0)
    one = bf.mc_forward(layer, eye, 1)[0]
    torch.testing.assert_close(both, one @ one)


def test_mc_forward_through_ordinary_modules(twin):
    """Everything whose dimension 0 is the batch works between the layers."""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.batch_norm = nn.Conv2d(1, 2,
                                                              3), nn.LayerNorm(8), nn.BatchNorm1d(8).eval()
            self.hidden, self.out = bf.VariationalLinear(8, 8), bf.VariationalLinear(8, 2)

        def forward(self, x):
            h = self.conv(x).flatten(1)
            return self.out(torch.relu(self.batch_norm(self.norm(self.hidden(h)))))

    model, x = Model(), torch.randn(5, 1, 4, 4)
    y = bf.mc_forward(model, x, 3, seed=2)
    for s in range(3):
        with bf.sampling(model, seed=2, first_sample=s):
            torch.testing.assert_close(y[s], model(x))


def test_mc_forward_with_no_rows_and_more_dimensions(twin, x):
    model = network()
    assert bf.mc_forward(model, x[:0], 3).shape == (3, 0, 2)
    y = bf.mc_forward(model, x.reshape(2, 2, 3), 3, seed=1)
    torch.testing.assert_close(y, bf.mc_forward(model, x, 3, seed=1).reshape(3, 2, 2, 2))


@pytest.mark.parametrize("call, error, message", [
    (lambda m, x: bf.mc_forward(m, x, 0), ValueError, "n_samples: expected at least 1, given 0"),
    (lambda m, x: bf.mc_forward(m, [1], 2), TypeError, r"x: expected a tensor \[B, ...\], given list"),
    (lambda m, x: bf.mc_forward(nn.Sequential(m, nn.Flatten(0)), x, 2), ValueError,
     r"model: expected an output with 2 \* 4 rows"),
    (lambda m, x: bf.sampling(m, seed=1.0), TypeError, "seed: expected an integer or None, given float 1.0"),
    (lambda m, x: bf.sampling(m, n_samples=-1), ValueError, "n_samples: expected at least 1, given -1"),
    (lambda m, x: bf.sampling(m, first_sample=-1), ValueError, "first_sample: expected 0 to"),
    (lambda m, x: bf.sampling(m, first_sample=None), TypeError, "first_sample: expected an integer"),
    (lambda m, x: bf.sampling(m, n_samples=2, mean=True), ValueError,
     "mean: expected neither n_samples nor seed"),
    (lambda m, x: bf.draw(m, 1.0), TypeError, "seed: expected an integer"),
    (lambda m, x: bf.draw(m, 1, first_sample=-1), ValueError, "first_sample: expected 0 to"),
    (lambda m, x: bf.draw(m, 1, mean=True), ValueError, "mean: expected neither n_samples nor seed"),
    (lambda m, x: bf.draw(m, first_sample=1, mean=True), ValueError, "mean: expected no first_sample"),
    (lambda m, x: bf.sampling(m, pinned=True, mean=True), ValueError, "mean: expected neither n_samples nor seed"),
])
def test_bad_arguments(x, call, error, message):
    with pytest.raises(error, match=message):
        call(network(), x)


def test_means(twin, x):
    model = network().eval()
    with bf.sampling(model, mean=True):
        h = torch.relu(x @ model[0].weight_mu.T + model[0].bias_mu)
        h = torch.tanh(h @ model[2].weight_mu.T)
        torch.testing.assert_close(model(x), h @ model[4].weight_mu.T + model[4].bias_mu)
        model(x).sum().backward()
    assert model[0].weight_mu.grad is not None and model[0].weight_rho.grad is None


def test_contexts_nest_and_restore(twin, x):
    model = network()
    with bf.sampling(model, seed=1):
        outer = model(x)
    with bf.sampling(model, mean=True):
        mean = model(x)
    with bf.sampling(model, seed=1):
        with bf.sampling(model, mean=True):
            assert torch.equal(model(x), mean)
            with bf.sampling(model[0], seed=9):  # covers that layer only
                assert not torch.equal(model(x), mean)
                assert torch.equal(model[2](torch.ones(1, 5).double()),
                                   torch.ones(1, 5).double() @ model[2].weight_mu.T)
            assert torch.equal(model(x), mean)
        assert torch.equal(model(x), outer)
        with pytest.raises(RuntimeError, match="boom"), bf.sampling(model, mean=True):
            raise RuntimeError("boom")
        assert torch.equal(model(x), outer)
    assert not torch.equal(model(x), model(x))
    context = bf.sampling(model, seed=1)
    with context, bf.sampling(model), context:  # the same one again
        assert torch.equal(model(x), outer)
    assert not torch.equal(model(x), model(x))


def test_a_context_entered_again_restores_what_it_found_each_time(twin, x):
    model = network()
    expected = []
    for seed in (1, 2):
        with bf.sampling(model, seed=seed):
            expected.append(model(x))
    with bf.sampling(model, mean=True):
        expected.append(model(x))
    first, again, mean = expected
    context = bf.sampling(model, seed=2)
    with bf.sampling(model, seed=1):
        with context:
            with bf.sampling(model, mean=True):
                with context:
                    assert torch.equal(model(x), again)
                assert torch.equal(model(x), mean)
                with pytest.raises(RuntimeError, match="boom"), context:
                    raise RuntimeError("boom")
                assert torch.equal(model(x), mean)
            assert torch.equal(model(x), again)
        assert torch.equal(model(x), first)
    assert not torch.equal(model(x), model(x))


def test_a_context_holds_for_its_thread(twin, x):
    model = network()
    outputs, barrier = {}, threading.Barrier(2)

    def work(seed):
        with bf.sampling(model, seed=seed):
            barrier.wait()
            outputs[seed] = [model(x) for _ in range(20)]
            barrier.wait()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        with bf.sampling(model, seed=seed):
            expected = model(x)
        assert all(torch.equal(y, expected) for y in outputs[seed])
    with bf.sampling(model, seed=1):
        other = []
        thread = threading.Thread(target=lambda: other.extend([model(x), model(x)]))
        thread.start()
        thread.join()
        assert not torch.equal(*other)
