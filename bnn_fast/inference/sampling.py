"""How the variational layers of a model draw: several draws at once, pinned, frozen, or none (the means)."""
from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import named_layers
from ..layers.state import Mode, fresh_key

_WRAPPERS = ("module", "_orig_mod")

__all__ = ["sampling", "mc_forward", "draw", "freeze", "unfreeze"]


class sampling:
    """Context in which the variational layers of `model` draw otherwise than anew at every call.

    Args:
        model: any module; its layers are found by their names at the moment of entering.
        n_samples: draws in one call. Dimension 0 of every layer's input is then the batch repeated,
            [n_samples * B, ...], sample-major (`mc_forward` sees to it); in training a BatchNorm normalises
            over all of them.
        seed: an integer pins the draw: the same seed gives the same network, on any device and whatever the
            order of calls. A layer's own seed comes from sha256 of (seed, its qualified name in `model`),
            where the names that wrappers add (`module.`, `_orig_mod.`) do not count. Without a seed every
            call of a layer draws anew.
        first_sample: number of the first draw: draw s of this context is draw s + first_sample of the seed.
        mean: use the means of the weights and draw nothing.

    Layers that share their parameters have one draw, that of the first name. Contexts nest, the inner one
    counting for the layers it covers, and hold for the thread that entered them. Recomputation by activation
    checkpointing, which runs in the backward pass, draws as the layer's latest call before it did.
    """

    def __init__(self, model: nn.Module, n_samples: int = 1, seed: int | None = None, first_sample: int = 0,
                 mean: bool = False):
        checks.positive_int("n_samples", n_samples)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: expected an integer or None, given {checks.describe(seed)}")
        if isinstance(first_sample, bool) or not isinstance(first_sample, int):
            raise TypeError(f"first_sample: expected an integer, given {checks.describe(first_sample)}")
        if not 0 <= first_sample <= 2 ** 32 - n_samples:
            raise ValueError(f"first_sample: expected 0 to 2^32 - n_samples, given {first_sample}")
        if mean and (n_samples != 1 or seed is not None):
            raise ValueError("mean: expected neither n_samples nor seed beside it, "
                             f"given n_samples={n_samples}, seed={seed}")
        self.model, self.n_samples, self.seed = model, n_samples, seed
        self.first_sample, self.mean = first_sample, mean
        self._left: list[list] = []

    def __enter__(self):
        layers = named_layers(self.model)
        keys = [None] * len(layers) if self.seed is None else self._keys(layers)
        self._left.append([(layer, layer._state.mode) for _, layer in layers])
        for (_, layer), key in zip(layers, keys):
            layer._state.mode = Mode(self.n_samples, self.first_sample, key, self.mean)
        return self

    def __exit__(self, *exception):
        for layer, mode in self._left.pop():
            layer._state.mode = mode

    def _move(self, first_sample: int, n_samples: int) -> None:
        """Within the context of a pinned draw, go on to others: the keys are written in place."""
        for layer, _ in self._left[-1]:
            mode = layer._state.mode
            mode.key[1:].fill_(first_sample)
            if mode.n_samples != n_samples:
                layer._state.mode = mode._replace(n_samples=n_samples)

    def _keys(self, layers) -> list[Tensor]:
        seeds = _layer_seeds([name for name, _ in layers], self.seed)
        keys = []
        for (_, layer), first in zip(layers, _first_with_parameters(layers)):
            # not torch.tensor([...], device=...), which waits for the device
            key = torch.full((2,), self.first_sample, dtype=torch.int64, device=layer.device)
            key[:1].fill_(seeds[first])
            keys.append(key)
        return keys


class _fresh(sampling):
    """`sampling` under keys drawn on entering: one draw for as long as the context lasts."""

    def __enter__(self):
        self.seed = 0  # any, so that the keys are pinned
        return super().__enter__()

    def _keys(self, layers) -> list[Tensor]:
        keys = []
        for i, ((_, layer), first) in enumerate(zip(layers, _first_with_parameters(layers))):
            keys.append(fresh_key(layer.device, self.first_sample) if first == i else keys[first])
        return keys


def pinned(model: nn.Module, n_samples: int, seed: int | None) -> sampling:
    """The context of one seed: the one given, or where it is None a fresh one."""
    return _fresh(model, n_samples) if seed is None else sampling(model, n_samples, seed)


def mc_forward(model: nn.Module, x: Tensor, n_samples: int, seed: int | None = None) -> Tensor:
    """n_samples posterior draws of the outputs in one call of `model`: x [B, ...] -> [n_samples, B, ...].

    The weights are those of `sampling(model, n_samples, seed)`; without a seed a fresh one holds for the
    call. x is repeated along dimension 0, which has to be the batch in every module of `model`; ValueError if
    the output has another size there. `predict` does the same in pieces, for any number of draws.
    """
    checks.positive_int("n_samples", n_samples)
    checks.batch("x", x)
    with pinned(model, n_samples, seed):
        return repeated(model, x, n_samples)


def repeated(model: nn.Module, x: Tensor, n_samples: int) -> Tensor:
    """model on x [B, ...] repeated n_samples times along dimension 0, as [n_samples, B, ...]."""
    y = model(x if n_samples == 1 else x.expand(n_samples, *x.shape).flatten(0, 1))
    rows = x.shape[0]
    if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != n_samples * rows:
        raise ValueError(f"model: expected an output with {n_samples} * {rows} rows in dimension 0, "
                         f"given {checks.describe(y)}")
    return y.reshape(n_samples, rows, *y.shape[1:])


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> nn.Module:
    """One posterior draw as an ordinary module: a copy of `model` with nn.Linear for VariationalLinear.

    Its weights are bit for bit those of `sampling(model, seed=seed)`.
    """
    if seed is None:
        raise TypeError("seed: expected an integer, given None")
    layers = named_layers(model)
    keys = sampling(model, seed=seed)._keys(layers)
    # deepcopy takes what its memo holds for a layer wherever it meets the layer
    return copy.deepcopy(model, {id(layer): layer.drawn(key) for (_, layer), key in zip(layers, keys)})


def freeze(model: nn.Module) -> None:
    """Keep the noise of each layer's latest draw in this thread (or of a new one) until `unfreeze`.

    The weights still follow mu and rho. The key is copied and moved with the layer and is not in the
    state_dict. Within `sampling`, and so in `mc_forward` and `ELBO`, it does not count.
    """
    layers = named_layers(model)
    for (_, layer), first in zip(layers, _first_with_parameters(layers)):
        key = layers[first][1]._state.key
        layer.frozen_key = fresh_key(layer.device, 0) if key is None else key.to(layer.device, copy=True)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`: every call draws anew."""
    for _, layer in named_layers(model):
        layer.frozen_key = None


def _layer_seeds(names: list[str], seed: int) -> list[int]:
    """The layers' 64-bit seeds: the first eight bytes of sha256("seed:name"), little endian."""
    seeds, taken = [], set()
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in taken:  # a module that really is called like a wrapper
            plain = name
        taken.add(plain)
        digest = hashlib.sha256(f"{seed}:{plain}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "little", signed=True))
    return seeds


def _first_with_parameters(layers) -> list[int]:
    """For each layer the index of the first one with the same parameters."""
    first = {}
    return [first.setdefault(tuple(map(id, layer.tensors()[:2])), i) for i, (_, layer) in enumerate(layers)]
