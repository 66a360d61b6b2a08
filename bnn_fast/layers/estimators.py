"""Layers whose outputs may become random otherwise than by one draw of the weights for all rows."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..operators import functional
from ..operators.noise import random_signs
from ..operators.reference import Posterior
from .base import VariationalLayer
from .modes import Mode


class Estimating(VariationalLayer):
    """A layer with an `estimator`."""

    def __init__(self, estimator: str, **options):
        super().__init__(**options)
        checks.choice("estimator", estimator, checks.ESTIMATORS)
        self.estimator = estimator

    def _one_network(self, mode: Mode) -> bool:
        """Whether weights are to be drawn, whatever the estimator."""
        return mode.weights or (mode.key is None and not mode.explicit and self._buffers["frozen_key"] is not None)

    def _first_row(self, mode: Mode, x: Tensor, recomputed: bool) -> int | None:
        """The number of the first of these examples in a whole batch, of which they may be a part; None if it does not say."""
        if mode.calls is not None and not recomputed:
            if mode.calls:
                raise RuntimeError(
                    f"a layer with estimator={self.estimator!r} is called again under one key, or one that shares its parameters is: "
                    'both calls would have the same noise. Use estimator="weight" for tied and recurrent layers, or predict(joint=True)')
            mode.calls.append(True)
        if mode.place is None or x.dim() < 2:
            return None
        first_row, rows = mode.place
        times, rest = divmod(x.shape[0], rows * mode.n_samples)  # several of dimension 0 here may be one row of the model's input
        return None if rest else first_row * times

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", estimator={self.estimator!r}" if self.estimator != "weight" else "")


class EstimatedConvolution(Estimating):
    """A convolution of that kind: `_convolve(input, weight, bias, groups, output_size)` is one call of torch's.

        local     y = m + sqrt(v) eps,   m = conv(x, mu) + mu_b,   v = conv(x^2, sigma^2) + sigma_b^2
        flipout   y = conv(x, mu) + r conv(s x, sigma eps) + b,   signs s of an example's input channels, r of its output channels

    (Kingma, Salimans, Welling, "Variational dropout and the local reparameterization trick", 2015; Wen et al., "Flipout: efficient
    pseudo-independent weight perturbations on mini-batches", 2018, section 3.1.) The derivatives are autograd's.
    """

    def _estimated(self, mode: Mode, key: Tensor, recomputed: bool, input: Tensor, output_size=None) -> Tensor | None:
        if self.estimator == "weight" or self._one_network(mode):
            return None
        first_row = self._first_row(mode, input, recomputed) or 0
        x = functional.autocast(input)
        batched = x.dim() == self.dimensions + 2
        way = self._by_local if self.estimator == "local" else self._by_flipout
        y = functional.without_autocast(x.device.type, way, x if batched else x.unsqueeze(0), key, mode.n_samples, first_row, output_size)
        return (y if batched else y.squeeze(0)).to(x.dtype)

    def _posteriors(self) -> list[Posterior | None]:
        pairs = self.pairs()
        return [Posterior(pair.mu, pair.rho, self.scale) for pair in pairs] + [None] * (2 - len(pairs))

    def _by_local(self, x: Tensor, key: Tensor, n_samples: int, first_row: int, output_size) -> Tensor:
        weight, bias = self._posteriors()
        x = x.to(weight.mu.dtype)
        y = self._convolve(x, weight.mean, None if bias is None else bias.mean, self.groups, output_size)
        v = self._convolve(x.square(), weight.variance, None if bias is None else bias.variance, self.groups, output_size)
        zeros = torch.zeros_like(y[:len(y) // n_samples].detach().flatten(1))
        eps = functional.sample_normal(zeros, zeros, key, scale="exp", kl=None, n_samples=n_samples, stream=2, row_offset=first_row)[0]
        some = v >= torch.finfo(v.dtype).tiny   # the square root has no derivative at 0
        return y + torch.where(some, torch.where(some, v, 1.0).sqrt() * eps.reshape(y.shape), 0.0)

    def _by_flipout(self, x: Tensor, key: Tensor, n_samples: int, first_row: int, output_size) -> Tensor:
        weight, _ = self._posteriors()
        pairs, dtype = self.pairs(), weight.mu.dtype
        x = x.to(dtype)
        places = (1,) * self.dimensions

        def signs(channels: int, stream: int) -> Tensor:
            found = random_signs(key, n_samples, len(x) // n_samples, channels, stream=stream, row_offset=first_row, dtype=dtype)
            return found.reshape(-1, channels, *places)

        def drawn(mu: Tensor, rho: Tensor, stream: int) -> Tensor:
            return functional.sample_normal(mu, rho, key, scale=self.scale, kl=None, n_samples=n_samples, stream=stream)[0].to(dtype)

        noise = drawn(torch.zeros_like(pairs[0].mu), pairs[0].rho, pairs[0].stream)
        y = self._convolve(x, weight.mean, None, self.groups, output_size)
        flipped = x * signs(self.in_channels, 3)
        more = self._computed({"weight": noise if n_samples > 1 else noise[0]}, n_samples, (flipped, output_size), {})
        y = y + more * signs(self.out_channels, 4)
        if len(pairs) == 1:
            return y
        bias = drawn(pairs[1].mu, pairs[1].rho, pairs[1].stream)
        return (y.unflatten(0, (n_samples, -1)) + bias.reshape(n_samples, 1, self.out_channels, *places)).flatten(0, 1)
