"""What every variational layer does around its operator: choosing the key, and keeping the KL of the pass."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..priors import Normal
from .state import Local, Mode, Record, Shared, State, fresh_key, versions


class Pair(NamedTuple):
    """The posterior of one tensor of weights; `name` is that of the weights ("weight", "bias")."""
    name: str
    mu: Tensor
    rho: Tensor
    prior: Normal
    stream: int


class VariationalLayer(nn.Module):
    """Base of the layers whose weights are drawn at every call.

    A layer has `scale` and `kl` (what rho means, which KL), `tensors()` and `pairs()`, `drawn(key)` (the
    ordinary module that it is under a key), and a forward that asks `_mode` and `_key` how to draw and lets
    `_remember` keep the KL.
    """

    def __init__(self):
        super().__init__()
        self._local = Local()
        self._shared = Shared()
        self.register_buffer("frozen_key", None, persistent=False)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """mu and rho of the weight, then of the bias or None."""
        raise NotImplementedError

    def pairs(self) -> list[Pair]:
        raise NotImplementedError

    def drawn(self, key: Tensor) -> nn.Module:
        raise NotImplementedError

    @property
    def _state(self) -> State:
        return self._local.state

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def _mode(self, compiling: bool) -> tuple[Mode, bool]:
        """(how to draw now, whether this is a recomputation by activation checkpointing)."""
        state = self._state
        if not compiling and torch._C._current_graph_task_id() != -1:
            # Usually after `with sampling(...)` was left: what counts is how the first pass was made.
            return state.latest or self._shared.latest or state.mode, True
        mode = state.latest = self._shared.latest = state.mode
        return mode, False

    def _key(self, mode: Mode, device: torch.device) -> Tensor:
        if mode.key is not None:
            return mode.key
        frozen = self._buffers["frozen_key"]
        if frozen is not None and not mode.explicit:
            return frozen
        return fresh_key(device, mode.first_sample)

    def _remember(self, parameters: tuple, key: Tensor, n_samples: int, kl, compiling: bool) -> None:
        """Keep the key and, with gradients on, the KL (see Record) of a call."""
        state = self._state
        state.key = key
        if torch.is_grad_enabled():
            seen = None if compiling else versions(parameters)
            state.record = Record(parameters, seen, key, n_samples, kl)
        elif compiling:
            state.record = None  # it could not be told whether it still holds

    def recorded(self) -> Record | None:
        """The record of the latest call made with gradients on, if it holds for the parameters now."""
        record = self._state.record
        if record is None or (not torch.compiler.is_compiling()
                              and torch._C._are_functorch_transforms_active()):
            return None
        return record if record.belongs_to(self.tensors()) else None


def named_layers(model: nn.Module) -> list[tuple[str, VariationalLayer]]:
    """(qualified name, layer) of each variational layer in `model`, under its first name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, VariationalLayer)]
