"""What the layers of other libraries are: their counterparts here, and where and how they keep means, sigmas and priors.

They are known by the module and the name of their class, so that none of the libraries is needed.
"""
from __future__ import annotations

import re
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import VariationalLayer
from ..priors import Normal
from .chosen import COUNTERPARTS

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_SPACES = (1, 2, 3)


class Library(NamedTuple):
    """How a library keeps its posteriors; `{}` stands for its name of a tensor of weights."""
    mu: str
    rho: str
    scale: str          # what rho means
    layers: str         # the packages of its Bayesian layers, as a pattern of their paths
    mark: str           # pattern of keys by which its state_dicts are known
    beside: str         # pattern of a layer's keys that hold nothing of the posterior: noise, copies, priors
    prior: Callable[[nn.Module, str], object]           # (layer, its name of a tensor) -> the prior, or in words what it is
    frozen: Callable[[nn.Module], bool]                 # whether the layer does not draw


class Peer(NamedTuple):
    """A layer of another library."""
    ordinary: type[nn.Module]   # torch's module that it is a Bayesian kind of
    arguments: Callable[[nn.Module], dict]      # of the constructor of the counterpart


def _take(module: nn.Module, *names: str) -> dict:
    return {name: getattr(module, name) for name in names}


def _linear(has_bias: Callable[[nn.Module], bool]) -> Peer:
    return Peer(nn.Linear, lambda m: {**_take(m, "in_features", "out_features"), "bias": has_bias(m)})


def _convolution(dimensions: int, has_bias: Callable[[nn.Module], bool], *more: str, transposed: bool = False) -> Peer:
    return Peer(getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d"),
                lambda m: {**_take(m, *_CONVOLUTION, *more), "bias": has_bias(m)})


def _recurrence(ordinary: type[nn.Module], has_bias: Callable[[nn.Module], bool]) -> Peer:
    def arguments(m: nn.Module) -> dict:
        for option in ("peephole", "sharpen"):
            if getattr(m, option, False):
                raise ValueError(f"model: expected layers that have a counterpart, given a {type(m).__name__} with {option}=True")
        return {"input_size": m.in_features, "hidden_size": m.out_features, "bias": has_bias(m), "batch_first": True}

    return Peer(ordinary, arguments)


def _torchbnn_convolution(m: nn.Module) -> dict:
    """It pads circularly by half of what torch does, and with zeros where it is told any other way."""
    arguments = {**_take(m, *_CONVOLUTION), "bias": bool(m.bias)}
    if m.padding_mode != "circular":
        return arguments
    if any(size % 2 for size in m.padding):
        raise ValueError(f"model: expected a circular padding that is even, given {m.padding} of a BayesConv2d, which pads unevenly then")
    return {**arguments, "padding": tuple(size // 2 for size in m.padding), "padding_mode": "circular"}


def _has_mu_bias(m: nn.Module) -> bool:
    return m.mu_bias is not None


def _has_bias_mu(m: nn.Module) -> bool:
    return m.bias_mu is not None


def _blitz_bias(m: nn.Module) -> bool:
    return bool(m.bias)     # blitz's BayesianLinear has parameters for it either way


def _blitz_use_bias(m: nn.Module) -> bool:
    return bool(m.use_bias)


_BAYESIAN_TORCH = {"Linear": _linear(_has_mu_bias), "LSTM": _recurrence(nn.LSTM, lambda m: _has_mu_bias(m.ih)),
                   **{f"Conv{d}d": _convolution(d, _has_mu_bias) for d in _SPACES},
                   **{f"ConvTranspose{d}d": _convolution(d, _has_mu_bias, "output_padding", transposed=True) for d in _SPACES}}
_PEERS = {
    "bayesian_torch": {f"{name}{estimator}": peer for name, peer in _BAYESIAN_TORCH.items()
                       for estimator in ("Reparameterization", "Flipout")},
    "torchbnn": {"BayesLinear": _linear(_has_bias_mu), "BayesConv2d": Peer(nn.Conv2d, _torchbnn_convolution),
                 "BayesBatchNorm2d": Peer(nn.BatchNorm2d, lambda m: _take(
                     m, "num_features", "eps", "momentum", "affine", "track_running_stats"))},
    # An embedding's padding row is drawn there as the others are.
    "blitz": {"BayesianLinear": _linear(_blitz_bias), **{f"BayesianConv{d}d": _convolution(d, _blitz_bias) for d in _SPACES},
              "BayesianEmbedding": Peer(nn.Embedding, lambda m: _take(
                  m, "num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")),
              "BayesianLSTM": _recurrence(nn.LSTM, _blitz_use_bias), "BayesianGRU": _recurrence(nn.GRU, _blitz_use_bias)},
    "torch_uncertainty": {"BayesLinear": _linear(_has_bias_mu),
                          **{f"BayesConv{d}d": _convolution(d, _has_bias_mu, "padding_mode") for d in _SPACES}},
}


def _bayesian_torch_prior(m: nn.Module, name: str) -> Normal:
    """Its prior_variance is used as a standard deviation."""
    owner, _, name = name.rpartition(".")
    m, name = m.get_submodule(owner), "bias" if name == "bias" else "weight"
    values = []
    for kind, number in (("mu", m.prior_mean), ("sigma", m.prior_variance)):
        tensor = getattr(m, f"prior_{name}_{kind}").detach()
        values.append(float(number) if (tensor.float() == torch.tensor(float(number))).all() else tensor.clone())  # MOPED sets tensors
    return Normal(*values)


def _blitz_prior(m: nn.Module, name: str) -> object:
    dist = getattr(m, f"{name}_prior_dist")
    if dist.dist2 is None:
        given = dist.dist1
        return given if isinstance(given, torch.distributions.Normal) else checks.describe(given)
    return _mixture(dist.pi, dist.sigma1, dist.sigma2)


def _torch_uncertainty_prior(m: nn.Module, name: str) -> object:
    dist = getattr(m, f"{name}_prior_dist")
    return _mixture(*(float(f"{value.item():.7g}") for value in (dist.pi[0], *dist.sigmas)))   # as it was given, not as float32 has it


def _mixture(pi: float, sigma_1: float, sigma_2: float) -> object:
    if pi == 1 or sigma_1 == sigma_2:
        return Normal(0.0, sigma_1)
    if pi == 0:
        return Normal(0.0, sigma_2)
    alike = (pi * sigma_1 ** 2 + (1 - pi) * sigma_2 ** 2) ** 0.5
    return f"the scale mixture {pi:g} N(0, {sigma_1:g}^2) + {1 - pi:g} N(0, {sigma_2:g}^2), whose standard deviation is {alike:.4g}"


LIBRARIES = {
    "bayesian_torch": Library(
        "mu_{}", "rho_{}", "softplus", r"bayesian_torch\.layers\.(variational|flipout)_layers\b", r"(^|\.)mu_(weight|kernel)$",
        r"((ih|hh)\.)?(eps|prior)_(weight|kernel|bias)(_mu|_sigma)?", _bayesian_torch_prior, lambda m: False),
    "torchbnn": Library(
        "{}_mu", "{}_log_sigma", "exp", r"torchbnn\.modules\b", r"(^|\.)weight_log_sigma$", r"(?!)",
        lambda m, name: Normal(m.prior_mu, m.prior_sigma), lambda m: m.weight_eps is not None),
    "blitz": Library(
        "{}_sampler.mu", "{}_sampler.rho", "softplus", r"blitz\b", r"(^|\.)weight(_ih)?_sampler\.eps_w$",
        r"(weight|weight_ih|weight_hh|bias)_(mu|rho|sampler\.eps_w)|bias_zero", _blitz_prior, lambda m: bool(m.freeze)),
    "torch_uncertainty": Library(
        "{}_mu", "{}_sigma", "softplus", r"torch_uncertainty\.layers\.bayesian\b", r"(^|\.)weight_sigma$",
        r"(weight|bias)_(sampler\.(mu|rho)|prior_dist\.(pi|mus|sigmas))", _torch_uncertainty_prior, lambda m: bool(m.frozen)),
}


def recognise(module: nn.Module) -> tuple[str, Peer] | None:
    """(library, what the layer is) of another library's layer."""
    return _known(type(module))


def _known(kind: type) -> tuple[str, Peer] | None:
    library = kind.__module__.partition(".")[0]
    peer = _PEERS.get(library, {}).get(kind.__name__)
    return None if peer is None else (library, peer)


def unknown(module: nn.Module) -> bool:
    """Whether it is a layer of theirs that is not known here, or a subclass of one that is."""
    kind = type(module)
    theirs = any(re.match(library.layers, kind.__module__) for library in LIBRARIES.values()) and any(
        parameter is not None for parameter in module._parameters.values())
    return theirs or any(_known(base) for base in kind.__mro__[1:])


def counterpart(peer: Peer) -> type[VariationalLayer]:
    return COUNTERPARTS[peer.ordinary]


_HALF_NAMES = {"weight_ih_l0": "ih.weight", "weight_hh_l0": "hh.weight", "bias_ih_l0": "ih.bias", "bias_hh_l0": "hh.bias"}
_BLITZ_NAMES = {"weight_ih_l0": "weight_ih", "weight_hh_l0": "weight_hh", "bias_ih_l0": "bias", "bias_hh_l0": "bias"}


def name_of(library: str, layer: VariationalLayer, pair: str) -> str:
    """The library's name of the tensor of weights that is `pair` of the layer here."""
    ordinary = getattr(layer, "ordinary", nn.Linear)
    if library == "bayesian_torch":
        return "kernel" if issubclass(ordinary, nn.modules.conv._ConvNd) and pair == "weight" else _HALF_NAMES.get(pair, pair)
    return _BLITZ_NAMES.get(pair, pair) if library == "blitz" else pair


def keys_of(library: str, name: str) -> tuple[str, str]:
    """Where the layer has mean and rho of that tensor."""
    owner, dot, name = name.rpartition(".")
    return tuple(owner + dot + form.format(name) for form in LIBRARIES[library][:2])


def arranged(library: str, layer: VariationalLayer, pair: str, value: Tensor, absent: float) -> Tensor:
    """Their tensor as the layer here has it; `absent` where they have none.

    blitz multiplies rows by its recurrences' weights, which are transposed therefore, and has one bias of the gates. Of the four parts
    of a GRU's weights the forward takes r, z and n from the input, and r, z and the last from the state.
    """
    ordinary = getattr(layer, "ordinary", nn.Linear)
    if library != "blitz" or not issubclass(ordinary, nn.RNNBase):
        return value
    gates, hidden = value.T if value.dim() == 2 else value, layer.hidden_size     # [4 H, ...]
    if pair.startswith("weight"):
        if ordinary is nn.LSTM:
            return gates
        return gates[:3 * hidden] if pair == "weight_ih_l0" else torch.cat((gates[:2 * hidden], gates[3 * hidden:]))
    if pair == "bias_ih_l0":
        return gates if ordinary is nn.LSTM else gates[:3 * hidden]
    return torch.full_like(gates, absent) if ordinary is nn.LSTM else torch.cat((torch.full_like(gates[:2 * hidden], absent),
                                                                                 gates[3 * hidden:]))
