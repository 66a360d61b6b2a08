"""A layer of one's own, made of the two things that README tells of: everything else has to work."""
from __future__ import annotations

import copy
import io

import pytest
import torch
from common import twin  # noqa: F401
from test_recipes import run_readme
from torch import nn

import bnn_fast as bf

Gabor = run_readme("A layer of your own")["Gabor"]


def network(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Gabor(3, 8, init_sigma=0.1, **options), nn.Tanh(), bf.VariationalLinear(8, 2, **options))


def test_it_is_fifteen_lines():
    from test_recipes import README

    block = README.split("class Gabor")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_its_draws_are_those_of_the_operator(twin):
    layer, x = Gabor(3, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    with bf.sampling(layer, seed=4):
        y = layer(x)
        key = layer.drawing_mode().key
    weights = {pair.name: bf.functional.sample_normal(pair.mu, pair.rho, key, kl=None, stream=stream)[0]
               for stream, pair in enumerate(layer.pairs(), start=16)}
    assert torch.equal(y, weights["amplitude"] * torch.sin(x @ weights["frequency"].T) + weights["bias"])
    assert not torch.equal(layer(x), layer(x))
    with bf.sampling(layer, mean=True):
        expected = layer.amplitude_mu * torch.sin(x @ layer.frequency_mu.T) + layer.bias_mu
        assert torch.equal(layer(x), expected)


def test_samples_predictions_and_draws_agree(twin):
    model, x = network(), torch.randn(6, 3)
    many = bf.mc_forward(model, x, 5, seed=1)
    for s in range(5):
        torch.testing.assert_close(bf.draw(model, 1, first_sample=s)(x), many[s])
    torch.testing.assert_close(bf.predict(model, x, n_samples=5, seed=1).samples, many)
    torch.testing.assert_close(bf.mc_forward(model, x, 5, seed=1, vectorized=False), many)
    bf.freeze(model)
    assert torch.equal(model(x), model(x))
    bf.unfreeze(model)
    with pytest.raises(ValueError, match="dimension 0 to be the batch repeated n_samples=4 times"), bf.sampling(model[0], 4):
        model[0](x)


def test_a_draw_is_an_ordinary_module_that_trains_copies_and_saves():
    model, x = network(), torch.randn(6, 3)
    drawn = bf.draw(model, seed=2)
    assert {name for name, _ in drawn.named_parameters()} == {"0.frequency", "0.amplitude", "0.bias", "2.weight", "2.bias"}
    assert bf.kl_divergence(drawn) == 0 and not any(isinstance(m, bf.VariationalLayer) for m in drawn.modules())
    copied = copy.deepcopy(drawn).double()
    assert copied(x.double()).dtype == torch.float64
    drawn(x).sum().backward()
    assert all(p.grad is not None for p in drawn.parameters())
    with torch.no_grad():
        drawn[0].bias.add_(1.0)
    assert not torch.equal(drawn(x), copied.float()(x))
    other = bf.draw(model, seed=3)
    other.load_state_dict(drawn.state_dict())
    assert torch.equal(other(x), drawn(x))
    buffer = io.BytesIO()
    torch.save(bf.draw(nn.Sequential(bf.VariationalLinear(3, 2)), seed=0), buffer)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_kl_and_gradients(kl, twin):
    model, x, y = network(kl=kl), torch.randn(6, 3), torch.randn(6, 2)
    elbo = bf.ELBO(model, bf.Gaussian(0.5), 60, seed=3)
    elbo(x, y, 2).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with bf.sampling(model, 2, seed=3):
        outputs = model(x.repeat(2, 1)).unflatten(0, (2, 6))
        nll = bf.Gaussian(0.5)(outputs, y).mean()
        loss = nll + bf.kl_divergence(model) / 60
        expected = sum(bf.kl_divergence(model, "none")[name].sum() for name in bf.posterior(model))
    torch.testing.assert_close(elbo.kl, expected.detach())
    loss.backward()
    for a, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(a, p.grad)


def test_gradcheck(twin):
    layer = Gabor(2, 3, dtype=torch.float64, init_sigma=0.3)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def outputs(x, *parameters):
        with bf.sampling(layer, 2, seed=1):
            return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    names, parameters = zip(*layer.named_parameters())
    assert torch.autograd.gradcheck(outputs, (x, *parameters))


@pytest.mark.parametrize("order", ["nll, kl", "kl, nll", "together", "twice"])
def test_orders_of_backward(order, twin):
    model, x = network(), torch.randn(6, 3)

    def gradients(order):
        model.zero_grad()
        with bf.sampling(model, seed=1):
            nll, kl = model(x).square().mean(), bf.kl_divergence(model)
        if order == "together":
            (nll + kl).backward()
        elif order == "twice":
            (nll + kl).backward(retain_graph=True)
            model.zero_grad()
            (nll + kl).backward()
        else:
            for part in (nll, kl) if order == "nll, kl" else (kl, nll):
                part.backward()
        return [p.grad.clone() for p in model.parameters()]

    with bf.sampling(model, seed=1):
        nll = bf.draw(model, seed=1)(x).square().mean()
        torch.testing.assert_close(model(x).square().mean(), nll)
    apart = gradients("nll, kl")
    for a, b in zip(gradients(order), apart):
        torch.testing.assert_close(a, b)


def test_priors_pruning_checkpoints_and_words(tmp_path):
    model, x = network(), torch.randn(6, 3)
    assert repr(model[0]) == ("Gabor(prior=Normal(loc=0.0, scale=1.0), scale='softplus', kl='analytic', init='default', "
                              "init_sigma=0.1)")
    torch.testing.assert_close(model[0].frequency_sigma, torch.full((8, 3), 0.1))
    with pytest.raises(AttributeError, match="Gabor has no frequency: it draws one at every call"):
        model[0].frequency
    assert set(bf.signal_to_noise(model)) == set(bf.posterior(model)) == {
        "0.frequency", "0.amplitude", "0.bias", "2.weight", "2.bias"}
    bf.set_prior(model, {"0.amplitude": bf.Normal(torch.ones(8), 0.5)})
    assert bf.prune(model, 0.5) == round(0.5 * (24 + 8 + 8 + 16 + 2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = network()
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(bf.kl_divergence(other), bf.kl_divergence(model))
    torch.testing.assert_close(bf.mc_forward(other, x, 2, seed=0), bf.mc_forward(model, x, 2, seed=0))
    with pytest.raises(ValueError, match=r"scale='softplus', prior N\(0, 1\^2\)|frequency_prior N\(0, 1\^2\)"):
        network(prior=bf.Normal(0.0, 2.0)).load_state_dict(network().state_dict())
    bf.check_parameters(model)


def test_what_it_is_told_is_checked():
    layer, silent = Gabor(3, 8), bf.VariationalLayer()
    silent.add_posterior("weight", (3,))
    for call, error, message in (
            (lambda: layer.add_posterior("bias", (8,)), ValueError, "name: expected a new one beside frequency"),
            (lambda: layer.set_prior("weight", bf.Normal()), ValueError, "name: expected one of frequency, amplitude, bias, given 'weight'"),
            (lambda: setattr(layer, "frequency_sigma", 1.0), AttributeError, "cannot be set"),
            (lambda: Gabor(3, 8, init_sigma=-1.0), ValueError, "init_sigma: expected a positive finite number, given -1.0"),
            (lambda: Gabor(3, 8, init_sigma="small"), TypeError, "init_sigma: expected a positive number or None, given str"),
            (lambda: Gabor(3, 8, prior=bf.Normal(torch.ones(8, 3), 1.0)), ValueError, "prior.loc: expected a number or a tensor"),
            (lambda: bf.VariationalLayer()(torch.ones(3)), NotImplementedError, "VariationalLayer has no posterior: call add_posterior"),
            (lambda: silent(torch.ones(3)), NotImplementedError, "VariationalLayer does not say what it computes: define compute")):
        with pytest.raises(error, match=message):
            call()


def test_it_compiles_whole(twin):
    # Of the reference every line is traced, and a layer beside this one would double them.
    model, x = Gabor(3, 8) if twin == "plain" else network(), torch.randn(6, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with bf.sampling(model, 2, seed=5):
        y = compiled(x.repeat(2, 1))
        torch.testing.assert_close(y, model(x.repeat(2, 1)))

    def step(x):
        return model(x).square().mean() + bf.kl_divergence(model)

    torch.manual_seed(1)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    step(x).backward()
    assert all(g.isfinite().all() for g in found)
