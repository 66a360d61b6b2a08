"""The counterparts of torch's modules that are tested alike, with small settings of each."""
from __future__ import annotations

from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

import bnn_fast as bf


class Case(NamedTuple):
    make: Callable[..., bf.VariationalLayer]    # of the options
    ordinary: Callable[..., nn.Module]          # of device and dtype
    shapes: list[tuple[int, ...]]               # of the inputs, without the batch

    def inputs(self, batch: int = 4, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.shapes]

    def module(self, layer: bf.VariationalLayer, weights: dict[str, Tensor]) -> nn.Module:
        """torch's own module of this case with these weights and the layer's buffers."""
        mu = next(iter(weights.values()))
        module = self.ordinary(dtype=mu.dtype)
        places = getattr(layer, "_places", {name: [name] for name in weights})
        state = {place: w for name, w in weights.items() for place in places[name]}
        return module if not state else _loaded(module, state)


def _loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    assert set(state) == {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict({**module.state_dict(), **{name: w.detach() for name, w in state.items()}})
    return module


def _counterpart(name: str, *arguments, **keywords):
    def make(**options):
        return getattr(bf, f"Variational{name}")(*arguments, **keywords, **options)

    def ordinary(**options):
        return getattr(nn, name)(*arguments, **keywords, **options)

    return make, ordinary


class Tied(nn.Module):
    """Two names of one parameter, a buffer that every call changes, an output in a dictionary."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, **options), nn.Linear(3, 3, bias=False, **options)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3, **options)

    def forward(self, x):
        return self.norm(self.second(torch.tanh(self.first(x))))


def _variational(module: Callable[..., nn.Module]):
    def make(device=None, dtype=None, **options):
        return bf.Variational(module(device=device, dtype=dtype), **options)

    return make, module


def _sequential(**options):
    return nn.Sequential(nn.Conv1d(2, 3, 2, **options), nn.GELU(), nn.Sequential(nn.Flatten(), nn.Linear(9, 2, **options)))


CASES = {
    "Conv1d": Case(*_counterpart("Conv1d", 4, 6, 3, padding="same", dilation=2, groups=2), [(4, 7)]),
    "Conv1d circular": Case(*_counterpart("Conv1d", 2, 3, 3, 2, 1, padding_mode="circular", bias=False), [(2, 6)]),
    "Conv2d": Case(*_counterpart("Conv2d", 3, 4, (2, 3), stride=(1, 2), padding=1), [(3, 5, 6)]),
    "Conv2d reflect": Case(*_counterpart("Conv2d", 2, 4, 3, padding="same", padding_mode="reflect", groups=2), [(2, 4, 5)]),
    "Conv2d valid": Case(*_counterpart("Conv2d", 2, 4, 3, padding="valid"), [(2, 4, 5)]),
    "Conv3d": Case(*_counterpart("Conv3d", 2, 2, 2, padding=1, padding_mode="replicate"), [(2, 3, 3, 2)]),
    "ConvTranspose1d": Case(*_counterpart("ConvTranspose1d", 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), [(4, 5)]),
    "ConvTranspose2d": Case(*_counterpart("ConvTranspose2d", 2, 3, 3, stride=(2, 1), dilation=(1, 2)), [(2, 4, 3)]),
    "ConvTranspose3d": Case(*_counterpart("ConvTranspose3d", 2, 2, 2, bias=False), [(2, 2, 3, 2)]),
    "Bilinear": Case(*_counterpart("Bilinear", 3, 2, 4), [(3,), (2,)]),
    "Bilinear, more dimensions": Case(*_counterpart("Bilinear", 3, 2, 4, bias=False), [(2, 3), (2, 2)]),
    "LayerNorm": Case(*_counterpart("LayerNorm", (3, 4)), [(2, 3, 4)]),
    "LayerNorm, no bias": Case(*_counterpart("LayerNorm", 4, bias=False), [(4,)]),
    "GroupNorm": Case(*_counterpart("GroupNorm", 2, 4, 1e-3), [(4, 3)]),
    "BatchNorm1d": Case(*_counterpart("BatchNorm1d", 3), [(3,)]),
    "BatchNorm1d, mean": Case(*_counterpart("BatchNorm1d", 3, momentum=None), [(3, 2)]),
    "BatchNorm2d": Case(*_counterpart("BatchNorm2d", 3, 1e-3, 0.3), [(3, 2, 2)]),
    "BatchNorm3d": Case(*_counterpart("BatchNorm3d", 2, track_running_stats=False), [(2, 2, 2, 1)]),
    "Variational": Case(*_variational(_sequential), [(2, 4)]),
    "Variational, tied": Case(*_variational(Tied), [(3,)]),
}
PLAIN = {   # without weights
    "LayerNorm": Case(*_counterpart("LayerNorm", 4, elementwise_affine=False), [(4,)]),
    "GroupNorm": Case(*_counterpart("GroupNorm", 2, 4, affine=False), [(4, 3)]),
    "BatchNorm1d": Case(*_counterpart("BatchNorm1d", 3, affine=False), [(3,)]),
    "BatchNorm2d": Case(*_counterpart("BatchNorm2d", 3, affine=False, track_running_stats=False), [(3, 2, 2)]),
}
