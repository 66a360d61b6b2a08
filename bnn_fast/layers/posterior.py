"""What a layer is made of: its posteriors, (mu, rho) pairs of parameters, each with the prior that belongs to it."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..operators.arguments import pack_priors
from ..priors import Normal, as_normal, initialisation
from ..priors.scales import deviation_of
from . import steps
from .fastpath import NO_WEIGHT, asked_by_a_transformer

_KLS = {name: code for name, code in checks.KLS.items() if name is not None}


_MANY = 16  # stream of the first of more than two posteriors; 0 and 1 are those of a weight and a bias


class Pair(NamedTuple):
    """The posterior of one tensor of weights; `name` is that of the weights ("weight", "bias")."""
    name: str
    mu: Tensor
    rho: Tensor
    prior: Normal
    stream: int     # of the noise
    fan_in: int
    begin: float | None     # all the means, in place of what `init` gives


class Posterior(nn.Module):
    """A module whose weights have posteriors. `add_posterior` makes them; VariationalLayer draws them.

    Args:
        prior: Normal, of numbers or tensors of the weight's shape; the tensors become buffers. A torch.distributions.Normal
            will do, too.
        bias_prior: the same for biases, which are the tensors with "bias" in their name; `prior` where that is made of numbers.
        scale: what rho means: "softplus" sigma = log(1 + e^rho), "exp" e^rho, "sqrt_exp" e^(rho/2), "square" rho^2, "identity" rho, of
            either sign (the standard deviation is |rho|). At rho = 0 the last two have sigma 0 and an infinite KL.
        kl: "analytic", or "sampled": log q(w) - log p(w) at the drawn weights.
        init: a named initialisation, see `bnn_fast.initialisation`.
        init_sigma: the standard deviation that every weight begins with, in place of that of `init`.
        device, dtype: of the parameters.
    """

    def __init__(self, *, prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus",
                 kl: str = "analytic", init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        super().__init__()
        checks.choice("scale", scale, checks.SCALES)
        checks.choice("kl", kl, _KLS)
        checks.choice("init", init, initialisation.INITIALISATIONS)
        self.scale, self.kl, self.init, self.init_sigma = scale, kl, init, checks.positive("init_sigma", init_sigma)
        self._given = {"device": device, "dtype": dtype}, prior, bias_prior  # for add_posterior
        self._fans: dict[str, int] = {}     # fan-in of each posterior, by name, in their order
        self._begins: dict[str, float | None] = {}
        self.names: tuple[str, ...] = ()    # of mu and rho of each
        self._prior_names: tuple[str, ...] = ()
        self._prior_buffers: tuple[str, ...] = ()   # loc and scale of each prior
        self._numbers: tuple[float, ...] = ()   # loc and scale of each prior where they are numbers
        self.prior_tensors = False              # whether any are tensors
        self._pruned: dict[str, tuple[Tensor, Tensor]] = {}  # of each pair that has any: which weights, and their mu

    def add_posterior(self, name: str, shape: tuple[int, ...] | None, fan_in: int | None = None,
                      begin: float | None = None) -> None:
        """Make the parameters {name}_mu and {name}_rho of this shape and initialise them.

        Args:
            name: of the weights, as `compute` gets them. With "bias" in it they have the prior of biases and begin as
                biases do.
            shape: None for one that is left out, as the bias of a layer without: its parameters are None.
            fan_in: inputs of one output, by which `init` scales; the product of shape[1:], or 1, by default.
            begin: what all its means begin with, in place of what `init` gives: 1 for a gain.

        TypeError or ValueError if the layer has the name already, or its prior does not fit.
        """
        if f"{name}_mu" in self._parameters:
            raise ValueError(f"name: expected a new one beside {', '.join(self._fans)}, given {name!r}")
        for kind in ("mu", "rho"):
            self.register_parameter(f"{name}_{kind}", None if shape is None else nn.Parameter(torch.empty(shape, **self._given[0])))
        self._fans[name] = (math.prod(shape[1:]) if shape else 1) if fan_in is None else fan_in
        self._begins[name] = begin
        self.names += (f"{name}_mu", f"{name}_rho")
        prior_name = "prior" if name == "weight" else f"{name}_prior"
        self._prior_names += (prior_name,)
        self._prior_buffers += (f"{prior_name}_loc", f"{prior_name}_scale")
        self._numbers += (0.0, 1.0)
        self._put_prior(name, self._first_prior(name))
        if shape is not None:
            at = len(self._fans) - 1
            pair = Pair(name, *(self._parameters[n] for n in self.names[-2:]), self._prior(at), at, self._fans[name], begin)
            initialisation.initialise(self.init, [pair], self.scale, self.init_sigma)

    def reset_parameters(self) -> None:
        """Draw the parameters again as `init` and `init_sigma` say."""
        initialisation.initialise(self.init, self.pairs(), self.scale, self.init_sigma)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """mu and rho of each posterior, None for those left out."""
        return tuple(getattr(self, name) for name in self.names)

    def pairs(self) -> list[Pair]:
        """Every posterior that there is."""
        if self._pruned and not torch.compiler.is_compiling():
            self.keep_pruned()
        tensors, first = self.tensors(), 0 if len(self._fans) <= 2 else _MANY
        return [Pair(name, tensors[2 * i], tensors[2 * i + 1], self._prior(i), first + i, fan_in, self._begins[name])
                for i, (name, fan_in) in enumerate(self._fans.items()) if tensors[2 * i] is not None]

    def priors(self) -> tuple[Tensor | None, ...]:
        """loc and scale of each prior, None for those of numbers."""
        buffers = self._buffers
        return tuple([buffers[name] for name in self._prior_buffers])

    def options(self) -> tuple:
        """What the KL depends on beside the tensors."""
        return self._numbers, self.scale, self.kl

    @torch.no_grad()
    def posterior(self) -> dict[str, Normal]:
        """The posteriors by name, as detached copies; a pruned weight's scale is 1, as a prior's is positive."""
        return {pair.name: Normal.unchecked(pair.mu.detach().clone(), self._scale_of(pair)) for pair in self.pairs()}

    def set_prior(self, name: str, prior: Normal) -> None:
        """Give the posterior of this name a prior, of numbers or of tensors of its shape; its KL is to that from now on."""
        if name not in self._fans:
            raise ValueError(f"name: expected one of {', '.join(self._fans)}, given {name!r}")
        self._put_prior(name, self.fitting_prior(name, prior))

    @property
    def prior(self) -> Normal:
        """Of the weights: of the first of them, None if there are none. Set, it is that of all of them."""
        return self._prior_of_kind(False)

    @prior.setter
    def prior(self, prior: Normal) -> None:
        self._set_priors(False, prior)

    @property
    def bias_prior(self) -> Normal:
        """Of the biases, as `prior`."""
        return self._prior_of_kind(True)

    @bias_prior.setter
    def bias_prior(self, prior: Normal) -> None:
        self._set_priors(True, prior)

    @torch.no_grad()
    def find_pruned(self) -> None:
        """Look which weights have rho = -inf; they stay pruned from now on."""
        self._pruned = {}
        for pair in self.pairs():
            if not pair.rho.is_meta and (mask := pair.rho == -torch.inf).any():
                self._pruned[pair.name] = mask, pair.mu.detach().clone()
        if self._pruned:
            steps.pruned.add(self)

    @torch.no_grad()
    def keep_pruned(self) -> None:
        """Set pruned weights to what they are: weight decay and averages make NaN of -inf, momentum moves mu."""
        for name, (mask, kept) in self._pruned.items():
            mu, rho = getattr(self, f"{name}_mu"), getattr(self, f"{name}_rho")
            if mask.device != mu.device:
                mask, kept = self._pruned[name] = mask.to(mu.device), kept.to(mu.device)
            # through .data: these very values are what every graph has seen, so no version is raised
            mu.data.copy_(torch.where(mask, kept.to(mu.dtype), mu.data))
            rho.data.masked_fill_(mask, -torch.inf)
        if self._pruned:
            steps.pruned.add(self)  # a copy is not there yet

    def __getattr__(self, name: str):
        kind = name.removesuffix("_sigma")
        fans = self.__dict__.get("_fans", ())
        if kind in fans:
            if kind != name:
                rho = getattr(self, f"{kind}_rho")
                return None if rho is None else _sigma(rho, self.scale)
            if asked_by_a_transformer():
                return NO_WEIGHT
            raise AttributeError(
                f"{type(self).__name__} has no {name}: it draws one at every call. Its mean is {name}_mu, its standard deviation "
                f"{name}_sigma; bnn_fast.draw(model, seed) gives one draw as an ordinary module, and bnn_fast.Variational(module) draws "
                f"the parameters of a module that takes the {name} of another")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name.endswith("_sigma") and name.removesuffix("_sigma") in self.__dict__.get("_fans", ()):
            raise AttributeError(f"{name} is what {name.removesuffix('sigma')}rho means under scale={self.scale!r}, and cannot be set: "
                                 f"init_sigma=... is for a new layer, {name.removesuffix('sigma')}rho for any")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        there = [i for i in range(len(self._fans)) if self._parameters.get(self.names[2 * i], 1) is not None]
        weights, biases = ([i for i in there if i in self._of_kind(kind)] for kind in (False, True))
        text = [f"prior={self._prior(weights[0])}"] if weights else []
        if biases and (not weights or self._prior(biases[0]) != self._prior(weights[0])):
            text.append(f"bias_prior={self._prior(biases[0])}")
        text += [f"scale={self.scale!r}", f"kl={self.kl!r}", f"init={self.init!r}"]
        if self.init_sigma is not None:
            text.append(f"init_sigma={self.init_sigma}")
        mu = next((t for t in self.tensors() if t is not None), None)
        if mu is not None and mu.device.type != "cpu":
            text.append(f"device='{mu.device}'")
        if mu is not None and mu.dtype != torch.get_default_dtype():
            text.append(f"dtype={mu.dtype}")
        return ", ".join(text)

    def _is_bias(self, name: str) -> bool:
        return "bias" in name

    def _of_kind(self, biases: bool) -> list[int]:
        return [i for i, name in enumerate(self._fans) if self._is_bias(name) == biases]

    def _prior_of_kind(self, biases: bool) -> Normal | None:
        found = self._of_kind(biases)
        return self._prior(found[0]) if found else None

    def _set_priors(self, biases: bool, prior: Normal) -> None:
        names = [list(self._fans)[i] for i in self._of_kind(biases)]
        for name, fitting in [(name, self.fitting_prior(name, prior)) for name in names]:  # all are looked at before any is set
            self._put_prior(name, fitting)

    def _first_prior(self, name: str) -> Normal:
        """That which the constructor's arguments give it."""
        _, prior, bias_prior = self._given
        if self._is_bias(name) and bias_prior is not None:
            return self.fitting_prior(name, bias_prior)
        if self._is_bias(name) and as_normal("prior", prior, None).has_tensors:  # it is the weights' alone
            if self._parameters[f"{name}_mu"] is not None:
                raise ValueError("bias_prior: expected a prior for the bias, as the weight's holds tensors, given None")
            prior = Normal(0.0, 1.0)
        return self.fitting_prior(name, prior)

    def fitting_prior(self, name: str, prior: Normal) -> Normal:
        """prior as a Normal for the posterior of this name; TypeError or ValueError if it cannot be."""
        at = list(self._fans).index(name)
        label, mu = self._prior_names[at], getattr(self, f"{name}_mu")
        prior = as_normal(label, prior, mu)
        for kind, value in (("loc", prior.loc), ("scale", prior.scale)):
            if isinstance(value, Tensor) and mu is None:
                raise ValueError(f"{label}: expected numbers or None where {name}=False, given {prior}")
            if isinstance(value, Tensor) and value.shape != mu.shape:
                raise ValueError(f"{label}.{kind}: expected a number or a tensor {list(mu.shape)}, "
                                 f"given {checks.describe(value)}")
        return prior

    def _put_prior(self, name: str, prior: Normal) -> None:
        """A prior's tensors become buffers, its numbers are kept as the operators take them."""
        at, mu = list(self._fans).index(name), getattr(self, f"{name}_mu")
        for kind, value in (("loc", prior.loc), ("scale", prior.scale)):
            self.register_buffer(f"{self._prior_names[at]}_{kind}",
                                 value.detach().to(mu).clone() if isinstance(value, Tensor) else None)
        numbers = pack_priors(prior).numbers
        self._numbers = (*self._numbers[:2 * at], *numbers, *self._numbers[2 * at + 2:])
        self.prior_tensors = any(t is not None for t in self.priors())

    def _prior(self, at: int) -> Normal:
        loc, scale = (number if tensor is None else tensor for number, tensor in zip(
            self._numbers[2 * at:2 * at + 2], (self._buffers[name] for name in self._prior_buffers[2 * at:2 * at + 2])))
        return Normal.unchecked(loc, scale)

    def _scale_of(self, pair: Pair) -> Tensor:
        """The posterior's standard deviation where a prior's has to be positive."""
        sigma = _sigma(pair.rho.detach(), self.scale).clamp(min=torch.finfo(pair.rho.dtype).tiny)
        return sigma.masked_fill(pair.rho == -torch.inf, 1.0)


def _sigma(rho: Tensor, scale: str) -> Tensor:
    return deviation_of(rho.to(torch.promote_types(rho.dtype, torch.float32)), scale).to(rho.dtype)
