"""The variational counterparts of torch's convolutions."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..priors import Normal
from .counterpart import Counterpart, in_dtype
from .estimators import EstimatedConvolution

# The most numbers in one draw's input for which S draws are one grouped convolution. With S = 4 and 10 and 3 x 3 kernels, forward
# and backward took 0.4 to 0.9 of the time of S convolutions up to here, 0.9 to 2 times as long beyond.
_TOGETHER = 2 ** 16


class _Convolution(Counterpart, EstimatedConvolution):
    """What both kinds have in common; `_convolve` is one call."""
    ordinary: type[nn.modules.conv._ConvNd]
    dimensions: int     # of space

    def __init__(self, arguments: dict, **options):
        for name, lowest in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)):
            if not isinstance(arguments.get(name, ""), str):
                arguments[name] = checks.sizes(name, arguments[name], self.dimensions, lowest)
        for name in ("groups", "in_channels", "out_channels"):
            arguments[name] = checks.integer(name, arguments[name], 1)
            if arguments[name] % arguments["groups"]:
                raise ValueError(f"{name}: expected a multiple of groups={arguments['groups']}, given {arguments[name]}")
        checks.flags(bias=arguments["bias"])
        super().__init__(arguments, **options)

    def check(self, n_samples: int, input: Tensor, output_size=None) -> None:
        space, channels = self.dimensions, self.in_channels
        apart = n_samples > 1 and isinstance(input, Tensor) and input.dim() == space + 3 and input.shape[0] == n_samples
        dimensions = (space + 3,) if apart else (space + 1, space + 2)
        if not isinstance(input, Tensor) or input.dim() not in dimensions or input.shape[-space - 1] != channels:
            error = ValueError if isinstance(input, Tensor) else TypeError
            places = ("L", "H, W", "D, H, W")[space - 1]
            raise error(f"input: expected a tensor [B, {channels}, {places}] or [{channels}, {places}] (in_channels={channels}), "
                        f"given {checks.describe(input)}")
        self._check("input", input)
        if n_samples > 1 and not apart:
            checks.repeated("input", input, n_samples, space + 1)

    def shares(self, x: Tensor) -> bool:
        return (type(self).forward in (_Conv.forward, _ConvTranspose.forward) and self.estimator == "weight"
                and x.dim() == self.dimensions + 2)

    def compute(self, weights: dict[str, Tensor], input: Tensor, output_size=None) -> Tensor:
        return self._convolve(input, *in_dtype(weights, input), self.groups, output_size)

    def compute_samples(self, weights: dict[str, Tensor], n_samples: int, input: Tensor, output_size=None) -> Tensor:
        if input.dim() == self.dimensions + 3:  # each draw's apart, or the same for all: see `shares`
            return torch.stack([self.compute({name: w[s] for name, w in weights.items()}, input[s], output_size)
                                for s in range(n_samples)])
        if input.numel() > n_samples * _TOGETHER:
            return super().compute_samples(weights, n_samples, input, output_size)
        weight, bias = (None if w is None else w.flatten(0, 1) for w in in_dtype(weights, input))
        beside = input.unflatten(0, (n_samples, input.shape[0] // n_samples)).transpose(0, 1).flatten(1, 2)     # [B, S * in, ...]
        y = self._convolve(beside, weight, bias, n_samples * self.groups, output_size)
        return y.unflatten(1, (n_samples, self.out_channels)).transpose(0, 1).flatten(0, 1)


class _Conv(_Convolution):
    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, dilation=1, groups: int = 1,
                 bias: bool = True, padding_mode: str = "zeros", *, prior: Normal = Normal(0.0, 1.0),
                 bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic", init: str = "default",
                 init_sigma: float | None = None, estimator: str = "weight", device=None, dtype=None):
        if isinstance(padding, str):
            checks.choice("padding", padding, {"same": 0, "valid": 1})
            if padding == "same" and any(step != 1 for step in (stride if isinstance(stride, (tuple, list)) else [stride])):
                raise ValueError(f"stride: expected 1 beside padding='same', given {stride}")
        checks.choice("padding_mode", padding_mode, {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3})
        super().__init__(dict(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
                              padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma,
                         estimator=estimator, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, output_size) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self.operator(input, weight, bias, self.stride, padding, self.dilation, groups)


class _ConvTranspose(_Convolution):
    ordinary: type[nn.modules.conv._ConvTransposeNd]

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, output_padding=0, groups: int = 1,
                 bias: bool = True, dilation=1, padding_mode: str = "zeros", *, prior: Normal = Normal(0.0, 1.0),
                 bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic", init: str = "default",
                 init_sigma: float | None = None, estimator: str = "weight", device=None, dtype=None):
        if isinstance(padding, str):
            raise TypeError(f"padding: expected integers, given {padding!r}")
        checks.choice("padding_mode", padding_mode, {"zeros": 0})
        super().__init__(dict(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
                              padding=padding, output_padding=output_padding, groups=groups, bias=bias, dilation=dilation),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma,
                         estimator=estimator, device=device, dtype=dtype)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)

    def check(self, n_samples: int, input: Tensor, output_size=None) -> None:
        super().check(n_samples, input)
        self._padding_of_output(input, output_size)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, output_size) -> Tensor:
        padding = self._padding_of_output(input, output_size)
        return self.operator(input, weight, bias, self.stride, self.padding, padding, groups, self.dilation)

    def _padding_of_output(self, input: Tensor, output_size) -> list[int]:
        return self.ordinary._output_padding(self, input, output_size, self.stride, self.padding, self.kernel_size, self.dimensions,
                                             self.dilation)

    def _fan_in(self, module: nn.Module) -> int:
        # Each input reaches all places of the kernel; stride spreads them over so many times more outputs.
        each = module.in_channels // module.groups * math.prod(module.kernel_size)
        return max(1, each // math.prod(module.stride))


class VariationalConv1d(_Conv):
    """nn.Conv1d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.Conv1d, then those of VariationalLinear. Priors of tensors have the shapes of nn.Conv1d's weight
    [out_channels, in_channels / groups, *kernel_size] and bias [out_channels].

    estimator="local" draws every output of every example by itself; the signs of "flipout" are those of an example's channels, alike
    at all places (`layers.estimators`).

    Shapes: as nn.Conv1d's: input [B, in_channels, L] or [in_channels, L] -> [B, out_channels, L'] or [out_channels, L'].
    Under `sampling` with several samples the batch dimension has to be there.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.Conv1d
    operator = staticmethod(F.conv1d)
    dimensions = 1


class VariationalConv2d(_Conv):
    """nn.Conv2d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.Conv2d, then those of VariationalLinear. Priors of tensors have the shapes of nn.Conv2d's weight
    [out_channels, in_channels / groups, *kernel_size] and bias [out_channels].

    estimator="local" draws every output of every example by itself; the signs of "flipout" are those of an example's channels, alike
    at all places (`layers.estimators`).

    Shapes: as nn.Conv2d's: input [B, in_channels, H, W] or [in_channels, H, W] -> [B, out_channels, H', W'] or [out_channels,
    H', W']. Under `sampling` with several samples the batch dimension has to be there.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.Conv2d
    operator = staticmethod(F.conv2d)
    dimensions = 2


class VariationalConv3d(_Conv):
    """nn.Conv3d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.Conv3d, then those of VariationalLinear. Priors of tensors have the shapes of nn.Conv3d's weight
    [out_channels, in_channels / groups, *kernel_size] and bias [out_channels].

    estimator="local" draws every output of every example by itself; the signs of "flipout" are those of an example's channels, alike
    at all places (`layers.estimators`).

    Shapes: as nn.Conv3d's: input [B, in_channels, D, H, W] or [in_channels, D, H, W] -> [B, out_channels, D', H', W'] or
    [out_channels, D', H', W']. Under `sampling` with several samples the batch dimension has to be there.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.Conv3d
    operator = staticmethod(F.conv3d)
    dimensions = 3


class VariationalConvTranspose1d(_ConvTranspose):
    """nn.ConvTranspose1d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.ConvTranspose1d, then those of VariationalLinear. Priors of tensors have the shapes of
    nn.ConvTranspose1d's weight [in_channels, out_channels / groups, *kernel_size] and bias [out_channels].

    estimator="local" draws every output of every example by itself; the signs of "flipout" are those of an example's channels, alike
    at all places (`layers.estimators`).

    Shapes: as nn.ConvTranspose1d's: input [B, in_channels, L] or [in_channels, L] -> [B, out_channels, L'] or [out_channels,
    L']; output_size as there. Under `sampling` with several samples the batch dimension has to be there.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.ConvTranspose1d
    operator = staticmethod(F.conv_transpose1d)
    dimensions = 1


class VariationalConvTranspose2d(_ConvTranspose):
    """nn.ConvTranspose2d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.ConvTranspose2d, then those of VariationalLinear. Priors of tensors have the shapes of
    nn.ConvTranspose2d's weight [in_channels, out_channels / groups, *kernel_size] and bias [out_channels].

    estimator="local" draws every output of every example by itself; the signs of "flipout" are those of an example's channels, alike
    at all places (`layers.estimators`).

    Shapes: as nn.ConvTranspose2d's: input [B, in_channels, H, W] or [in_channels, H, W] -> [B, out_channels, H', W'] or
    [out_channels, H', W']; output_size as there. Under `sampling` with several samples the batch dimension has to be there.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.ConvTranspose2d
    operator = staticmethod(F.conv_transpose2d)
    dimensions = 2


class VariationalConvTranspose3d(_ConvTranspose):
    """nn.ConvTranspose3d with weight and bias drawn at every call, one draw shared by the batch.

    Arguments: those of nn.ConvTranspose3d, then those of VariationalLinear. Priors of tensors have the shapes of
    nn.ConvTranspose3d's weight [in_channels, out_channels / groups, *kernel_size] and bias [out_channels].

    estimator="local" draws every output of every example by itself; the signs of "flipout" are those of an example's channels, alike
    at all places (`layers.estimators`).

    Shapes: as nn.ConvTranspose3d's: input [B, in_channels, D, H, W] or [in_channels, D, H, W] -> [B, out_channels, D', H',
    W'] or [out_channels, D', H', W']; output_size as there. Under `sampling` with several samples the batch dimension has to
    be there.

    Raises ValueError or TypeError where an argument does not fit, or the input has the wrong shape, dtype or device or, with
    several samples, a batch that they do not divide.
    """
    ordinary = nn.ConvTranspose3d
    operator = staticmethod(F.conv_transpose3d)
    dimensions = 3
