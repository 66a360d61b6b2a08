"""The variational counterpart of nn.Bilinear."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..operators import functional
from ..priors import Normal
from .counterpart import Counterpart, in_dtype


class VariationalBilinear(Counterpart):
    """y = x1^T W x2 + b with W and b drawn at every call, one draw shared by the batch.

    Arguments: those of nn.Bilinear, then those of VariationalLinear. Priors of tensors have the shapes of nn.Bilinear's
    weight [out_features, in1_features, in2_features] and bias [out_features].

    Shapes: input1 [..., in1_features], input2 [..., in2_features] -> [..., out_features], the leading dimensions being alike.
    Under `sampling` with several samples dimension 0 of both has to be the batch.

    Raises ValueError or TypeError where an argument does not fit, or an input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.Bilinear

    def __init__(self, in1_features: int, in2_features: int, out_features: int, bias: bool = True, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        given = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        checks.flags(bias=bias)
        super().__init__({**{name: checks.positive_int(name, value) for name, value in given.items()}, "bias": bias},
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return super().forward(input1, input2)

    def check(self, n_samples: int, input1: Tensor, input2: Tensor) -> None:
        for name, x, features in (("input1", input1, "in1_features"), ("input2", input2, "in2_features")):
            checks.last_dimensions(name, x, (getattr(self, features),), features)
            self._check(name, x)
            if n_samples > 1:
                checks.repeated(name, x, n_samples, 1)
        if input1.shape[:-1] != input2.shape[:-1]:
            raise ValueError(f"input2: expected {[*input1.shape[:-1], self.in2_features]} beside input1 {list(input1.shape)}, "
                             f"given {checks.describe(input2)}")
        if input1.dtype != input2.dtype and not functional.autocasting(input1):
            raise TypeError(f"input2: expected {input1.dtype} as input1 has, given {checks.describe(input2)}")

    def compute(self, weights: dict[str, Tensor], input1: Tensor, input2: Tensor) -> Tensor:
        if functional.autocasting(input1):  # the widest dtype, on every device: the CPU's autocast leaves the operator as it is
            widest = torch.promote_types(torch.promote_types(input1.dtype, input2.dtype), weights["weight"].dtype)
            input1, input2, weights = input1.to(widest), input2.to(widest), {name: w.to(widest) for name, w in weights.items()}
        return F.bilinear(input1, input2, *in_dtype(weights, input1))
