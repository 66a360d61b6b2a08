"""Layers of the installed other libraries taken over: means, sigmas, priors, KL, and state_dicts."""
from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnn_fast as bf

from .peers import CASES, at_the_means, fill, library, made, sample_input

SCALES = {"torchbnn": "exp"}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_means_and_sigmas(case):
    theirs, x = made(case), sample_input(case)
    layer = bf.import_from(theirs)
    assert type(layer) is getattr(bf, f"Variational{case.kind}") and layer.scale == SCALES.get(case.library, "softplus")
    with bf.sampling(layer, mean=True):
        found = layer(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, at_the_means(theirs, x))
    for pair in layer.pairs():
        there = pair.rho != -torch.inf  # what they have not
        assert torch.equal(pair.rho[there], (pair.mu / 2 - 2)[there]) and not pair.mu[~there].any()
        assert pair.name.startswith("bias_hh") or there.all()
    assert any(not torch.equal(a, b) for a, b in zip(first(layer(x)), first(layer(x)))) or not layer.pairs()


def first(y):
    return y[0] if isinstance(y, tuple) else y


@cases
def test_kl(case):
    theirs, x = made(case), sample_input(case)
    layer = bf.import_from(theirs)
    elementwise = bf.kl_divergence(layer, "none") if layer.pairs() else {}
    if case.library == "bayesian_torch":
        kl_loss = importlib.import_module("bayesian_torch.models.dnn_to_bnn").get_kl_loss
        times = 2 if case.kind == "LSTM" else 1
        torch.testing.assert_close(kl_loss(theirs), times * sum(kl.mean() for kl in elementwise.values()))
        return
    if case.library == "torchbnn":
        kl_loss = importlib.import_module("torchbnn").BKLLoss
        if elementwise:
            torch.testing.assert_close(kl_loss("sum")(theirs)[0], bf.kl_divergence(layer))
            torch.testing.assert_close(kl_loss("mean")(theirs)[0], bf.kl_divergence(layer, "mean"))
        return
    if case.kind in ("LSTM", "GRU") and not any("bias" in name for name in elementwise):
        return  # their sampling fails without a bias
    theirs(x)
    samplers = [module for name, module in theirs.named_modules() if name.endswith("_sampler") and (
        getattr(module, "w", None) is not None or getattr(module, "weight", None) is not None)]
    expected = 0.0
    for sampler in samplers:  # sampled: log q(w) - log p(w) at their w, by the posterior and the prior here
        w = sampler.w if case.library == "blitz" else sampler.weight
        q = torch.distributions.Normal(sampler.mu, F.softplus(sampler.rho))
        expected += (q.log_prob(w) - torch.distributions.Normal(layer.prior.loc, layer.prior.scale).log_prob(w)).sum()
    offset = 0.5 * sum(sampler.mu.numel() for sampler in samplers) if case.library == "torch_uncertainty" else 0.0
    torch.testing.assert_close(theirs.log_variational_posterior - theirs.log_prior, expected - offset, rtol=1e-3, atol=1e-3)
    assert all(pair.prior == bf.Normal(0.0, 0.7) for pair in layer.pairs())


@pytest.mark.parametrize("name", ["blitz Linear", "torch-uncertainty Linear"])
def test_the_mean_of_their_sampled_kl(name):
    theirs = made(CASES[name])
    x, weights = sample_input(CASES[name]), 15
    with torch.no_grad():
        draws = torch.stack([(theirs(x), theirs.log_variational_posterior - theirs.log_prior)[1] for _ in range(2000)])
    expected = bf.kl_divergence(bf.import_from(theirs)) - (0.5 * weights if "uncertainty" in name else 0.0)
    assert (draws.mean() - expected).abs() < 5 * draws.std() / 2000 ** 0.5


@cases
def test_state_dicts(case):
    theirs = made(case)
    expected = bf.import_from(theirs)
    for scale in ("softplus", "exp"):
        layer = bf.import_from(theirs)
        if scale != layer.scale and layer.pairs():
            layer = rescaled(layer, scale)
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
        unused = ("blitz Linear, no bias", "blitz LSTM, no bias")
        if case in [CASES[name] for name in unused]:
            with pytest.raises(ValueError, match="2 not understood .bias_sampler.mu, bias_sampler.rho"):
                bf.import_state_dict(layer, theirs.state_dict())
        keys = bf.import_state_dict(layer, theirs.state_dict(), None if layer.pairs() else "torchbnn",
                                    strict=case not in [CASES[name] for name in unused])
        assert not keys.missing_keys
        for pair, of_import in zip(layer.pairs(), expected.pairs()):
            assert torch.equal(pair.mu, of_import.mu)
            torch.testing.assert_close(getattr(layer, f"{pair.name}_sigma"), getattr(expected, f"{pair.name}_sigma"))


def rescaled(layer, scale):
    """A layer like this under another scale."""
    ordinary = bf.to_deterministic(layer)
    return bf.to_variational(ordinary, scale=scale)


def network(name: str) -> nn.Module:
    lib = library(name)
    conv, linear = {
        "bayesian_torch": lambda: (lib.Conv2dReparameterization(1, 2, 3), lib.LinearFlipout(8, 3)),
        "torchbnn": lambda: (lib.BayesConv2d(0.0, 0.1, 1, 2, 3), lib.BayesLinear(0.0, 0.1, 8, 3)),
        "blitz": lambda: (lib.BayesianConv2d(1, 2, (3, 3)), lib.BayesianLinear(8, 3)),
        "torch_uncertainty": lambda: (lib.BayesConv2d(1, 2, 3), lib.BayesLinear(8, 3))}[name]()
    for layer in (conv, linear):
        layer.dnn_to_bnn_flag = True
        fill(layer)
    return nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), linear)


@pytest.mark.parametrize("name", ["bayesian_torch", "torchbnn", "blitz", "torch_uncertainty"])
def test_a_whole_model_after_a_forward(name):
    """Their layers keep tensors of the latest forward, of which a copy cannot be made."""
    model, x = network(name), torch.randn(4, 1, 4, 4)
    model(x)
    model.eval()[1].train()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    seen = []
    model[4].register_forward_hook(lambda *arguments: seen.append(1))
    converted = bf.import_from(model)
    assert [type(m).__name__ for m in converted] == ["VariationalConv2d", "BatchNorm2d", "ReLU", "Flatten", "VariationalLinear"]
    assert converted[1] is not model[1] and torch.equal(converted[1].running_mean, model[1].running_mean) and converted[1].training
    assert not converted[0].training and not converted[0].weight_mu.requires_grad and converted[4].weight_rho.requires_grad
    assert bf.predict(converted, x, n_samples=3, seed=0).samples.shape == (3, 4, 3) and seen
    elbo = bf.ELBO(converted, bf.Categorical(), 100)
    elbo(x, torch.zeros(4, dtype=torch.long)).backward()
    assert converted[4].weight_mu.grad is not None
    other = copy.deepcopy(converted)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    assert bf.import_state_dict(other, model.state_dict()) == ([], [])
    assert all(torch.equal(parameter, expected) for parameter, expected in zip(other.parameters(), converted.parameters()))
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    parts = model.state_dict()
    parts["extra"] = parts.pop("1.weight")
    with pytest.raises(ValueError, match=r"1 missing \(1.weight\) and 1 not understood \(extra\)"):
        bf.import_state_dict(other, parts)
    assert bf.import_state_dict(other, parts, strict=False) == (["1.weight"], ["extra"])


def test_blitz_has_its_trained_values_under_its_samplers():
    theirs = library("blitz").BayesianLinear(4, 3).double()  # after this they are no longer the layer's own
    with torch.no_grad():
        theirs.weight_sampler.mu.fill_(2.0)
    layer = bf.import_from(theirs)
    assert (layer.weight_mu == 2.0).all() and layer.weight_mu.dtype == torch.float64 and (theirs.weight_mu != 2.0).all()


def test_shared_layers_and_parameters():
    tb = library("torchbnn")
    first, second = tb.BayesLinear(0.0, 1.0, 3, 3), tb.BayesLinear(0.0, 1.0, 3, 3)
    second.weight_mu, second.weight_log_sigma = first.weight_mu, first.weight_log_sigma
    converted = bf.import_from(nn.Sequential(first, second, first))
    assert converted[0] is converted[2] and converted[1].weight_mu is converted[0].weight_mu
    assert list(bf.posterior(converted)) == ["0.weight", "0.bias", "1.bias"]


def test_moped_priors_of_bayesian_torch_are_tensors():
    theirs = made(CASES["bayesian-torch Reparameterization Linear"])
    theirs.prior_weight_mu = theirs.mu_weight.data + 1.0
    layer = bf.import_from(theirs)
    assert torch.equal(layer.prior.loc, theirs.prior_weight_mu) and layer.prior.scale == 0.7 and layer.bias_prior == bf.Normal(0.1, 0.7)
    torch.testing.assert_close(theirs.kl_loss(), sum(kl.mean() for kl in bf.kl_divergence(layer, "none").values()))


@pytest.mark.parametrize("name", ["blitz", "torch_uncertainty"])
def test_mixture_priors_have_to_be_replaced(name):
    lib = library(name)
    theirs = (lib.BayesianLinear if name == "blitz" else lib.BayesLinear)(4, 3, prior_sigma_1=1.0, prior_sigma_2=0.1, prior_pi=0.5)
    with pytest.raises(ValueError, match=r"prior: expected one for '0.weight'.*0.5 N\(0, 1\^2\) \+ 0.5 N\(0, 0.1\^2\).*deviation is 0.7106"):
        bf.import_from(nn.Sequential(theirs))
    assert bf.import_from(theirs, prior=bf.Normal(0.0, 0.7106)).prior == bf.Normal(0.0, 0.7106)
    layer = bf.import_from(theirs, prior=lambda name, mean: bf.Normal(mean, 0.5))
    assert torch.equal(layer.prior.loc, layer.weight_mu)
    with pytest.raises(ValueError, match="prior: expected one for 'bias'"):
        bf.import_from(theirs, prior=lambda name, mean: bf.Normal(0.0, 1.0) if name == "weight" else None)


def test_blitz_priors_of_torch_distributions():
    lib, normal = library("blitz"), torch.distributions.Normal(0.5, 2.0)
    assert bf.import_from(lib.BayesianLinear(4, 3, prior_dist=normal)).prior == bf.Normal(0.5, 2.0)
    with pytest.raises(ValueError, match="has no counterpart: it is .*Laplace"):
        bf.import_from(lib.BayesianLinear(4, 3, prior_dist=torch.distributions.Laplace(0.0, 1.0)))


def test_refused():
    bt, tb, bz = library("bayesian_torch"), library("torchbnn"), library("blitz")
    tuples = nn.Sequential(bt.LinearReparameterization(2, 2))
    frozen = tb.BayesLinear(0.0, 1.0, 2, 2)
    frozen.freeze()
    flipout = importlib.import_module("blitz.utils").Flipout(bz.BayesianLinear)

    class Own(bz.BayesianLinear):
        pass

    for model, message in (
            (tuples, r"given '0', which gives \(output, KL\).*dnn_to_bnn_flag = True"), (frozen, "given '', which is frozen: unfreeze"),
            (nn.Sequential(bz.BayesianLinear(2, 2, freeze=True)), "given '0', which is frozen"), (flipout(2, 2), "class Flipout of blitz"),
            (nn.Sequential(Own(2, 2)), "given '0', the class Own"), (bz.BayesianLSTM(2, 2, peephole=True), "peephole=True"),
            (bz.BayesianGRU(2, 2, sharpen=True), "sharpen=True"), (bz.BayesianEmbedding(3, 2, max_norm=1.0), "max_norm: expected None"),
            (tb.BayesConv2d(0.0, 1.0, 1, 1, 3, padding=1, padding_mode="circular"), "circular padding that is even"),
            (nn.Sequential(nn.Linear(2, 2)), "found none in Sequential: to_variational takes those of torch")):
        with pytest.raises(ValueError, match=message):
            bf.import_from(model)
    with pytest.raises(TypeError, match="prior: expected a Normal or a function"):
        bf.import_from(tb.BayesLinear(0.0, 1.0, 2, 2), prior=1.0)
