"""The libraries that are compared: how each makes a variational layer, and where its KL is read.

Every posterior begins alike, mu ~ N(0, 0.1) and sigma = softplus(-3), and every prior is N(0, 1). The KL is
taken as a library gives it: analytic or sampled, summed or, in bayesian-torch, averaged.
A library that is not installed is left out and told of; `pip install --no-deps -r benchmarks/peers.txt`
brings them all.
"""
from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from functools import partial
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast.demos.plain import LocalLinear, PlainLinear

BASE = "nn.Linear"
RHO = -3.0


class Provider(NamedTuple):
    layer: Callable[[int, int], nn.Module]         # of (in, out)
    kl: Callable[[nn.Module], Tensor] | None       # of a model after its latest call; None: has none
    wrap: Callable[[nn.Module], nn.Module] | None = None   # made of the whole model, once

    def model(self, sizes: Sequence[int], **factory) -> nn.Module:
        """A layer, or a network with ReLU between its layers; sizes: of the input and of each layer.
        factory: device and dtype."""
        layers = [module for pair in zip(sizes, sizes[1:]) for module in (self.layer(*pair), nn.ReLU())][:-1]
        model = (layers[0] if len(layers) == 1 else nn.Sequential(*layers)).to(**factory)
        return self.wrap(model) if self.wrap else model


def variational(n_in: int, n_out: int, estimator: str = "weight") -> nn.Module:
    return bf.VariationalLinear(n_in, n_out, init="blundell", estimator=estimator)


def plain(n_in: int, n_out: int, kind: type = PlainLinear) -> nn.Module:
    return kind(variational(n_in, n_out))


def kept(model: nn.Module) -> Tensor:
    """The KL of layers that keep that of their latest call as `kl`."""
    return sum(module.kl for module in model.modules() if isinstance(getattr(module, "kl", None), Tensor))


def bnn_fast(estimator: str = "weight") -> Provider:
    return Provider(partial(variational, estimator=estimator), bf.kl_divergence)


def plain_pytorch(kind: type = PlainLinear) -> Provider:
    return Provider(partial(plain, kind=kind), kept)


def compiled() -> Provider:
    torch._dynamo.config.recompile_limit = 1000  # once for each shape; beyond the limit nothing is compiled
    return Provider(plain, kept, lambda model: torch.compile(model, dynamic=False, fullgraph=True))


def bayesian_torch(name: str) -> Provider:
    from bayesian_torch import layers

    class Layer(getattr(layers, name)):
        def forward(self, x):
            y, self.kl = super().forward(x)
            return y

    return Provider(partial(Layer, posterior_rho_init=RHO), kept)


def torchbnn() -> Provider:
    from torchbnn import BayesLinear
    from torchbnn.functional import bayesian_kl_loss

    def layer(n_in, n_out):
        made = BayesLinear(0.0, 1.0, n_in, n_out)
        for name, parameter in made.named_parameters():
            if name.endswith("log_sigma"):
                nn.init.constant_(parameter, math.log(math.log1p(math.exp(RHO))))
            else:
                nn.init.normal_(parameter, std=0.1)
        return made

    return Provider(layer, lambda model: bayesian_kl_loss(model, reduction="sum"))


def blitz() -> Provider:
    from blitz.losses import kl_divergence_from_nn
    from blitz.modules import BayesianLinear

    return Provider(partial(BayesianLinear, prior_sigma_1=1.0, posterior_rho_init=RHO), kl_divergence_from_nn)


def torch_uncertainty() -> Provider:
    # The packages around this module import lightning, timm and torchvision, which the layer does not use.
    BayesLinear = module("torch_uncertainty.layers.bayesian.bayes_linear").BayesLinear

    def kl(model):
        return sum(m.log_variational_posterior - m.log_prior for m in model.modules()
                   if isinstance(m, BayesLinear))

    return Provider(partial(BayesLinear, prior_sigma_1=1.0, sigma_init=RHO), kl)


def module(name: str) -> types.ModuleType:
    """The module alone: the packages that it is in are stood for by empty ones, unless already imported."""
    root, *others = name.split(".")[:-1]
    if root in sys.modules:  # find_spec asks it, and an empty one does not know
        folders = list(sys.modules[root].__path__)
    else:
        found = importlib.util.find_spec(root)  # does not run it
        if found is None:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)
        folders = list(found.submodule_search_locations)
    package = root
    for other in [None, *others]:
        if other:
            folders, package = [f"{folder}/{other}" for folder in folders], f"{package}.{other}"
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = folders
    return importlib.import_module(name)


MAKERS = {
    BASE: lambda: Provider(nn.Linear, None),
    "bnn_fast": bnn_fast,
    "bnn_fast local": partial(bnn_fast, "local"),
    "bnn_fast flipout": partial(bnn_fast, "flipout"),
    "plain PyTorch": plain_pytorch,
    "plain PyTorch local": partial(plain_pytorch, LocalLinear),
    "torch.compile": compiled,
    "torchbnn": torchbnn,
    "bayesian-torch": lambda: bayesian_torch("LinearReparameterization"),
    "bayesian-torch flipout": lambda: bayesian_torch("LinearFlipout"),
    "blitz": blitz,
    "torch-uncertainty": torch_uncertainty,
}


def available(names: Sequence[str] = tuple(MAKERS)) -> tuple[dict[str, Provider], dict[str, str]]:
    """(providers, why the others are absent), nn.Linear first and always."""
    found, absent = {}, {}
    for name in dict.fromkeys([BASE, *names]):
        try:
            found[name] = MAKERS[name]()
        except Exception as error:  # some libraries fail in other ways than ImportError
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent
