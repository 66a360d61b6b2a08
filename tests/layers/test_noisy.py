"""NoisyLinear: its noise, which stays until it is reset, beside torch's machinery and in models with variational layers."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from common import needs_extension, twin  # noqa: F401
from test_recipes import run_readme
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import bnn_fast as bf

KINDS = pytest.mark.parametrize("factorised", [True, False])


def rescaled(n: int, key: torch.Tensor, stream: int) -> torch.Tensor:
    e = bf.reference.standard_normal(key, 1, 1, n, stream=stream).flatten()
    return e.sign() * e.abs().sqrt()


def expected(layer: bf.NoisyLinear, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations 9 to 11 with the layer's noise."""
    key, (outputs, inputs) = layer.noise_key, layer.weight_mu.shape
    if layer.factorised:
        of_outputs, of_inputs = rescaled(outputs, key, 6), rescaled(inputs, key, 5)
        eps, eps_b = torch.outer(of_outputs, of_inputs), of_outputs
    else:
        eps = bf.reference.standard_normal(key, 1, outputs, inputs)[0]
        eps_b = bf.reference.standard_normal(key, 1, 1, outputs, stream=1).flatten()
    bias = None if layer.bias_mu is None else layer.bias_mu + layer.bias_sigma * eps_b
    return nn.functional.linear(x, layer.weight_mu + layer.weight_sigma * eps, bias)


@KINDS
@pytest.mark.parametrize("bias", [True, False])
def test_the_papers_equations_and_their_gradients(factorised, bias, twin):
    torch.manual_seed(0)
    layer, x = bf.NoisyLinear(5, 3, bias, 2.0, factorised), torch.randn(4, 5, requires_grad=True)
    layer.weight_sigma.data[0, :2] *= -1.0
    torch.testing.assert_close(layer(x), expected(layer, x))
    inputs = [x, *layer.parameters()]
    found, right = (torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x), expected(layer, x)))
    torch.testing.assert_close(found, right)


@KINDS
def test_the_noise_stays_until_it_is_reset(factorised, twin):
    torch.manual_seed(0)
    layer, x = bf.NoisyLinear(5, 3, factorised=factorised), torch.randn(4, 5)
    first = layer(x)
    assert torch.equal(layer(x), first) and torch.equal(layer(x[:2]), first[:2])
    layer.reset_noise()
    second = layer(x)
    assert not torch.equal(second, first) and torch.equal(layer(x), second)
    torch.manual_seed(7), layer.reset_noise()
    third = layer(x)
    torch.manual_seed(7), layer.reset_noise()
    assert torch.equal(layer(x), third)


@KINDS
def test_evaluation_uses_the_means(factorised, twin):
    layer, x = bf.NoisyLinear(5, 3, factorised=factorised).eval(), torch.randn(4, 5)
    means = nn.functional.linear(x, layer.weight_mu, layer.bias_mu)
    assert torch.equal(layer(x), means) and not torch.allclose(layer.train()(x), means)
    torch.testing.assert_close(layer.eval()(x.bfloat16()).float(), means, rtol=0.02, atol=0.02)


@KINDS
def test_a_reset_before_backward_leaves_the_graph_its_noise(factorised, twin):
    """As with two forwards, a reset between them, and one backward."""
    layer, x = bf.NoisyLinear(5, 3, factorised=factorised), torch.randn(4, 5)
    losses, right = [], []
    for _ in range(2):
        layer.reset_noise()
        losses.append(layer(x).square().sum())
        right.append(torch.autograd.grad(expected(layer, x).square().sum(), list(layer.parameters())))
    sum(losses).backward()
    for parameter, a, b in zip(layer.parameters(), *right):
        torch.testing.assert_close(parameter.grad, a + b)


def test_how_it_begins():
    torch.manual_seed(0)
    layer = bf.NoisyLinear(400, 300)
    assert layer.weight_mu.abs().max() <= 1 / 20 and layer.weight_mu.std().item() == pytest.approx(1 / 20 / 3 ** 0.5, rel=0.02)
    assert (layer.weight_sigma == 0.5 / 20).all() and (layer.bias_sigma == 0.5 / 20).all() and layer.bias_mu.abs().max() <= 1 / 20
    layer = bf.NoisyLinear(300, 400, factorised=False)
    assert layer.weight_mu.abs().max() <= 0.1 and layer.weight_mu.std().item() == pytest.approx(0.1 / 3 ** 0.5, rel=0.02)
    assert (layer.weight_sigma == 0.017).all() and (layer.bias_sigma == 0.017).all()
    assert (bf.NoisyLinear(4, 3, sigma_0=0.8).weight_sigma == 0.4).all()
    assert (bf.NoisyLinear(4, 3, std_init=0.8).bias_sigma == 0.4).all()
    assert torch.equal(bf.NoisyLinear(4, 3, sigma_0=0.2, factorised=False).weight_sigma, torch.full((3, 4), 0.2))
    before = layer.weight_mu.clone(), layer.noise_key.clone()
    layer.reset_parameters()
    assert not torch.equal(before[0], layer.weight_mu) and not torch.equal(before[1], layer.noise_key)
    for inputs, outputs in ((0, 3), (3, 0)):
        assert bf.NoisyLinear(inputs, outputs)(torch.ones(2, inputs)).shape == (2, outputs)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(in_features=2.5), TypeError, "in_features: expected an integer, given float 2.5"),
    (dict(out_features=-1), ValueError, "out_features: expected at least 0, given -1"),
    (dict(bias="no"), TypeError, "bias: expected True or False"),
    (dict(factorised=None), TypeError, "factorised: expected True or False"),
    (dict(sigma_0=0.0), ValueError, "sigma_0: expected a positive finite number, given 0"),
    (dict(std_init="small"), TypeError, "std_init: expected a positive number or None, given str"),
    (dict(sigma_0=0.5, std_init=0.5), ValueError, "std_init: expected nothing beside sigma_0"),
])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        bf.NoisyLinear(**{"in_features": 5, "out_features": 3, **arguments})


@KINDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x, error, message", [
    (torch.ones(4, 6), ValueError, r"x: expected a last dimension of 5 \(in_features\), given a float32 tensor \[4, 6\]"),
    (torch.ones(4, 5).double(), TypeError, "x: expected torch.float32 as the parameters have"),
    (torch.ones(4, 5, device="meta"), ValueError, "x: expected to be on cpu as the parameters are"),
    ([1.0] * 5, TypeError, "x: expected a tensor"),
])
def test_bad_input(x, error, message, training, factorised, twin):
    layer = bf.NoisyLinear(5, 3, factorised=factorised).train(training)
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.parametrize("module", [bf.functional, bf.reference])
@pytest.mark.parametrize("changed, error, message", [
    (dict(weight_sigma=torch.ones(3, 4)), ValueError, r"weight_sigma: expected shape \[3, 5\] as weight_mu has"),
    (dict(weight_mu=torch.ones(5)), ValueError, "weight_sigma|weight_mu: expected"),
    (dict(weight_mu=1.0), TypeError, "weight_mu: expected a float32"),
    (dict(bias_sigma=None), ValueError, "bias_sigma: expected bias_mu and bias_sigma together or neither"),
    (dict(bias_sigma=torch.ones(4)), ValueError, r"bias_sigma: expected shape \[3\]"),
    (dict(bias_mu=torch.ones(4)), ValueError, r"bias_mu: expected \[3\]"),
    (dict(key=torch.ones(2)), TypeError, "key: expected an int64 tensor"),
])
def test_bad_arguments_of_the_function(module, changed, error, message):
    given = dict(x=torch.ones(2, 5), weight_mu=torch.ones(3, 5), weight_sigma=torch.ones(3, 5), bias_mu=torch.ones(3),
                 bias_sigma=torch.ones(3), key=torch.tensor([1, 2]))
    with pytest.raises(error, match=message):
        module.noisy_linear(**(given | changed))


def test_offsets_of_the_function_are_checked():
    mu = torch.ones(3, 5)
    for name in ("row_offset", "column_offset"):
        with pytest.raises(ValueError, match=f"{name}: expected 0 to"):
            bf.functional.noisy_linear(torch.ones(2, 5), mu, mu, None, None, torch.tensor([1, 2]), **{name: -1})


@KINDS
def test_copies_states_devices_and_types(factorised, tmp_path):
    torch.manual_seed(0)
    layer, x = bf.NoisyLinear(5, 3, factorised=factorised), torch.randn(4, 5)
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y)
        copied.reset_noise()
        assert not torch.equal(copied(x), y) and torch.equal(layer(x), y)
    assert set(layer.state_dict()) == {"weight_mu", "weight_sigma", "bias_mu", "bias_sigma"}
    other = bf.NoisyLinear(5, 3, factorised=factorised)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer.eval()(x)) and not torch.equal(other.train()(x), y)
    other.noise_key.copy_(layer.noise_key)
    assert torch.equal(other(x), y)
    wide = copy.deepcopy(other).double()
    assert wide.noise_key.dtype == torch.int64
    torch.testing.assert_close(wide(x.double()).float(), y, rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(copy.deepcopy(other).to(dtype)(x.to(dtype)).float(), y, rtol=0.1, atol=0.05)
        with torch.autocast("cpu", dtype):
            found = other(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), y, rtol=0.05, atol=0.05)
    meta = bf.NoisyLinear(5, 3, factorised=factorised, device="meta")
    assert meta(torch.empty(4, 5, device="meta")).shape == (4, 3)
    made = meta.to_empty(device="cpu")
    made.reset_parameters()
    assert made(x).isfinite().all() and made.noise_key.device.type == "cpu"
    again = eval(repr(layer), {"NoisyLinear": bf.NoisyLinear})
    assert repr(again) == repr(layer) and [p.shape for p in again.parameters()] == [p.shape for p in layer.parameters()]


def test_a_state_of_torchrl_loads():
    """Its layer of this name has these parameters, and its noise beside them."""
    state = {"0.weight_mu": torch.randn(3, 5), "0.weight_sigma": torch.rand(3, 5), "0.weight_epsilon": torch.randn(3, 5),
             "0.bias_mu": torch.randn(3), "0.bias_sigma": torch.rand(3), "0.bias_epsilon": torch.randn(3)}
    model = nn.Sequential(bf.NoisyLinear(5, 3, std_init=0.1), nn.ReLU())
    model.load_state_dict(state)
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    with pytest.raises(RuntimeError, match="Unexpected.*weight_rho"):
        model.load_state_dict({**state, "0.weight_rho": torch.ones(3, 5)})


@KINDS
def test_second_derivatives_and_torch_func(factorised):
    layer, x = bf.NoisyLinear(5, 3, factorised=factorised, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"bnn_fast.plain\(\)"):
        (gradient,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
        gradient.sum().backward()
    with bf.plain():
        assert torch.autograd.gradgradcheck(layer, x)
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, row.unsqueeze(0)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach())
    whole = torch.autograd.grad(layer(x.detach()).square().sum(), list(layer.parameters()))
    for name, right in zip(parameters, whole):
        torch.testing.assert_close(each[name].sum(0), right)
    assert torch.equal(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), layer(x))


@needs_extension
@KINDS
def test_compiled_steps(factorised):
    torch._dynamo.reset()
    layer, x = bf.NoisyLinear(5, 3, factorised=factorised), torch.randn(4, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: layer(x).square().sum(), backend=counter, fullgraph=True)
    for _ in range(3):
        layer.reset_noise()
        found = torch.autograd.grad(compiled(x), list(layer.parameters()))
        torch.testing.assert_close(found, torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    assert counter.frame_count == 1
    if not factorised:
        return

    def with_reset(x):
        layer.reset_noise()
        return layer(x)

    compiled = torch.compile(with_reset, backend="aot_eager", fullgraph=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second) and torch.equal(layer(x), second)


def test_in_a_model_with_variational_layers(twin):
    """It has no KL and no draws: what is for variational layers passes it by."""
    torch.manual_seed(0)
    noisy, x = bf.NoisyLinear(4, 3), torch.randn(6, 5)
    model = nn.Sequential(bf.VariationalLinear(5, 4), nn.ReLU(), noisy)
    torch.testing.assert_close(bf.kl_divergence(model), bf.kl_divergence(model[0]))
    assert set(bf.signal_to_noise(model)) == set(bf.posterior(model)) == {"0.weight", "0.bias"}
    before = {name: p.clone() for name, p in noisy.named_parameters()}
    assert bf.prune(copy.deepcopy(model), 1.0) == 24
    bf.set_prior(model, bf.Normal(0.0, 2.0))
    hidden = bf.mc_forward(model[:2], x, 4, seed=1)
    draws = bf.mc_forward(model, x, 4, seed=1)
    torch.testing.assert_close(draws, noisy(hidden))            # the draws of the first layer, one noise for all
    assert torch.equal(draws, bf.mc_forward(model, x, 4, seed=1))
    found = bf.predict(model, x, n_samples=4, seed=1)           # in evaluation mode
    torch.testing.assert_close(found.mean, nn.functional.linear(hidden, noisy.weight_mu, noisy.bias_mu).mean(0).detach())
    assert model.training and noisy.training
    with bf.sampling(model, mean=True):
        torch.testing.assert_close(model(x), noisy(torch.relu(nn.functional.linear(x, model[0].weight_mu, model[0].bias_mu))))
    drawn = bf.draw(model, seed=1)
    assert type(drawn[2]) is bf.NoisyLinear
    torch.testing.assert_close(drawn(x), draws[0])
    bf.freeze(model)
    frozen = model(x)
    noisy.reset_noise()
    assert not torch.equal(model(x), frozen)
    bf.unfreeze(model)
    elbo = bf.ELBO(model, bf.Gaussian(0.1), n_data=6)
    elbo(x, torch.zeros(6, 3)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in noisy.parameters())
    assert all(torch.equal(p, before[name]) for name, p in noisy.named_parameters())
    with pytest.warns(UserWarning, match="found none in NoisyLinear"):
        assert bf.kl_divergence(noisy) == 0


def test_readmes_example_learns_which_arm_pays():
    """A bandit whose better arm depends on the sign of the context: noise alone explores, and falls where it no longer pays."""
    torch.manual_seed(0)
    found = run_readme("Exploration noise")
    network, x = found["network"].eval(), torch.linspace(-1, 1, 101).unsqueeze(1)
    best = (x[:, 0] > 0).long()
    right = network(x).argmax(1) == best
    assert right[x[:, 0].abs() > 0.1].float().mean() > 0.95
    assert sum(m.weight_sigma.abs().mean() for m in network if isinstance(m, bf.NoisyLinear)) > 0
