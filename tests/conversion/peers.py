"""Layers and models of the other libraries, where they are installed."""
from __future__ import annotations

import copy
import importlib
from typing import Callable, NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.providers import module


def library(name: str):
    """The library's layers as attributes; skips the test where it is not installed."""
    if name == "torch_uncertainty":  # the packages around these modules import what the layers do not need
        try:
            return Together([module(f"torch_uncertainty.layers.bayesian.{part}") for part in ("bayes_linear", "bayes_conv")])
        except ModuleNotFoundError as error:
            pytest.skip(f"torch-uncertainty is not installed: {error}")
    path = {"bayesian_torch": "bayesian_torch.layers", "torchbnn": "torchbnn", "blitz": "blitz.modules"}[name]
    pytest.importorskip(path, reason=f"{name} is not installed")
    return importlib.import_module(path)


class Together:
    def __init__(self, modules):
        self.modules = modules

    def __getattr__(self, name: str):
        return next(getattr(m, name) for m in self.modules if hasattr(m, name))


class Case(NamedTuple):
    library: str
    make: Callable[[object], nn.Module]     # of the library's layers
    shape: tuple[int, ...]      # of an input
    kind: str   # the layer that it is to become


def _bayesian_torch(estimator: str) -> dict[str, Case]:
    def case(make, shape, kind):
        return Case("bayesian_torch", lambda bt: make(lambda name, *a, **k: getattr(bt, name + estimator)(*a, **k)), shape, kind)

    prior = {"prior_mean": 0.1, "prior_variance": 0.7}
    rest = {"posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    cases = {
        "Linear": case(lambda m: m("Linear", 4, 3, **prior), (5, 4), "Linear"),
        "Linear, no bias": case(lambda m: m("Linear", 4, 3, bias=False, **prior), (5, 4), "Linear"),
        "Conv1d": case(lambda m: m("Conv1d", 4, 6, 3, stride=2, padding=1, groups=2, **prior), (2, 4, 9), "Conv1d"),
        "Conv2d": case(lambda m: m("Conv2d", 2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=False, **prior), (2, 2, 6, 5), "Conv2d"),
        "Conv3d": case(lambda m: m("Conv3d", 2, 3, 2, dilation=2, **prior, **rest), (2, 2, 4, 5, 4), "Conv3d"),
        "ConvTranspose1d": case(lambda m: m("ConvTranspose1d", 4, 4, 3, stride=2, output_padding=1, groups=2, **prior), (2, 4, 5),
                                "ConvTranspose1d"),
        "ConvTranspose2d": case(lambda m: m("ConvTranspose2d", 3, 3, 3, stride=2, padding=1, **prior, **rest), (2, 3, 4, 4), "ConvTranspose2d"),
        "ConvTranspose3d": case(lambda m: m("ConvTranspose3d", 2, 3, 2, **prior, **rest), (2, 2, 3, 3, 3), "ConvTranspose3d"),
        "LSTM": case(lambda m: m("LSTM", 3, 4, **prior), (2, 5, 3), "LSTM"),
        "LSTM, no bias": case(lambda m: m("LSTM", 3, 4, bias=False, **prior), (2, 5, 3), "LSTM")}
    return {f"bayesian-torch {estimator} {name}": case for name, case in cases.items()}


_CONVOLUTIONS = {1: (3, (2, 4, 9)), 2: ((3, 2), (2, 4, 6, 5)), 3: ((2, 2, 2), (2, 4, 4, 4, 4))}
CASES = {
    **_bayesian_torch("Reparameterization"), **_bayesian_torch("Flipout"),
    "torchbnn Linear": Case("torchbnn", lambda tb: tb.BayesLinear(0.1, 0.7, 4, 3), (5, 4), "Linear"),
    "torchbnn Linear, no bias": Case("torchbnn", lambda tb: tb.BayesLinear(0.1, 0.7, 4, 3, bias=False), (5, 4), "Linear"),
    "torchbnn Conv2d": Case("torchbnn", lambda tb: tb.BayesConv2d(0.1, 0.7, 4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 6, 6), "Conv2d"),
    "torchbnn Conv2d, circular": Case("torchbnn", lambda tb: tb.BayesConv2d(0.0, 1.0, 2, 3, 3, padding=(2, 4), bias=False,
                                                                            padding_mode="circular"), (2, 2, 6, 6), "Conv2d"),
    "torchbnn Conv2d, reflect": Case("torchbnn", lambda tb: tb.BayesConv2d(0.0, 1.0, 2, 3, 3, padding=1, padding_mode="reflect"),
                                     (2, 2, 6, 6), "Conv2d"),
    "torchbnn BatchNorm2d": Case("torchbnn", lambda tb: tb.BayesBatchNorm2d(1.0, 0.7, 3, momentum=0.2), (4, 3, 2, 2), "BatchNorm2d"),
    "torchbnn BatchNorm2d, plain": Case("torchbnn", lambda tb: tb.BayesBatchNorm2d(1.0, 0.7, 3, affine=False), (4, 3, 2, 2), "BatchNorm2d"),
    "blitz Linear": Case("blitz", lambda bz: bz.BayesianLinear(4, 3, prior_sigma_1=0.7), (5, 4), "Linear"),
    "blitz Linear, no bias": Case("blitz", lambda bz: bz.BayesianLinear(4, 3, bias=False, prior_sigma_1=0.7), (5, 4), "Linear"),
    **{f"blitz Conv{d}d": Case("blitz", lambda bz, d=d, k=k: getattr(bz, f"BayesianConv{d}d")(
        4, 6, k, groups=2, stride=2, padding=1, bias=d > 1, prior_sigma_1=0.7), shape, f"Conv{d}d") for d, (k, shape) in _CONVOLUTIONS.items()},
    "blitz Embedding": Case("blitz", lambda bz: bz.BayesianEmbedding(7, 3, padding_idx=1, prior_sigma_1=0.7), (2, 4), "Embedding"),
    "blitz LSTM": Case("blitz", lambda bz: bz.BayesianLSTM(3, 4, prior_sigma_1=0.7), (2, 5, 3), "LSTM"),
    "blitz LSTM, no bias": Case("blitz", lambda bz: bz.BayesianLSTM(3, 4, bias=False, prior_sigma_1=0.7), (2, 5, 3), "LSTM"),
    "blitz GRU": Case("blitz", lambda bz: bz.BayesianGRU(3, 4, prior_sigma_1=0.7), (2, 5, 3), "GRU"),
    "torch-uncertainty Linear": Case("torch_uncertainty", lambda tu: tu.BayesLinear(4, 3, prior_sigma_1=0.7), (5, 4), "Linear"),
    "torch-uncertainty Linear, no bias": Case("torch_uncertainty", lambda tu: tu.BayesLinear(4, 3, prior_sigma_1=0.7, bias=False), (5, 4),
                                              "Linear"),
    **{f"torch-uncertainty Conv{d}d": Case("torch_uncertainty", lambda tu, d=d, k=k: getattr(tu, f"BayesConv{d}d")(
        4, 6, k, groups=2, padding=1, prior_sigma_1=0.7, padding_mode=("zeros", "circular", "reflect")[d % 3], bias=d > 1), shape,
        f"Conv{d}d") for d, (k, shape) in _CONVOLUTIONS.items()},
}


def made(case: Case) -> nn.Module:
    """The layer with any means and a rho that is half of them less 2, so that what is moved together is seen to be."""
    torch.manual_seed(0)
    layer = case.make(library(case.library))
    fill(layer)
    return layer


@torch.no_grad()
def fill(layer: nn.Module) -> None:
    named = dict(layer.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        if any(part in name for part in ("rho", "sigma")):
            other = named[name.replace("weight_sampler.rho", "weight_sampler.mu").replace("rho", "mu").replace("log_sigma", "mu")
                          .replace("sigma", "mu")]
            parameter.copy_(other / 2 - 2)
        else:
            parameter.normal_(0.0, 0.5)
    for name, parameter in named.items():  # parameters under several names were filled several times
        if any(part in name for part in ("rho", "sigma")):
            parameter.copy_(named[name.replace("rho", "mu").replace("log_sigma", "mu").replace("sigma", "mu")] / 2 - 2)


def sample_input(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if case.kind == "Embedding":
        return torch.randint(7, case.shape, generator=generator)
    return torch.randn(case.shape, generator=generator)


@torch.no_grad()
def at_the_means(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The first output of the library's own forward without noise."""
    layer = copy.deepcopy(layer)
    for attribute in ("freeze", "frozen"):
        if isinstance(getattr(layer, attribute, None), bool):
            setattr(layer, attribute, True)
    for name, parameter in layer.named_parameters():
        if "rho" in name or "sigma" in name:
            parameter.fill_(-200.0)
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y
