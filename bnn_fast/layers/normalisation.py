"""The variational counterparts of torch's normalisations."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..priors import Normal
from .counterpart import Counterpart, in_dtype


class _Norm(Counterpart):
    """The weight is a gain: its means begin with 1, whatever `init` says."""
    begins = {"weight": 1.0}

    def _fan_in(self, module: nn.Module) -> int:
        return 1

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def _check_channels(self, n_samples: int, input: Tensor, argument: str, dimensions: tuple[int, ...] = ()) -> None:
        """input [B, C, ...]; of one of these numbers of dimensions, if any are given."""
        channels = getattr(self, argument)
        expected = f"a tensor [B, {channels}, ...] ({argument})"
        if dimensions:
            expected += f" of {' or '.join(map(str, dimensions))} dimensions"
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected {expected}, given {checks.describe(input)}")
        if input.dim() < 2 or input.shape[1] != channels or (dimensions and input.dim() not in dimensions):
            raise ValueError(f"input: expected {expected}, given {checks.describe(input)}")
        self._check("input", input)
        checks.repeated("input", input, n_samples, 1)


class VariationalLayerNorm(_Norm):
    """nn.LayerNorm with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.LayerNorm, then those of VariationalLinear. Priors of tensors have the shape normalized_shape.
    Without elementwise_affine there is nothing to draw, and no KL. The weight's means begin with 1; under a prior N(1, 1)
    they would be at its centre.

    Shapes: input [..., *normalized_shape] -> the same. Under `sampling` with several samples dimension 0 has to be the batch.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.LayerNorm

    def __init__(self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        checks.flags(elementwise_affine=elementwise_affine, bias=bias)
        count = len(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else 1
        shape = checks.sizes("normalized_shape", normalized_shape, count, 1)
        super().__init__(dict(normalized_shape=shape, eps=checks.number("eps", eps), elementwise_affine=elementwise_affine,
                              bias=bias),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)

    def check(self, n_samples: int, input: Tensor) -> None:
        checks.last_dimensions("input", input, self.normalized_shape, "normalized_shape")
        self._check("input", input)
        if n_samples > 1:
            checks.repeated("input", input, n_samples, len(self.normalized_shape))

    def compute(self, weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, *in_dtype(weights, input), self.eps)


class VariationalGroupNorm(_Norm):
    """nn.GroupNorm with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.GroupNorm, then those of VariationalLinear. Priors of tensors have the shape [num_channels]. With
    affine=False there is nothing to draw, and no KL. The weight's means begin with 1.

    Shapes: input [B, num_channels, ...] -> the same.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.GroupNorm

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = True,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        checks.flags(affine=affine, bias=bias)
        num_groups, num_channels = (checks.positive_int(name, value) for name, value in (
            ("num_groups", num_groups), ("num_channels", num_channels)))
        if num_channels % num_groups:
            raise ValueError(f"num_channels: expected a multiple of num_groups={num_groups}, given {num_channels}")
        super().__init__(dict(num_groups=num_groups, num_channels=num_channels, eps=checks.number("eps", eps), affine=affine,
                              **_without(bias)),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)

    def check(self, n_samples: int, input: Tensor) -> None:
        self._check_channels(n_samples, input, "num_channels")

    def compute(self, weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, *in_dtype(weights, input), self.eps)


class _BatchNorm(_Norm):
    dimensions: tuple[int, ...]     # that an input may have

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, *, bias: bool = True, prior: Normal = Normal(0.0, 1.0),
                 bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic", init: str = "default",
                 init_sigma: float | None = None, device=None, dtype=None):
        checks.flags(affine=affine, track_running_stats=track_running_stats, bias=bias)
        momentum = None if momentum is None else checks.number("momentum", momentum, " or None")
        super().__init__(dict(num_features=checks.positive_int("num_features", num_features), eps=checks.number("eps", eps),
                              momentum=momentum, affine=affine, track_running_stats=track_running_stats, **_without(bias)),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)
        there = {"device": device, "dtype": dtype}
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, **there) if track_running_stats else None)
        self.register_buffer("num_batches_tracked",
                             torch.zeros((), dtype=torch.int64, device=device) if track_running_stats else None)

    reset_running_stats = nn.BatchNorm1d.reset_running_stats

    def reset_parameters(self) -> None:
        """Draw the parameters again as `init` and `init_sigma` say, and forget the running statistics."""
        self.reset_running_stats()
        super().reset_parameters()

    def check(self, n_samples: int, input: Tensor) -> None:
        self._check_channels(n_samples, input, "num_features", self.dimensions)

    def compute(self, weights: dict[str, Tensor], input: Tensor) -> Tensor:
        factor, tracked = self.momentum or 0.0, self.training and self.num_batches_tracked is not None
        mean, var = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            mean = var = None
        elif tracked:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:   # the mean over all batches
                factor = 1.0 / float(self.num_batches_tracked)
        # torch takes weights of float32 beside an input of 16 bits, as the running statistics are
        return F.batch_norm(input, mean, var, weights.get("weight"), weights.get("bias"), self.training or mean is None, factor,
                            self.eps)


class VariationalBatchNorm1d(_BatchNorm):
    """nn.BatchNorm1d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.BatchNorm1d, then those of VariationalLinear. Priors of tensors have the shape [num_features]. With
    affine=False there is nothing to draw, and no KL. The weight's means begin with 1.

    Shapes: input [B, num_features] or [B, num_features, L] -> the same. Under `sampling` with several samples each one's part
    of the batch is normalised by itself in training, and the running statistics take the parts up in their order.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.BatchNorm1d
    dimensions = (2, 3)


class VariationalBatchNorm2d(_BatchNorm):
    """nn.BatchNorm2d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.BatchNorm2d, then those of VariationalLinear. Priors of tensors have the shape [num_features]. With
    affine=False there is nothing to draw, and no KL. The weight's means begin with 1.

    Shapes: input [B, num_features, H, W] -> the same. Under `sampling` with several samples each one's part of the batch is
    normalised by itself in training, and the running statistics take the parts up in their order.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.BatchNorm2d
    dimensions = (4,)


class VariationalBatchNorm3d(_BatchNorm):
    """nn.BatchNorm3d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.BatchNorm3d, then those of VariationalLinear. Priors of tensors have the shape [num_features]. With
    affine=False there is nothing to draw, and no KL. The weight's means begin with 1.

    Shapes: input [B, num_features, D, H, W] -> the same. Under `sampling` with several samples each one's part of the batch
    is normalised by itself in training, and the running statistics take the parts up in their order.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.BatchNorm3d
    dimensions = (5,)


def _without(bias: bool) -> dict:
    return {} if bias else {"bias": False}  # not every torch that this works with has the argument
