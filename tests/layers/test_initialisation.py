"""Named initialisations."""
from __future__ import annotations


import pytest
import torch
from common import gradients, needs_extension, network, twin  # noqa: F401

import bnn_fast as bf
from bnn_fast.priors.initialisation import INITIALISATIONS
from bnn_fast.priors.scales import convert_rho


def tensor_prior(*shape):
    return bf.Normal(torch.randn(*shape), torch.rand(*shape) + 0.5)


def statistics(name, scale):
    layer = bf.VariationalLinear(200, 400, init=name, scale=scale, prior=bf.Normal(0.0, 0.3),
                                 dtype=torch.float64)
    return layer, layer.weight_mu.detach(), layer.weight_sigma.detach()


@pytest.mark.parametrize("scale", bf.checks.SCALES)
def test_named_initialisations(scale):
    softplus = lambda rho: torch.nn.functional.softplus(torch.tensor(rho, dtype=torch.float64))  # noqa: E731
    expected = {  # std of mu, sigma of the weight, sigma of the bias, whether the bias' mean is 0
        "default": ((2 / 200) ** 0.5, softplus(-5.0), softplus(-5.0), True),
        "blundell": (0.1, softplus(-3.0), softplus(-3.0), False),
        "tutorial": (0.001, softplus(-2.5), softplus(0.0), True),
        "zeros": (0.0, torch.tensor(1.0).double(), torch.tensor(1.0).double(), True),
        "adv_bnn": ((1 / 200) ** 0.5 / 3 ** 0.5, torch.tensor(0.3).double(), torch.tensor(0.3).double(),
                    False),
    }
    assert set(expected) == set(INITIALISATIONS)
    for name, (std, sigma, bias_sigma, zero_bias) in expected.items():
        layer, mu, found = statistics(name, scale)
        assert abs(mu.std() - std) <= 0.02 * std, name
        assert abs(mu.mean()) <= 0.02 * std, name
        torch.testing.assert_close(layer.bias_sigma.detach(), bias_sigma.expand(400))
        assert (layer.bias_mu == 0).all() == zero_bias, name
        if name == "tutorial":
            rho = found.expm1().log()
            assert abs(rho.mean() + 2.5) < 1e-4 and abs(rho.std() - 0.001) < 1e-4
        else:
            torch.testing.assert_close(found, sigma.expand(400, 200))
        if name == "adv_bnn":
            assert mu.abs().max() <= (1 / 200) ** 0.5
    assert (statistics("zeros", "exp")[0].weight_rho == 0).all()


def test_conversion_keeps_sigma():
    rho = torch.linspace(-700, 300, 2001, dtype=torch.float64)
    log_sigma = torch.where(rho < -30, rho, torch.nn.functional.softplus(rho.clamp(min=-30)).log())
    torch.testing.assert_close(convert_rho(rho, "exp"), log_sigma)
    torch.testing.assert_close(convert_rho(rho, "sqrt_exp"), 2 * log_sigma)
    torch.testing.assert_close(convert_rho(rho, "square").square(), log_sigma.exp())
    torch.testing.assert_close(convert_rho(rho, "identity"), log_sigma.exp())
    assert convert_rho(rho, "softplus") is rho


def test_adv_bnn_takes_sigma_from_tensor_priors():
    prior, bias_prior = tensor_prior(2, 3), tensor_prior(2)
    layer = bf.VariationalLinear(3, 2, prior=prior, bias_prior=bias_prior, init="adv_bnn", scale="sqrt_exp")
    torch.testing.assert_close(layer.weight_sigma, prior.scale)
    torch.testing.assert_close(layer.bias_sigma, bias_prior.scale)


def test_reset_parameters_draws_again():
    layer = bf.VariationalLinear(30, 20, init="blundell")
    before = layer.weight_mu.clone()
    version = layer.weight_mu._version
    layer.reset_parameters()
    assert not torch.equal(before, layer.weight_mu) and layer.weight_mu._version > version
