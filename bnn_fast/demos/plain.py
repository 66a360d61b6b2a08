"""What bnn_fast is timed against: variational layers without its operators. Nothing is trained with them."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnn_fast as bf


class PlainLinear(nn.Module):
    """VariationalLinear as it is usually written in PyTorch, with torch's own noise: softplus, prior N(0, 1).

    After a call `kl` is the KL of that pass. x [..., in] -> [..., out].
    """

    def __init__(self, layer: bf.VariationalLinear):
        super().__init__()
        self.mode = layer.kl
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        weight, weight_kl = self._draw(self.weight_mu, self.weight_rho)
        bias, bias_kl = self._draw(self.bias_mu, self.bias_rho)
        self.kl = weight_kl + bias_kl
        return F.linear(x, weight, bias)

    def _draw(self, mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        sigma = F.softplus(rho)
        eps = torch.randn_like(sigma)
        w = mu + sigma * eps
        if self.mode == "analytic":
            return w, (0.5 * (sigma.square() + mu.square()) - sigma.log() - 0.5).sum()
        return w, (0.5 * (w.square() - eps.square()) - sigma.log()).sum()


class LocalLinear(PlainLinear):
    """The same by local reparameterization: the outputs are drawn. (In float16 its squares overflow, and where its variance is 0 its
    gradients are NaN.)"""

    def forward(self, x: Tensor) -> Tensor:
        sigma, of_bias = F.softplus(self.weight_rho), F.softplus(self.bias_rho)
        mean = F.linear(x, self.weight_mu, self.bias_mu)
        variance = F.linear(x.square(), sigma.square(), of_bias.square())
        self.kl = sum((0.5 * (s.square() + mu.square()) - s.log() - 0.5).sum()
                      for mu, s in ((self.weight_mu, sigma), (self.bias_mu, of_bias)))
        return mean + variance.sqrt() * torch.randn_like(mean)


class ReferenceLinear(PlainLinear):
    """The same with bnn_fast.reference: the very noise of the fused operators, made of integer tensors."""

    def forward(self, x: Tensor) -> Tensor:
        key = torch.randint(-2 ** 63, 2 ** 63 - 1, (2,), device=x.device)
        y, self.kl = bf.reference.variational_linear(
            x, self.weight_mu, self.weight_rho, self.bias_mu, self.bias_rho, key, kl=self.mode)
        return y


def twin(model: nn.Sequential, layer) -> nn.Sequential:
    """model with layer(l) in place of each variational layer l."""
    return nn.Sequential(*(layer(l) if isinstance(l, bf.VariationalLinear) else l for l in model))


def kl(model: nn.Sequential) -> Tensor:
    """The KL of the latest pass of a `twin`."""
    return sum(l.kl for l in model if isinstance(l, PlainLinear))
