"""How the variational layers of a model draw: several draws at once, pinned, frozen, or none (the means)."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import VariationalLayer, named_layers
from ..layers.modes import Entry, Mode, enter, innermost, leave, stack
from ..layers.ordinary import ordinary
from ..layers.state import fresh_keys
from .seeds import first_with_parameters, layer_seeds

__all__ = ["sampling", "draw", "freeze", "unfreeze"]


class sampling:
    """Context in which the variational layers of `model` draw otherwise than anew at every call.

    Args:
        model: any module; its layers are found by their names at the moment of entering.
        n_samples: draws in one call. Dimension 0 of every layer's input is then the batch repeated,
            [n_samples * B, ...], sample-major (`mc_forward` sees to it); in training a BatchNorm normalises
            over all of them.
        seed: an integer pins the draw: the same seed gives the same network, on any device and whatever the
            order of calls. A layer's own seed comes from sha256 of (seed, its qualified name in `model`),
            where the names that torch's wrappers add (`module.`, `_orig_mod.` and so on) do not count. Without
            a seed every call of a layer draws anew.
        first_sample: number of the first draw: draw s of this context is draw s + first_sample of the seed. Without a seed it
            means nothing.
        mean: use the means of the weights and draw nothing.
        pinned: without a seed, draw on entering, and keep that draw to the end: one network for a recurrent loop.

    Layers that share their parameters have one draw, that of the first name. Contexts nest, the inner one
    counting for the layers it covers. They hold for the thread, and the task of asyncio, that entered them (tasks started
    within take them along until they end) and have to be left in the reverse order: RuntimeError otherwise, as when two
    generators, which share the variables of whoever runs them, overlap. `mc_forward`, `ELBO`, `predict` and `draw` without
    a seed take that of a context around them, or its means. Layers with another estimator than "weight" draw weights where a draw
    is pinned (a seed, pinned=True), as only those are a network, and what their estimator says elsewhere. Recomputation by activation
    checkpointing, which runs in the backward pass, draws as in the first pass; with use_reentrant=True, as in the layer's latest
    call before the backward pass.
    """

    def __init__(self, model: nn.Module, n_samples: int = 1, seed: int | None = None, first_sample: int = 0,
                 mean: bool = False, pinned: bool = False):
        checks.module("model", model)
        checks.flags(mean=mean, pinned=pinned)
        n_samples, seed = checks.positive_int("n_samples", n_samples), checked_seed(seed)
        first_sample = checks.integer("first_sample", first_sample)
        if not 0 <= first_sample <= 2 ** 32 - n_samples:
            raise ValueError(f"first_sample: expected 0 to 2^32 - n_samples, given {first_sample}")
        if mean and (n_samples != 1 or seed is not None or pinned):
            raise ValueError("mean: expected neither n_samples nor seed nor pinned beside it, "
                             f"given n_samples={n_samples}, seed={seed}, pinned={pinned}")
        self.model, self.n_samples, self.seed = model, n_samples, seed
        self.first_sample, self.mean, self.pinned = first_sample, mean, pinned
        self._entries: list[Entry] = []

    def __enter__(self):
        layers = named_layers(self.model)
        self.identities = [layer.identities() for _, layer in layers]
        self._entries.append(enter([layer for _, layer in layers], self._modes(layers)))
        return self

    def __exit__(self, kind, *exception):
        entry = innermost(self._entries)
        self._entries.remove(entry)
        if not leave(entry) and kind is None:
            raise RuntimeError("sampling: left before a context that was entered after it, or not by the thread or task "
                               "that entered it: calls in between may have drawn as the other context says")

    def _modes(self, layers: list[tuple[str, VariationalLayer]]) -> list[Mode]:
        """How each of the layers is to draw."""
        if self.seed is None and not self.pinned:
            return [Mode(self.n_samples, self.first_sample, None, self.mean)] * len(layers)
        owners = first_with_parameters(self.identities)
        own = {first: layers[first][1].device for first in owners}
        keys = _fresh(own) if self.seed is None else self._of_seed(own, [name for name, _ in layers])
        modes = {first: self._pinned(key) for first, key in keys.items()}
        return [modes[first] for first in owners]

    def _pinned(self, key: Tensor) -> Mode:
        return Mode(self.n_samples, self.first_sample, key, weights=True)

    def _of_seed(self, devices: dict[int, torch.device], names: list[str]) -> dict[int, Tensor]:
        seeds, keys = layer_seeds(names, self.seed), {}
        for i, device in devices.items():
            # not torch.tensor([...], device=...), which waits for the device
            keys[i] = torch.full((2,), self.first_sample, dtype=torch.int64, device=device)
            keys[i][:1].fill_(seeds[i])
        return keys


def _fresh(devices: dict[int, torch.device]) -> dict[int, Tensor]:
    keys = {}
    for device in dict.fromkeys(devices.values()):  # all keys of a device at once: launches are what a small network costs
        there = [i for i in devices if devices[i] == device]
        keys.update(zip(there, fresh_keys(len(there), device)))
    return keys


def checked_seed(seed) -> int | None:
    return None if seed is None else checks.integer("seed", seed, otherwise=" or None")


class Draws(sampling):
    """`sampling` for the draws of one call: those of the seed; without one, as an explicit context around says, and with
    `frozen` as `freeze` does; else fresh ones, pinned for as long as the context lasts.

    Layers with another estimator use it, unless `joint`, where a context around does not pin their weights.

    `any`: whether there are layers that are drawn; `one`: whether there are layers, and all have but one network for
    all draws.
    """

    def __init__(self, model: nn.Module, n_samples: int, seed: int | None, mean: bool = False, frozen: bool = False,
                 joint: bool = False):
        if mean:
            super().__init__(model, seed=seed, mean=True)
        else:  # what callers have checked is not checked again: of a small network's step it would be seen
            self.model, self.n_samples, self.seed = model, n_samples, checked_seed(seed)
            self.first_sample, self.mean, self.pinned = 0, False, True
            self._entries = []
        self._frozen, self._joint = frozen, joint

    def _pinned(self, key: Tensor) -> Mode:
        return Mode(self.n_samples, self.first_sample, key, weights=self._joint, calls=[])

    def __enter__(self):
        steps = ordinary()
        if steps is None or self.seed is not None or self.mean or self._frozen or stack() or (
                pinned := steps.pinned(self.model, self._pinned)) is None:
            return super().__enter__()
        layers, modes = pinned
        self._first, self.any, self.one = list(modes.values()), bool(layers), False
        self._entries.append(enter(layers, modes))
        return self

    def _modes(self, layers: list[tuple[str, VariationalLayer]]) -> list[Mode]:
        nothing = not (self.mean or self._frozen or torch.compiler.is_compiling() or stack())
        found = [None] * len(layers) if nothing else [self._around(layer) for _, layer in layers]
        if None in found:
            drawn = super()._modes(layers)
            found = [mode or new for mode, new in zip(found, drawn)]
        self._first = found
        self.any = False in [mode.one for mode in found]
        self.one = bool(found) and not self.any
        return found

    def _around(self, layer: VariationalLayer) -> Mode | None:
        """What is decided already for the layer."""
        mode = Mode(mean=True) if self.mean else layer.drawing_mode()
        if mode.mean:
            if self.seed is not None:
                raise ValueError("seed: expected None within sampling(mean=True), where nothing is drawn, "
                                 f"given {self.seed}")
            return mode._replace(one=True)
        if self.seed is not None:
            return None
        if mode.key is not None:
            if mode.first_sample + self.n_samples > 2 ** 32:
                raise ValueError("n_samples: expected draws up to number 2^32, "
                                 f"given {self.n_samples} from {mode.first_sample} on")
            return mode if mode.one else mode._replace(n_samples=self.n_samples)
        if self._frozen and not mode.explicit and layer.frozen_key is not None:
            return Mode(key=layer.frozen_key, one=True, weights=True)
        return None

    def move(self, first_sample: int, n_samples: int, place: tuple[int, int] | None = None) -> None:
        """Go on to other draws; place: for a part of the rows, the first and how many they are."""
        repeatable = torch.is_grad_enabled()
        modes, calls = [], {}
        for mode in self._first:
            mode = mode._replace(calls=_shared_calls(mode, calls), place=place)
            if not mode.one:
                first = mode.first_sample + first_sample
                key = mode.key.clone()  # earlier draws' backward passes read theirs
                key[1:].add_(first_sample)
                mode = mode._replace(n_samples=n_samples, first_sample=first, key=key)
            modes.append(mode._replace(repeatable=repeatable))
        self._entries[-1].put(modes)

    def keys(self, first_sample: int, n_samples: int) -> list[Tensor]:
        """The key [n_samples, 2] of each layer that is drawn, for the draws from first_sample on."""
        found = []
        for mode in self._first:
            if not mode.one:
                found.append(mode.key.repeat(n_samples, 1))
                found[-1][:, 1] += torch.arange(first_sample, first_sample + n_samples, device=mode.key.device)
        return found

    def move_to(self, keys: list[Tensor], place: tuple[int, int] | None = None) -> None:
        """Go on to one draw, of these keys: those of `keys`, of which torch.vmap takes one at a time."""
        rest, calls = iter(keys), {}
        self._entries[-1].put([mode if mode.one else mode._replace(
            n_samples=1, key=next(rest), repeatable=False, calls=_shared_calls(mode, calls), place=place) for mode in self._first])


def _shared_calls(mode: Mode, new: dict[int, list]) -> list | None:
    """An empty list in place of the mode's; layers that share a key share it."""
    return None if mode.calls is None else new.setdefault(id(mode.calls), [])


@torch.no_grad()
def draw(model: nn.Module, seed: int | None = None, first_sample: int = 0, mean: bool = False) -> nn.Module:
    """One posterior draw as an ordinary module: a copy of `model` with nn.Linear for VariationalLinear.

    Its weights are bit for bit those of `sampling(model, seed=seed, first_sample=first_sample)`, and so those of draw
    number first_sample of `predict(model, ..., seed=seed)`; with mean=True they are the means. Without a seed they are as a
    context around or `freeze` says, or else drawn anew.
    """
    first_sample = sampling(model, 1, seed, first_sample, mean).first_sample  # checks them
    if mean and first_sample != 0:
        raise ValueError(f"mean: expected no first_sample beside it, given first_sample={first_sample}")
    layers = named_layers(model)
    draws = Draws(model, 1, seed, mean, frozen=True)
    with draws:
        if not mean:
            draws.move(first_sample, 1)
        drawn = {id(layer): layer.drawn(layer.drawing_mode().key) for _, layer in layers}
    # deepcopy takes what its memo holds for a layer wherever it meets the layer
    return copy.deepcopy(model, drawn)


def freeze(model: nn.Module) -> None:
    """Keep the noise of each layer's latest draw in this thread (or of a new one) until `unfreeze`.

    The weights still follow mu and rho. The key is copied and moved with the layer and is not in the
    state_dict. `predict` and `draw` without a seed then have that one network. Within `sampling`, and so in
    `mc_forward` and `ELBO`, it does not count.
    """
    checks.module("model", model)
    layers = named_layers(model)
    with torch.inference_mode(False):  # the key is to serve in training, too
        for (_, layer), first in zip(layers, first_with_parameters([layer.identities() for _, layer in layers])):
            key = layers[first][1]._state.key
            layer.frozen_key = fresh_keys(1, layer.device)[0] if key is None else key[:2].to(layer.device, copy=True)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`: every call draws anew."""
    checks.module("model", model)
    for _, layer in named_layers(model):
        layer.frozen_key = None
