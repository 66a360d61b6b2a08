"""The variational counterpart of nn.Linear."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..operators import arguments as packing
from ..operators import autograd, functional, raw
from ..priors import Normal
from .estimators import Estimating
from .modes import Mode
from .ordinary import ordinary


class VariationalLinear(Estimating):
    """y = x W^T + b with W ~ N(weight_mu, sigma(weight_rho)^2), b ~ N(bias_mu, sigma(bias_rho)^2).

    Every call draws the weights anew, one draw shared by the batch, in training and in evaluation alike;
    `sampling` and `freeze` change that. The KL divergence to the prior is read with `kl_divergence`.

    Args:
        in_features, out_features: as in nn.Linear.
        bias: whether there is a bias.
        prior: Normal, of numbers or tensors [out, in]; the tensors become buffers. A torch.distributions.Normal
            will do, too. Both priors may be set later: `layer.prior = Normal(0.0, 2.0)` is the weight's alone.
        bias_prior: Normal, of numbers or tensors [out]; `prior` where that is made of numbers.
        scale: what rho means: "softplus" sigma = log(1 + e^rho), "exp" e^rho, "sqrt_exp" e^(rho/2), "square" rho^2, "identity" rho, of
            either sign (the standard deviation is |rho|). At rho = 0 the last two have sigma 0 and an infinite KL.
        kl: "analytic", or "sampled": log q(w) - log p(w) at the drawn weights.
        init: a named initialisation, see `bnn_fast.initialisation`.
        init_sigma: the standard deviation that every weight begins with, in place of that of `init`.
        estimator: how outputs become random: "weight" draws weights, "local" each output of each example by itself, "flipout"
            weights that each example sees with signs of its own; see `bnn_fast.functional.variational_linear`. Where one network
            is asked for (`sampling` with a seed or pinned=True, `freeze`, `draw`, `predict(joint=True)`) weights are drawn,
            whatever it is.

    Shapes: x [..., in] -> y [..., out]. Parameters weight_mu, weight_rho [out, in], bias_mu, bias_rho [out]
    or None. Under autocast x and y have the autocast dtype; the parameters and the KL keep theirs.

    Raises ValueError or TypeError where an option is unknown, a prior's tensor or x has the wrong shape,
    dtype or device, or, under `sampling`, the batch is not divisible by n_samples. RuntimeError under torch.jit.trace with
    gradients on, and where a layer whose estimator is not "weight", or one that shares its parameters, is called twice in one
    `ELBO`, `mc_forward` or `predict`: both calls would have the same noise.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus",
                 kl: str = "analytic", init: str = "default", init_sigma: float | None = None, estimator: str = "weight",
                 device=None, dtype=None):
        super().__init__(estimator, prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma,
                         device=device, dtype=dtype)
        checks.flags(bias=bias)
        self.in_features = in_features = checks.integer("in_features", in_features, 0)
        self.out_features = out_features = checks.integer("out_features", out_features, 0)
        self.add_posterior("weight", (out_features, in_features))
        self.add_posterior("bias", (out_features,) if bias else None, fan_in=in_features)

    def forward(self, x: Tensor) -> Tensor:
        if (steps := ordinary()) is not None and (y := steps.call(self, x)) is not None:
            return y
        compiling = torch.compiler.is_compiling()
        functorch = not compiling and torch._C._are_functorch_transforms_active()
        mode, recomputed = self._mode(compiling)
        if self._pruned and not compiling:
            self.keep_pruned()
        weight_mu, weight_rho, bias_mu, bias_rho = parameters = self.tensors()
        x = functional.autocast(x)
        checks.linear_input(x, weight_mu, mode.n_samples)
        if mode.mean:  # in x's type, as the drawn weights are rounded to it
            return self.compute({"weight": weight_mu, "bias": bias_mu}, x)
        key, estimator = self._key(mode, weight_mu.device), "weight"
        if self.estimator != "weight" and not self._one_network(mode):
            key, estimator = self._noise_of(mode, key, x, recomputed), self.estimator
        with_kl = torch.is_grad_enabled() and not recomputed and not functorch
        if not raw.compiled_for(weight_mu.device):
            y, kl = functional.plain_linear(x, *parameters, key, prior=self.prior, bias_prior=self.bias_prior,
                                            scale=self.scale, kl=None, n_samples=mode.n_samples, estimator=estimator)
        else:
            there = 2 if bias_mu is None else 4
            prior = packing.pack_prior(self.priors()[:there] if self.prior_tensors else (), self._numbers[:there])
            arguments = packing.to_draw(list(parameters[:there]), key, prior, self.scale, self.kl if with_kl else None,
                                        mode.n_samples, estimator=estimator)
            operator = autograd.LINEAR if estimator == "weight" else autograd.ESTIMATED
            y, kl = self._run(operator, (x,), arguments, compiling or functorch)
        if not recomputed and not functorch:  # under torch.func the tensors are the transform's
            self._remember(self._registered(parameters), key, mode.n_samples, None if kl is None else (kl,), compiling)
        return y

    def _noise_of(self, mode: Mode, key: Tensor, x: Tensor, recomputed: bool) -> Tensor:
        """The key for these examples, which may be a part of a batch."""
        first_row = self._first_row(mode, x, recomputed)
        return key if first_row is None else torch.cat([key, torch.full_like(key[:1], first_row)])

    def shares(self, x: Tensor) -> bool:
        """Other estimators count their noise by the number of the row."""
        return (type(self).forward is VariationalLinear.forward and self.estimator == "weight" and x.dim() >= 2
                and x.shape[-1] == self.in_features)

    def tensors(self) -> tuple:
        parameters = self._parameters  # a look-up through nn.Module costs several times as much
        try:
            return (parameters["weight_mu"], parameters["weight_rho"],
                    parameters["bias_mu"], parameters["bias_rho"])
        except KeyError:  # reparametrized by torch.nn.utils
            return self.weight_mu, self.weight_rho, self.bias_mu, self.bias_rho

    def compute(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        bias = weights.get("bias")
        return F.linear(x, weights["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def drawn(self, key: Tensor | None) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias_mu is not None, device="meta")
        for name, w in self.weights(key).items():
            setattr(linear, name, nn.Parameter(w))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_mu is not None}, "
                f"{super().extra_repr()}")
