"""The variational counterpart of nn.Linear."""
from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..operators import autograd, functional, raw
from ..priors import Normal, as_normal, initialisation
from ..priors.scales import sigma_of
from .base import Pair, VariationalLayer

_tracing = torch._C._get_tracing_state
_TRANSFORMER = "torch.nn.modules.transformer"


class _NoWeight:
    """What nn.TransformerEncoderLayer and nn.TransformerEncoder see as `linear1.weight` when they look whether
    their fused inference path can run. It cannot, as it takes the weight and calls no layer; they leave it where
    a weight has a __torch_function__ of its own.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise TypeError("a VariationalLinear has no weight, it draws one at every call: "
                        "torch.backends.mha.set_fastpath_enabled(False) turns off what asks for it")


_NO_WEIGHT = _NoWeight()


class VariationalLinear(VariationalLayer):
    """y = x W^T + b with W ~ N(weight_mu, sigma(weight_rho)^2), b ~ N(bias_mu, sigma(bias_rho)^2).

    Every call draws the weights anew, one draw shared by the batch, in training and in evaluation alike;
    `sampling` and `freeze` change that. The KL divergence to the prior is read with `kl_divergence`.

    Args:
        in_features, out_features: as in nn.Linear.
        bias: whether there is a bias.
        prior: Normal, of numbers or tensors [out, in]; the tensors become buffers. A torch.distributions.Normal
            will do, too. Both priors may be set later: `layer.prior = Normal(0.0, 2.0)` is the weight's alone.
        bias_prior: Normal, of numbers or tensors [out]; `prior` where that is made of numbers.
        scale: what rho means: "softplus" sigma = log(1 + e^rho), "exp" e^rho, "sqrt_exp" e^(rho/2).
        kl: "analytic", or "sampled": log q(w) - log p(w) at the drawn weights.
        init: a named initialisation, see `bnn_fast.priors.initialisation`.

    Shapes: x [..., in] -> y [..., out]. Parameters weight_mu, weight_rho [out, in], bias_mu, bias_rho [out]
    or None. Under autocast x and y have the autocast dtype; the parameters and the KL keep theirs.

    Raises ValueError or TypeError where an option is unknown, a prior's tensor or x has the wrong shape,
    dtype or device, or, under `sampling`, the batch is not divisible by n_samples. RuntimeError under torch.jit.trace with
    gradients on.
    """

    names = ("weight_mu", "weight_rho", "bias_mu", "bias_rho")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus",
                 kl: str = "analytic", init: str = "default", device=None, dtype=None):
        super().__init__()
        checks.choice("scale", scale, checks.SCALES)
        checks.choice("kl", kl, {k: v for k, v in checks.KLS.items() if k is not None})
        checks.choice("init", init, initialisation.INITIALISATIONS)
        checks.flags(bias=bias)
        self.in_features = in_features = checks.integer("in_features", in_features, 0)
        self.out_features = out_features = checks.integer("out_features", out_features, 0)
        self.scale, self.kl, self.init = scale, kl, init
        new = {"device": device, "dtype": dtype}
        for name, shape in (("weight", (out_features, in_features)), ("bias", (out_features,))):
            for kind in ("mu", "rho"):
                present = bias or name == "weight"
                self.register_parameter(f"{name}_{kind}",
                                        nn.Parameter(torch.empty(shape, **new)) if present else None)
        prior, bias_prior = functional.priors_of(prior, bias_prior, self.weight_mu, self.bias_mu)
        # loc and scale of the weight's prior and of the bias's, where they are numbers
        self._numbers = (*self._register_prior("prior", prior, self.weight_mu),
                         *self._register_prior("bias_prior", bias_prior, self.bias_mu))
        self.prior_tensors = any(t is not None for t in self.priors())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters again as `init` says."""
        initialisation.initialise(self.init, self.pairs(), self.in_features, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        functorch = not compiling and torch._C._are_functorch_transforms_active()
        mode, recomputed = self._mode(compiling)
        if self._pruned and not compiling:
            self.keep_pruned()
        weight_mu, weight_rho, bias_mu, bias_rho = parameters = self.tensors()
        x = functional.autocast(x)
        checks.linear_input(x, weight_mu, mode.n_samples)
        if mode.mean:  # in x's type, as the drawn weights are rounded to it
            return F.linear(x, weight_mu.to(x.dtype), None if bias_mu is None else bias_mu.to(x.dtype))
        key = self._key(mode, weight_mu.device)
        gradients = torch.is_grad_enabled()
        with_kl = gradients and not recomputed and not functorch
        if not raw.compiled_for(weight_mu.device):
            y, kl = functional.plain_linear(x, *parameters, key, prior=self.prior, bias_prior=self.bias_prior,
                                            scale=self.scale, kl=None, n_samples=mode.n_samples)
        else:
            arguments = (
                weight_mu, weight_rho, bias_mu, bias_rho, key, *self.priors(), *self._numbers,
                checks.SCALES[self.scale], checks.KLS[self.kl] if with_kl else 0, mode.n_samples, 0, 0)
            if compiling or functorch:
                y, kl = autograd.LINEAR.apply(x, *arguments)
            elif gradients:
                if _tracing() is not None:
                    raise RuntimeError("torch.jit.trace would lose the gradients of drawn weights: trace under "
                                       "torch.no_grad(), or trace bnn_fast.draw(model, seed), an ordinary module")
                y, kl = autograd.draw(autograd.LINEAR, x, arguments)
            else:
                y, kl = raw.variational_linear(x, *arguments)
        if not recomputed and not functorch:  # under torch.func the tensors are the transform's
            if "parametrizations" in self._modules:
                kl = None  # two backward passes would walk the parametrization twice
            self._remember(self._registered(parameters), key, mode.n_samples, kl, compiling)
        return y

    def tensors(self) -> tuple:
        parameters = self._parameters  # a look-up through nn.Module costs several times as much
        try:
            return (parameters["weight_mu"], parameters["weight_rho"],
                    parameters["bias_mu"], parameters["bias_rho"])
        except KeyError:  # reparametrized by torch.nn.utils
            return self.weight_mu, self.weight_rho, self.bias_mu, self.bias_rho

    def pairs(self) -> list[Pair]:
        if self._pruned and not torch.compiler.is_compiling():
            self.keep_pruned()
        pairs = [Pair("weight", self.weight_mu, self.weight_rho, self.prior, 0)]
        if self.bias_mu is not None:
            pairs.append(Pair("bias", self.bias_mu, self.bias_rho, self.bias_prior, 1))
        return pairs

    def priors(self) -> tuple:
        buffers = self._buffers
        return (buffers["prior_loc"], buffers["prior_scale"], buffers["bias_prior_loc"], buffers["bias_prior_scale"])

    def options(self) -> tuple:
        return self._numbers, self.scale, self.kl

    def drawn(self, key: Tensor | None) -> nn.Linear:
        """The nn.Linear that this layer is under `key`; None for the one of the means."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias_mu is not None, device="meta")
        for pair in self.pairs():
            w = pair.mu.detach().clone() if key is None else functional.sample_normal(
                pair.mu, pair.rho, key, scale=self.scale, kl=None, stream=pair.stream)[0]
            setattr(linear, pair.name, nn.Parameter(w))
        return linear.train(self.training)

    @property
    def weight_sigma(self) -> Tensor:
        """sigma(weight_rho) [out, in]."""
        return self._sigma(self.weight_rho)

    @property
    def bias_sigma(self) -> Tensor | None:
        """sigma(bias_rho) [out], or None."""
        return None if self.bias_rho is None else self._sigma(self.bias_rho)

    def _sigma(self, rho: Tensor) -> Tensor:
        return sigma_of(rho.to(torch.promote_types(rho.dtype, torch.float32)),
                                  self.scale).to(rho.dtype)

    @property
    def prior(self) -> Normal:
        return self._prior("prior", 0)

    @prior.setter
    def prior(self, prior: Normal) -> None:
        self._set_prior("prior", 0, prior, self.weight_mu)

    @property
    def bias_prior(self) -> Normal:
        return self._prior("bias_prior", 2)

    @bias_prior.setter
    def bias_prior(self, prior: Normal) -> None:
        self._set_prior("bias_prior", 2, prior, self.bias_mu)

    def __getattr__(self, name: str):
        if name == "weight" or name == "bias":
            if torch.compiler.is_compiling() or sys._getframe(1).f_globals.get("__name__") == _TRANSFORMER:
                return _NO_WEIGHT
            raise AttributeError(
                f"VariationalLinear has no {name}: it draws one at every call. Its mean is {name}_mu, its "
                f"standard deviation {name}_sigma; bnn_fast.draw(model, seed) gives one draw as an nn.Linear")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        same = self.bias_mu is None or self.bias_prior == self.prior
        bias_prior = "" if same else f", bias_prior={self.bias_prior}"
        text = (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias_mu is not None}, prior={self.prior}{bias_prior}, "
                f"scale={self.scale!r}, kl={self.kl!r}, init={self.init!r}")
        if self.weight_mu.device.type != "cpu":
            text += f", device='{self.weight_mu.device}'"
        if self.weight_mu.dtype != torch.get_default_dtype():
            text += f", dtype={self.weight_mu.dtype}"
        return text

    def _register_prior(self, name: str, prior: Normal, mu: Tensor | None) -> list[float]:
        """A prior's tensors become buffers, its numbers are returned as the operators take them."""
        loc, scale, *numbers = functional.prior_arguments(prior)
        tensors = {}
        for kind, tensor in (("loc", loc), ("scale", scale)):
            if tensor is not None and mu is None:
                raise ValueError(f"{name}: expected numbers or None where bias=False, given {prior}")
            if tensor is not None and tensor.shape != mu.shape:
                raise ValueError(f"{name}.{kind}: expected a number or a tensor {list(mu.shape)}, "
                                 f"given {checks.describe(tensor)}")
            tensors[f"{name}_{kind}"] = None if tensor is None else tensor.detach().to(mu).clone()
        for buffer, tensor in tensors.items():
            self.register_buffer(buffer, tensor)
        return numbers

    def _set_prior(self, name: str, at: int, prior: Normal, mu: Tensor | None) -> None:
        numbers = self._register_prior(name, as_normal(name, prior, mu), mu)
        self._numbers = (*self._numbers[:at], *numbers, *self._numbers[at + 2:])
        self.prior_tensors = any(t is not None for t in self.priors())

    def _prior(self, name: str, at: int) -> Normal:
        loc, scale = self._buffers[f"{name}_loc"], self._buffers[f"{name}_scale"]
        return Normal.unchecked(self._numbers[at] if loc is None else loc,
                                self._numbers[at + 1] if scale is None else scale)
