"""What every variational layer does around its operator: choosing the key, and keeping the KL of the pass."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..priors import Normal
from .modes import ORDINARY, Mode, checkpoint, entered, stack, top_hooks
from . import checkpoint as checkpoint_of_layer
from . import steps
from .state import Local, Record, Shared, State, fresh_key


_graph_task = torch._C._current_graph_task_id


class Pair(NamedTuple):
    """The posterior of one tensor of weights; `name` is that of the weights ("weight", "bias")."""
    name: str
    mu: Tensor
    rho: Tensor
    prior: Normal
    stream: int


class VariationalLayer(nn.Module):
    """Base of the layers whose weights are drawn at every call.

    A layer has `scale` and `kl` (what rho means, which KL), `tensors()`, `names` of theirs, and `pairs()`, `options()`,
    `drawn(key)` (the ordinary module that it is under a key, or at the means), and a forward that asks `_mode` and
    `_key` how to draw and lets `_remember` keep the KL.
    """

    names: tuple[str, ...]      # of the tensors
    prior_tensors: bool         # whether there are any

    def __init__(self):
        super().__init__()
        self._local = Local()
        self._shared = Shared()
        self._pruned: dict[str, tuple[Tensor, Tensor]] = {}  # of each pair that has any: which weights, and their mu
        self.register_buffer("frozen_key", None, persistent=False)
        self.register_state_dict_pre_hook(_before_saving)
        self.register_state_dict_post_hook(checkpoint_of_layer.save)
        self.register_load_state_dict_pre_hook(checkpoint_of_layer.load)
        self.register_load_state_dict_post_hook(_after_loading)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """mu and rho of the weight, then of the bias or None."""
        raise NotImplementedError

    def pairs(self) -> list[Pair]:
        raise NotImplementedError

    def priors(self) -> tuple[Tensor | None, ...]:
        """The tensors that priors are made of, None for those of numbers."""
        raise NotImplementedError

    def options(self) -> tuple:
        """What the KL depends on beside the tensors."""
        raise NotImplementedError

    def drawn(self, key: Tensor | None) -> nn.Module:
        raise NotImplementedError

    def sources(self, name: str) -> tuple:
        """The registered parameters that the tensor of this name is, or by torch.nn.utils.parametrize is made of, and then
        what makes it of them. Objects that last, unlike the tensor itself.
        """
        parameter = self._parameters.get(name)
        if parameter is not None:
            return (parameter,)
        if name in self._modules.get("parametrizations", ()):
            made = self.parametrizations[name]
            return (*made.parameters(), *made)
        return (getattr(self, name),)

    @torch.no_grad()
    def find_pruned(self) -> None:
        """Look which weights have rho = -inf; they stay pruned from now on."""
        self._pruned = {}
        for pair in self.pairs():
            if not pair.rho.is_meta and (mask := pair.rho == -torch.inf).any():
                self._pruned[pair.name] = mask, pair.mu.detach().clone()
        if self._pruned:
            steps.pruned.add(self)

    @torch.no_grad()
    def keep_pruned(self) -> None:
        """Set pruned weights to what they are: weight decay and averages make NaN of -inf, momentum moves mu."""
        for name, (mask, kept) in self._pruned.items():
            mu, rho = getattr(self, f"{name}_mu"), getattr(self, f"{name}_rho")
            if mask.device != mu.device:
                mask, kept = self._pruned[name] = mask.to(mu.device), kept.to(mu.device)
            # through .data: these very values are what every graph has seen, so no version is raised
            mu.data.copy_(torch.where(mask, kept.to(mu.dtype), mu.data))
            rho.data.masked_fill_(mask, -torch.inf)
        if self._pruned:
            steps.pruned.add(self)  # a copy is not there yet

    @property
    def _state(self) -> State:
        return self._local.state

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def identities(self) -> list[tuple[int, ...]]:
        """For each pair what tells it from those of other layers, as long as the layers live."""
        if "parametrizations" not in self._modules:
            tensors = self.tensors()
            return [(id(mu), id(rho)) for mu, rho in zip(tensors[::2], tensors[1::2]) if mu is not None]
        names = [name for name in self.names if self._parameters.get(name, name) is not None]
        return [tuple(map(id, (*self.sources(mu), *self.sources(rho)))) for mu, rho in zip(names[::2], names[1::2])]

    def mode(self) -> Mode:
        """How to draw now."""
        return self._state.mode if torch.compiler.is_compiling() else entered(self) or ORDINARY

    def _mode(self, compiling: bool) -> tuple[Mode, bool]:
        """(how to draw now, whether this is a recomputation by activation checkpointing)."""
        state = self._state
        if compiling:
            mode = state.latest = self._shared.latest = state.mode
            return mode, False
        hooks = top_hooks(False)
        first_pass = None if hooks is None else checkpoint(hooks)
        task = _graph_task()
        if task != -1:
            # Usually after `with sampling(...)` was left: what counts is how the first pass was made.
            return ((first_pass and first_pass.repeat(self, task)) or entered(self, task) or state.latest
                    or self._shared.latest or ORDINARY), True
        mode = entered(self) or ORDINARY if stack() else ORDINARY
        if mode.repeatable:
            state.latest = self._shared.latest = mode
        if first_pass is not None:
            first_pass.note(self, mode)
        return mode, False

    def _key(self, mode: Mode, device: torch.device) -> Tensor:
        if mode.key is not None:
            return mode.key
        frozen = self._buffers["frozen_key"]
        if frozen is not None and not mode.explicit:
            return frozen
        return fresh_key(device, mode.first_sample)

    def _remember(self, tensors: tuple, key: Tensor, n_samples: int, kl, compiling: bool) -> None:
        """Keep the key and, with gradients on, the KL (see Record) of a call with these `_registered` tensors."""
        state = self._state
        state.key = key
        if torch.is_grad_enabled():
            state.record = Record(tensors, self.options(), key, n_samples, kl, compiling)
        elif compiling:
            state.record = None  # it could not be told whether it still holds

    def recorded(self) -> Record | None:
        """The record of the latest call made with gradients on, if it holds for the parameters now."""
        record = self._state.record
        if record is None or (not torch.compiler.is_compiling()
                              and torch._C._are_functorch_transforms_active()):
            return None
        return record if record.belongs_to(self._registered(), self.options()) else None

    def _registered(self, parameters: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor | None, ...]:
        """The parameters (of what is reparametrized, what it is made of) and the tensors that priors are made of."""
        if "parametrizations" in self._modules:
            parameters = tuple(t for name in self.names for t in self.sources(name) if isinstance(t, Tensor))
        elif parameters is None:
            parameters = self.tensors()
        return parameters + self.priors() if self.prior_tensors else parameters


def _before_saving(layer: VariationalLayer, prefix: str, keep_vars: bool) -> None:
    layer.keep_pruned()


def _after_loading(layer: VariationalLayer, incompatible_keys) -> None:
    layer.find_pruned()


def named_layers(model: nn.Module) -> list[tuple[str, VariationalLayer]]:
    """(qualified name, layer) of each variational layer in `model`, under its first name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, VariationalLayer)]
