"""Models of the other libraries where these are not installed: modules with the names and parameters of theirs stand for them."""
from __future__ import annotations

import math
import types

import pytest
import torch
from torch import nn

import bnn_fast as bf


def stand_in(path: str, parameters: dict[str, tuple[int, ...] | None], modules: dict[str, nn.Module] | None = None,
             **attributes) -> nn.Module:
    """A module of the class `path` with these parameters, whose rho is half the mean less 2, and attributes."""
    package, _, name = path.rpartition(".")
    made = type(name, (nn.Module,), {"__module__": package})()
    for name, shape in parameters.items():
        made.register_parameter(name, None if shape is None else nn.Parameter(torch.randn(shape)))
    for name, module in (modules or {}).items():
        made.add_module(name, module)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@torch.no_grad()
def paired(module: nn.Module, mu: str, rho: str) -> nn.Module:
    """rho = mu / 2 - 2 for the parameters whose names have these words."""
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        if mu in name:
            named[name.replace(mu, rho)].copy_(parameter / 2 - 2)
    return module


def bayesian_torch(name: str, shape: tuple[int, ...], bias: int | None, weight: str = "weight", **attributes) -> nn.Module:
    parameters = {f"{kind}_{tensor}": size for tensor, size in ((weight, shape), ("bias", bias and (bias,))) for kind in ("mu", "rho")}
    made = stand_in(f"bayesian_torch.layers.variational_layers.some.{name}", parameters, prior_mean=0.1, prior_variance=0.7,
                    dnn_to_bnn_flag=True, **attributes)
    for tensor, size in (("weight", shape), ("bias", bias and (bias,))):
        for kind, value in (("mu", 0.1), ("sigma", 0.7)):
            made.register_buffer(f"prior_{tensor}_{kind}", None if size is None else torch.full(size, value), persistent=False)
    return paired(made, "mu_", "rho_")


def blitz(name: str, tensors: dict[str, tuple[int, ...]], prior=(1, 0.7, 0.1), **attributes) -> nn.Module:
    """With samplers that have the trained values, and other values beside them."""
    modules = {f"{tensor}_sampler": paired(stand_in("blitz.modules.weight_sampler.TrainableRandomDistribution", {"mu": shape, "rho": shape}),
                                           "mu", "rho") for tensor, shape in tensors.items()}
    dist = types.SimpleNamespace(pi=prior[0], sigma1=prior[1], sigma2=prior[2], dist1=object(), dist2=object())
    return stand_in(f"blitz.modules.some.{name}", {f"{tensor}_{kind}": shape for tensor, shape in tensors.items() for kind in ("mu", "rho")},
                    modules, freeze=False, **{f"{tensor}_prior_dist": dist for tensor in tensors}, **attributes)


def torch_uncertainty(prior=(1.0, 0.7, 0.1), **attributes) -> nn.Module:
    dist = nn.Module()
    dist.register_buffer("pi", torch.tensor([prior[0], 1 - prior[0]]))
    dist.register_buffer("sigmas", torch.tensor(prior[1:]))
    made = stand_in("torch_uncertainty.layers.bayesian.bayes_linear.BayesLinear",
                    {"weight_mu": (3, 4), "weight_sigma": (3, 4), "bias_mu": None, "bias_sigma": None}, {"weight_prior_dist": dist},
                    **{"in_features": 4, "out_features": 3, "frozen": False, **attributes})
    return paired(made, "mu", "sigma")


def torchbnn(name: str = "linear.BayesLinear", shape: tuple[int, ...] = (3, 4), **attributes) -> nn.Module:
    parameters = {f"{tensor}_{kind}": size for tensor, size in (("weight", shape), ("bias", shape[:1])) for kind in ("mu", "log_sigma")}
    return paired(stand_in(f"torchbnn.modules.{name}", parameters, prior_mu=0.1, prior_sigma=0.7, weight_eps=None, bias=True, **attributes),
                  "mu", "log_sigma")


def convolution(**others) -> dict:
    return {"in_channels": 2, "out_channels": 3, "kernel_size": (2, 2), "stride": (1, 1), "padding": (2, 4), "dilation": (1, 1), "groups": 1,
            **others}


STAND_INS = {
    "bayesian-torch Linear": lambda: bayesian_torch("LinearReparameterization", (3, 4), 3, in_features=4, out_features=3),
    "bayesian-torch Conv2d": lambda: bayesian_torch("Conv2dFlipout", (3, 2, 2, 2), None, "kernel", **convolution()),
    "bayesian-torch LSTM": lambda: stand_in("bayesian_torch.layers.flipout_layers.rnn_flipout.LSTMFlipout", {}, {
        "ih": bayesian_torch("LinearFlipout", (20, 3), 20), "hh": bayesian_torch("LinearFlipout", (20, 5), 20)},
        in_features=3, out_features=5, dnn_to_bnn_flag=True),
    "torchbnn Linear": lambda: torchbnn(in_features=4, out_features=3),
    "torchbnn Conv2d": lambda: torchbnn("conv.BayesConv2d", (3, 2, 2, 2), padding_mode="circular", **convolution()),
    "blitz Linear": lambda: blitz("BayesianLinear", {"weight": (3, 4), "bias": (3,)}, in_features=4, out_features=3, bias=True),
    "blitz LSTM": lambda: blitz("BayesianLSTM", {"weight_ih": (3, 20), "weight_hh": (5, 20), "bias": (20,)}, in_features=3, out_features=5,
                                use_bias=True),
    "blitz GRU": lambda: blitz("BayesianGRU", {"weight_ih": (3, 20), "weight_hh": (5, 20), "bias": (20,)}, in_features=3, out_features=5,
                               use_bias=True),
    "torch-uncertainty Linear": torch_uncertainty,
}


@pytest.mark.parametrize("name", STAND_INS)
def test_posteriors_and_priors(name):
    theirs = STAND_INS[name]()
    layer = bf.import_from(theirs)
    assert f"Variational{name.split()[1]}" == type(layer).__name__
    found = {pair.name: pair for pair in layer.pairs()}
    for pair in found.values():
        there = pair.rho != -math.inf
        assert torch.equal(pair.rho[there], (pair.mu / 2 - 2)[there])
        if "-torch" in name:  # prior_variance is a standard deviation
            assert pair.prior == bf.Normal(0.1, 0.7)
        else:
            assert pair.prior == (bf.Normal(0.1, 0.7) if "torchbnn" in name else bf.Normal(0.0, 0.7))
    if name == "bayesian-torch LSTM":
        assert torch.equal(found["weight_hh_l0"].mu, theirs.hh.mu_weight) and torch.equal(found["bias_ih_l0"].mu, theirs.ih.mu_bias)
    if name == "blitz LSTM":
        assert torch.equal(found["weight_ih_l0"].mu, theirs.weight_ih_sampler.mu.T)
        assert torch.equal(found["bias_ih_l0"].mu, theirs.bias_sampler.mu) and (found["bias_hh_l0"].rho == -math.inf).all()
    if name == "blitz GRU":
        weight = theirs.weight_hh_sampler.mu.T
        assert torch.equal(found["weight_hh_l0"].mu, torch.cat((weight[:10], weight[15:])))
        assert torch.equal(found["bias_hh_l0"].mu, torch.cat((torch.zeros(10), theirs.bias_sampler.mu[15:])))
    if name == "torchbnn Conv2d":
        assert (layer.padding, layer.padding_mode, layer.scale) == ((1, 2), "circular", "exp")


def test_what_they_have_not_stays_away_in_training():
    layer = bf.import_from(STAND_INS["blitz LSTM"]())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=0.1)  # decay makes NaN of -inf
    for _ in range(2):
        optimizer.zero_grad()
        (layer(torch.randn(2, 4, 3))[0].sum() + bf.kl_divergence(layer)).backward()
        optimizer.step()
    assert bf.kl_divergence(layer).isfinite() and (layer.bias_hh_l0_rho == -math.inf).all() and not layer.bias_hh_l0_mu.any()


@pytest.mark.parametrize("name", STAND_INS)
def test_state_dicts_under_any_scale(name):
    theirs = STAND_INS[name]()
    expected = bf.import_from(theirs)
    state = {**{f"fc.{key}": value for key, value in theirs.state_dict().items()}, "other.weight": torch.ones(1, 1)}
    if name.startswith("blitz"):
        state["fc.weight_ih_sampler.eps_w" if "Linear" not in name else "fc.weight_sampler.eps_w"] = torch.zeros(1)
    for scale in ("softplus", "exp", "sqrt_exp"):
        model = nn.ModuleDict({"fc": bf.to_variational(bf.to_deterministic(expected), scale=scale), "other": nn.Linear(1, 1, bias=False)})
        assert bf.import_state_dict(model, state) == ([], []) and model["other"].weight == 1.0
        for pair in expected.pairs():
            assert torch.equal(getattr(model["fc"], f"{pair.name}_mu"), pair.mu)
            torch.testing.assert_close(getattr(model["fc"], f"{pair.name}_sigma"), getattr(expected, f"{pair.name}_sigma"))


def test_what_a_state_dict_lacks_and_what_is_too_much():
    theirs = torchbnn(in_features=4, out_features=3)
    model, before = nn.Sequential(bf.VariationalLinear(4, 3)), torch.full((3, 4), 7.0)
    with torch.no_grad():
        model[0].weight_mu.copy_(before)
    state = {f"0.{key}": value for key, value in theirs.state_dict().items()}
    for given, message in (
            ({**state, "1.weight_mu": before}, r"of torchbnn for this model, given a state_dict with 1 not understood \(1.weight_mu\)"),
            ({key: value for key, value in state.items() if "bias" not in key}, r"2 missing \(0.bias_mu, 0.bias_log_sigma\)"),
            ({**state, "0.weight_mu": torch.ones(4, 3)}, r"0.weight_mu: expected a tensor \[3, 4\] for this model, given a .* \[4, 3\]"),
            ({"0.weight": before}, "library: expected one of bayesian_torch, torchbnn, blitz, torch_uncertainty, as the keys")):
        with pytest.raises(ValueError, match=message):
            bf.import_state_dict(model, given)
        assert torch.equal(model[0].weight_mu, before)  # nothing is changed
    with pytest.raises(ValueError, match="library: expected one of 'bayesian_torch', 'torchbnn'"):
        bf.import_state_dict(model, state, "pyro")
    with pytest.raises(TypeError, match="state_dict: expected a dictionary of tensors by name"):
        bf.import_state_dict(model, [1])
    keys = bf.import_state_dict(model, {**state, "1.weight_mu": before}, strict=False)
    assert keys.unexpected_keys == ["1.weight_mu"] and torch.equal(model[0].weight_mu, theirs.weight_mu)


def test_a_pruned_weight_comes_back():
    model = bf.VariationalLinear(4, 3)
    bf.prune(model, 0.5)
    theirs = torchbnn(in_features=4, out_features=3)
    bf.import_state_dict(model, theirs.state_dict())
    assert torch.equal(bf.draw(model, mean=True).weight, theirs.weight_mu) and (model.weight_sigma > 0).all()


@pytest.mark.parametrize("make, message", [
    (lambda: blitz("BayesianLinear", {"weight": (3, 4)}, (0.5, 1.0, 0.1), in_features=4, out_features=3, bias=False),
     r"prior: expected one for 'weight', whose own has no counterpart: it is the scale mixture 0.5 N\(0, 1\^2\)"),
    (lambda: torch_uncertainty((0.5, 1.0, 0.1)), r"scale mixture.*0.5 N\(0, 0.1\^2\), whose standard deviation is 0.7106"),
    (lambda: torch_uncertainty(frozen=True), "is frozen: unfreeze it before"),
    (lambda: stand_in("blitz.modules.some.BayesianNew", {"mu": (2,)}), "given '', the class BayesianNew of blitz.modules.some"),
    (lambda: nn.Linear(2, 2), "found none in Linear")])
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        bf.import_from(make())
