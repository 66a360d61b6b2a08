"""Layers whose noise is for exploration: it is learned, and kept until it is drawn again."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..operators import functional
from .state import fresh_keys

_ELSEWHERE = ("weight_epsilon", "bias_epsilon")     # the noise in others' state_dicts


class NoisyLinear(nn.Module):
    """A linear layer with learned noise, for exploration (Fortunato et al., "Noisy Networks for Exploration", 2018).

    In training mode y = x W^T + b with W = weight_mu + weight_sigma * eps, b = bias_mu + bias_sigma * eps_b. The noise stays from call
    to call until `reset_noise()`; it does not depend on the batch. **In evaluation mode the means are used**, unlike in the
    variational layers, which draw in either mode: so it is in the paper, and so agents use it.

    It has no prior and no KL, and draws nothing at a call: `kl_divergence`, `ELBO`, `sampling`, `freeze`, `prune`, priors and posteriors
    pass it by; `mc_forward` and `draw` have it with the noise and in the mode that it has; `predict` runs a model in evaluation mode, and
    so with its means.

    Args:
        in_features, out_features: as in nn.Linear.
        bias: whether there is a bias.
        sigma_0: how large the noise is at first. With factorised noise sigma begins with sigma_0 / sqrt(in_features), 0.5 by default; with
            independent noise with sigma_0 itself, 0.017 by default. The paper's values, for weights and biases alike.
        factorised: eps = f(e_out) f(e_in)^T and eps_b = f(e_out), with f(e) = sign(e) sqrt |e| of as many normals as there are inputs and
            outputs. False: a normal for every weight and bias.
        device, dtype: of the parameters.
        std_init: another name of sigma_0 (torchrl's).

    Shapes: x [..., in] -> y [..., out]. Parameters weight_mu, weight_sigma [out, in], bias_mu, bias_sigma [out] or None. Means begin
    uniformly within 1 / sqrt(in_features), with independent noise within sqrt(3 / in_features). A sigma may become negative; -inf marks a weight
    without noise and gradients. The noise is a function of `noise_key`, a buffer that moves and is copied with the layer and is not in the
    state_dict. State_dicts of torchrl's layer of this name load, without the noise in them.

    Raises ValueError or TypeError where an argument does not fit, or x has the wrong shape, dtype or device.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, sigma_0: float | None = None, factorised: bool = True,
                 device=None, dtype=None, *, std_init: float | None = None):
        super().__init__()
        checks.flags(bias=bias, factorised=factorised)
        self.in_features = checks.integer("in_features", in_features, 0)
        self.out_features = checks.integer("out_features", out_features, 0)
        if sigma_0 is not None and std_init is not None:
            raise ValueError(f"std_init: expected nothing beside sigma_0, of which it is another name, given {std_init} beside {sigma_0}")
        given = checks.positive("sigma_0", sigma_0) or checks.positive("std_init", std_init)
        self.sigma_0 = given or (0.5 if factorised else 0.017)
        self.factorised = bool(factorised)
        for name, shape in (("weight", (out_features, in_features)), ("bias", (out_features,) if bias else None)):
            for kind in ("mu", "sigma"):
                parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{kind}", parameter)
        self.register_buffer("noise_key", torch.empty(2, dtype=torch.int64, device=self.weight_mu.device), persistent=False)
        self.register_load_state_dict_pre_hook(_without_noise)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin anew, with new noise."""
        inputs = max(self.in_features, 1)
        bound, sigma = math.sqrt((1.0 if self.factorised else 3.0) / inputs), self.sigma_0
        for mu, sigmas in ((self.weight_mu, self.weight_sigma), (self.bias_mu, self.bias_sigma)):
            if mu is not None:
                mu.uniform_(-bound, bound)
                sigmas.fill_(sigma / math.sqrt(inputs) if self.factorised else sigma)
        self.reset_noise()

    @torch.no_grad()
    def reset_noise(self) -> None:
        """Draw the noise of the calls from now on. Graphs of earlier calls keep theirs."""
        self.noise_key.copy_(fresh_keys(1, self.noise_key.device)[0])

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.weight_mu, self.weight_sigma, self.bias_mu, self.bias_sigma
        if not self.training:
            x = functional.autocast(x)
            checks.linear_input(x, self.weight_mu, 1)
            return F.linear(x, *(None if mu is None else mu.to(x.dtype) for mu in (self.weight_mu, self.bias_mu)))
        key = self.noise_key.clone() if torch.is_grad_enabled() else self.noise_key     # backward reads it again, after a reset too
        if self.factorised:
            return functional.noisy_linear(x, *parameters, key)
        return functional.variational_linear(x, *parameters, key, scale="identity", kl=None)[0]

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_mu is not None}, "
                f"sigma_0={self.sigma_0}, factorised={self.factorised}")


def _without_noise(layer: NoisyLinear, state_dict: dict, prefix: str, *_) -> None:
    for name in _ELSEWHERE:
        state_dict.pop(prefix + name, None)
