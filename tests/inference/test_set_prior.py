"""Posteriors as priors, priors by name, and the initial sigma."""
from __future__ import annotations

import pytest
import torch
from common import twin  # noqa: F401
from test_recipes import README
from torch import nn

import bnn_fast as bf


def network(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(bf.VariationalLinear(4, 6, **options), nn.Tanh(), bf.VariationalLinear(6, 2, **options))


def test_yesterdays_posterior_is_todays_prior(twin, tmp_path):
    model, x, y = network(scale="exp"), torch.randn(20, 4), torch.randn(20, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def train(steps):
        elbo = bf.ELBO(model, bf.Gaussian(0.5), 20)
        for _ in range(steps):
            optimizer.zero_grad()
            elbo(x, y).backward()
            optimizer.step()

    train(30)
    bf.prune(model, 0.3)
    before = bf.posterior(model)
    bf.set_prior(model, before)
    assert abs(bf.kl_divergence(model).item()) < 1e-4
    torch.save(model.state_dict(), tmp_path / "model.pt")
    train(5)
    kl = bf.kl_divergence(model)
    assert kl > 0.01
    for name, value in before.items():
        q = torch.distributions.Normal(*(getattr(bf.posterior(model)[name], kind) for kind in ("loc", "scale")))
        p = torch.distributions.Normal(value.loc, value.scale)
        alive = model[int(name[0])].get_parameter(f"{name[2:]}_rho") > -torch.inf
        torch.testing.assert_close(bf.kl_divergence(model, "none")[name], torch.distributions.kl_divergence(q, p) * alive,
                                   rtol=1e-3, atol=1e-5)
    fresh = network(scale="exp")
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert abs(bf.kl_divergence(fresh).item()) < 1e-4
    assert all(torch.equal(fresh[0].prior.loc, value) for value in [before["0.weight"].loc])
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(bf.kl_divergence(fresh), kl)


def test_posterior_is_detached_and_of_the_parameters():
    model = network(init_sigma=0.3)
    found = bf.posterior(model)
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(found["0.weight"].loc, model[0].weight_mu) and not found["0.weight"].loc.requires_grad
    torch.testing.assert_close(found["2.bias"].scale, torch.full((2,), 0.3))
    with torch.no_grad():
        model[0].weight_mu.add_(1.0)
        model[2].weight_rho[0, 0], model[2].weight_rho[0, 1] = -torch.inf, -200.0
    assert not torch.equal(found["0.weight"].loc, model[0].weight_mu)
    scale = model[2].posterior()["weight"].scale
    assert scale[0, 0] == 1.0 and 0.0 < scale[0, 1] < 1e-37
    bf.Normal(found["0.weight"].loc, scale.min().item())  # positive, as a prior's has to be


def test_priors_by_name_function_or_for_all():
    model = network()
    bf.set_prior(model, torch.distributions.Normal(0.0, 2.0))
    assert all(layer.prior == layer.bias_prior == bf.Normal(0.0, 2.0) for layer in model[::2])
    bf.set_prior(model, {"2.bias": bf.Normal(1.0, 3.0)})
    assert model[2].bias_prior == bf.Normal(1.0, 3.0) and model[2].prior == bf.Normal(0.0, 2.0)
    bf.set_prior(model, lambda name, mu: bf.Normal(0.0, mu.shape[-1] ** -0.5) if name.endswith("weight") else None)
    assert model[0].prior == bf.Normal(0.0, 0.5) and model[0].bias_prior == bf.Normal(0.0, 2.0)


def test_shared_parameters_share_the_prior():
    layer = bf.VariationalLinear(3, 3)
    other = bf.VariationalLinear(3, 3)
    other.weight_mu, other.weight_rho = layer.weight_mu, layer.weight_rho
    model = nn.Sequential(layer, other)
    assert set(bf.posterior(model)) == {"0.weight", "0.bias", "1.bias"}
    for name in ("0.weight", "1.weight"):
        bf.set_prior(model, {name: bf.Normal(0.0, 5.0 + (name == "1.weight"))})
        assert layer.prior == other.prior and layer.prior.scale >= 5.0


def test_bad_priors_are_refused_before_any_is_set():
    model = network()
    for prior, error, message in (
            ({"weight": bf.Normal()}, ValueError, "prior: expected names among 0.weight, 0.bias, 2.weight, 2.bias, given 'weight'"),
            ({"0.weight": bf.Normal(5.0, 1.0), "0.bias": bf.Normal(torch.ones(3), 1.0)}, ValueError,
             r"bias_prior.loc: expected a number or a tensor \[6\]"),
            (1.0, TypeError, "prior: expected a Normal, given float 1.0"),
            (bf.Normal, TypeError, "prior: expected a Normal, given the class Normal"),
            (lambda name, mu: 3, TypeError, "prior: expected a Normal")):
        with pytest.raises(error, match=message):
            bf.set_prior(model, prior)
        assert model[0].prior == bf.Normal()
    with pytest.warns(UserWarning, match="there is no prior to set"):
        bf.set_prior(nn.Linear(2, 2), bf.Normal())


def test_the_kl_follows_a_prior_that_is_set_between_forward_and_read(twin):
    model, x = network(), torch.randn(3, 4)
    model(x)
    bf.set_prior(model, bf.Normal(0.0, 3.0))
    found = bf.kl_divergence(model)
    torch.testing.assert_close(found, bf.kl_divergence(network(prior=bf.Normal(0.0, 3.0))))


@pytest.mark.parametrize("scale", bf.checks.SCALES)
@pytest.mark.parametrize("init", ["default", "blundell", "tutorial", "zeros", "adv_bnn"])
def test_init_sigma(init, scale):
    for sigma in (0.05, 1e-9, 30):
        torch.manual_seed(1)
        layer = bf.VariationalLinear(3, 2, init=init, init_sigma=sigma, scale=scale, dtype=torch.float64)
        torch.manual_seed(1)
        other = bf.VariationalLinear(3, 2, init=init, scale=scale, dtype=torch.float64)
        if init != "tutorial":  # whose rho draws too
            assert torch.equal(layer.weight_mu, other.weight_mu) and torch.equal(layer.bias_mu, other.bias_mu)
        for found in (layer.weight_sigma, layer.bias_sigma):
            torch.testing.assert_close(found, torch.full_like(found, sigma))
        layer.weight_rho.data.zero_()
        layer.reset_parameters()
        torch.testing.assert_close(layer.weight_sigma, torch.full_like(layer.weight_rho, sigma))
        assert f"init_sigma={float(sigma)}" in repr(layer)
    with pytest.raises(ValueError, match="init_sigma: expected a positive finite number, given 0"):
        bf.VariationalLinear(3, 2, init_sigma=0)


def test_readmes_lines_run():
    section = README.split("### Yesterday's posterior, today's prior")[1]
    code = section.split("```python")[1].split("```")[0]
    model = network()
    exec(code, {"bf": bf, "model": model})
    assert model[2].prior == bf.Normal(0.0, 6 ** -0.5) and model[0].bias_prior == bf.Normal(0.0, 0.5)
