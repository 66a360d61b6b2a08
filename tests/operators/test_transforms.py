"""torch.func: gradients, per-sample ones, and vmap over inputs, parameters and keys."""
from __future__ import annotations


import pytest
import torch
from common import gradients, key_of, needs_extension, network, posterior, twin  # noqa: F401

import bnn_fast as bf
from bnn_fast import functional

KLS = ("analytic", "sampled")


def losses(model, x):
    return model(x).square().sum(), bf.kl_divergence(model)


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@needs_extension
def test_double_backward_raises_under_torch_func():
    mu, rho = posterior(2, 3, grad=False)

    def f(m):
        y, kl = functional.variational_linear(torch.ones(1, 3, dtype=torch.float64), m, rho, None, None,
                                              key_of(1))
        return y.square().sum() + kl

    def second(g):
        return torch.func.grad(lambda m: torch.func.grad(g)(m).square().sum())

    for g in (f, lambda m: functional.sample_normal(m, rho, key_of(1))[0].square().sum(),
              lambda m: functional.kl_normal(m, rho)):
        torch.func.grad(g)(mu)
        with pytest.raises(RuntimeError, match="double backward"):
            second(g)(mu)


def func_loss(model):
    """A pure function of the parameters."""
    def loss(parameters, x):
        y = torch.func.functional_call(model, parameters, (x,))
        return y.square().sum()

    return loss


def test_func_grad_agrees_with_backward(twin, x):
    model = network()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with bf.sampling(model, seed=4):
        found = torch.func.grad(func_loss(model))(parameters, x)
        model(x).square().sum().backward()
    torch.testing.assert_close(list(found.values()), gradients(model))


def test_func_grad_of_the_kl(twin):
    class WithKL(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            return self.model(x).square().sum() + bf.kl_divergence(self.model)

    model = WithKL()
    x = torch.randn(4, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with bf.sampling(model, seed=4):
        found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
        model(x).backward()
    torch.testing.assert_close(list(found.values()), gradients(model))
    assert all(layer._state.record.kl is None
               or not torch._C._functorch.is_gradtrackingtensor(layer._state.key)
               for layer in model.model[::2])


@pytest.mark.parametrize("n_samples", [1, 2])
def test_per_sample_gradients(twin, x, n_samples):
    """vmap(grad): x batched, the draw shared."""
    model = network()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    batch = torch.stack([x, x + 1, x - 1])
    with bf.sampling(model, seed=4, n_samples=n_samples):
        found = torch.func.vmap(torch.func.grad(func_loss(model)), in_dims=(None, 0))(parameters, batch)
        for i, one in enumerate(batch):
            model(one).square().sum().backward()
            torch.testing.assert_close([f[i] for f in found.values()], gradients(model))


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_inputs_shares_the_draw(twin, n_samples, dim):
    model = network()
    xs = torch.randn(4, 6, 3, dtype=torch.float64).movedim(0, dim)
    with bf.sampling(model, seed=4, n_samples=n_samples):
        found = torch.func.vmap(model, in_dims=dim)(xs)
        torch.testing.assert_close(found, torch.stack([model(one) for one in xs.unbind(dim)]))


def test_vmap_randomness(twin, x):
    model = network()
    xs = x.expand(4, 6, 3)
    torch.manual_seed(0)
    same = torch.func.vmap(model, randomness="same")(xs)
    different = torch.func.vmap(model, randomness="different")(xs)
    assert all(torch.equal(same[0], one) for one in same[1:])
    assert len({tuple(one.flatten().tolist()) for one in different}) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(model)(xs)


def test_vmap_over_stacked_parameters_with_gradients(twin, x):
    models = [network(seed=i) for i in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    stacked = {name: p.detach() for name, p in stacked.items()}
    with bf.sampling(models[0], seed=4):
        loss = func_loss(models[0])
        found = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, None))(stacked, x)[0]
        for i, model in enumerate(models):
            expected = torch.func.grad(loss)({name: p[i] for name, p in stacked.items()}, x)
            torch.testing.assert_close({name: f[i] for name, f in found.items()}, expected)


@pytest.mark.parametrize("kl", [*KLS, None])
def test_vmap_of_functional_with_different_keys(twin, kl):
    mu, rho = posterior(2, 3, grad=False)
    keys = torch.stack([key_of(1), key_of(2)])

    def f(key):
        w, value = functional.sample_normal(mu, rho, key, kl=kl)
        return w if value is None else (w, value)

    found, expected = torch.func.vmap(f)(keys), [f(key) for key in keys]
    torch.testing.assert_close(found,
                               torch.stack(expected) if kl is None
                               else tuple(map(torch.stack, zip(*expected))))


@needs_extension
def test_nothing_is_kept_under_transforms(x):
    model = network()
    torch.func.grad(func_loss(model))({name: p.detach() for name, p in model.named_parameters()}, x)
    assert model[0]._state.record is None and model[0]._state.key is None
