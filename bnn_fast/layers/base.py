"""What every variational layer does around its weights: choosing the key, drawing, and keeping the KL of the pass."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .. import checks
from ..operators import arguments as packing
from ..operators import autograd, functional, raw
from . import checkpoint as checkpoint_of_layer
from .drawn import Drawn
from .modes import ORDINARY, Mode, checkpoint, entered, stack, top_hooks
from .posterior import Pair, Posterior
from .state import Local, Record, Shared, State, fresh_keys

_graph_task = torch._C._current_graph_task_id
_tracing = torch._C._get_tracing_state


class VariationalLayer(Posterior):
    """Base of the layers whose weights are drawn at every call. A layer of your own names its posteriors and says what it does
    with drawn weights:

        class Scale(bnn_fast.VariationalLayer):
            def __init__(self, features, **options):
                super().__init__(**options)
                self.add_posterior("weight", (features,))

            def compute(self, weights, x):
                return x * weights["weight"]

    All else works then: `sampling` and S samples, `freeze`, `mc_forward`, `predict`, `draw`, `kl_divergence`, `ELBO`, `prune`,
    `signal_to_noise`, priors and `posterior`, checkpoints, torch.compile, `repr`.

    Arguments and parameters: see `Posterior`. A weight's noise is a function of the layer's key and its stream: 0 and 1 for the
    first and the second posterior of a layer that has no more, 16, 17, ... in the order they were added in where it has.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._local = Local()
        self._shared = Shared()
        self.register_buffer("frozen_key", None, persistent=False)
        self.register_state_dict_pre_hook(_before_saving)
        self.register_state_dict_post_hook(checkpoint_of_layer.save)
        self.register_load_state_dict_pre_hook(checkpoint_of_layer.load)
        self.register_load_state_dict_post_hook(_after_loading)

    def check(self, n_samples: int, *inputs, **keywords) -> None:
        """Raise TypeError or ValueError if a call is given something else than it takes; called before anything is drawn. Of a
        layer that does not say more, only that the batch can be divided among n_samples.
        """
        if n_samples > 1:
            for value in tree_leaves((inputs, keywords)):
                checks.repeated("inputs", value, n_samples)

    def shares(self, x: Tensor) -> bool:
        """Whether under n_samples > 1 the layer takes x [S, B, ...] beside [S * B, ...], gives [S, B, ...] for it, and copies nothing that
        the draws share (x.expand(S, ...)).
        """
        return False

    def compute(self, weights: dict[str, Tensor], *inputs, **keywords):
        """What the layer gives for its inputs with these weights: by name, of the parameters' shapes and dtype; the means within
        `sampling(mean=True)`. Left out posteriors are not among them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes: define compute(self, weights, ...)")

    def compute_samples(self, weights: dict[str, Tensor], n_samples: int, *inputs, **keywords):
        """The same for n_samples > 1 draws in one call: the weights are [n_samples, *shape], dimension 0 of every tensor among the
        inputs is the batch repeated, [n_samples * B, ...], sample-major, and so it is to be in the outputs. One `compute` for
        each draw, unless a layer has a better way.
        """
        given, form = tree_flatten((inputs, keywords))
        parts = [_parts(value, n_samples) for value in given]
        results = []
        for s in range(n_samples):
            own_inputs, own_keywords = tree_unflatten([part[s] for part in parts], form)
            results.append(self.compute({name: w[s] for name, w in weights.items()}, *own_inputs, **own_keywords))
        outputs = [tree_flatten(result)[0] for result in results]
        joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs)]
        return tree_unflatten(joined, tree_flatten(results[0])[1])

    def forward(self, *inputs, **keywords):
        compiling = torch.compiler.is_compiling()
        functorch = not compiling and torch._C._are_functorch_transforms_active()
        if not self._fans:
            raise NotImplementedError(f"{type(self).__name__} has no posterior: call add_posterior in its __init__")
        mode, recomputed = self._mode(compiling)
        self.check(mode.n_samples, *inputs, **keywords)
        pairs = self.pairs()
        if mode.mean or not pairs:
            return self._computed({pair.name: pair.mu for pair in pairs}, mode.n_samples, inputs, keywords)
        key = self._key(mode, self.device)
        with_kl = torch.is_grad_enabled() and not recomputed and not functorch
        weights, kls = {}, []
        y = self._estimated(mode, key, recomputed, *inputs, **keywords)
        if y is None:
            for pair in pairs:
                w, kl = self._draw(pair, key, mode.n_samples, with_kl, compiling or functorch)
                weights[pair.name] = w if mode.n_samples > 1 else w[0]
                kls.append(kl)
            y = self._computed(weights, mode.n_samples, inputs, keywords)
        if not recomputed and not functorch:
            self._remember(self._registered(), key, mode.n_samples, None if not kls or None in kls else tuple(kls), compiling)
        return y

    def _estimated(self, mode: Mode, key: Tensor, recomputed: bool, *inputs, **keywords):
        """What a layer gives whose estimator is not "weight"; None where weights are to be drawn."""
        return None

    def _computed(self, weights: dict[str, Tensor], n_samples: int, inputs: tuple, keywords: dict):
        if n_samples == 1:
            return self.compute(weights, *inputs, **keywords)
        return self.compute_samples(weights, n_samples, *inputs, **keywords)

    def drawn(self, key: Tensor | None) -> nn.Module:
        """The ordinary module that the layer is under `key`, or with its means (None)."""
        return Drawn(self, self.weights(key))

    def places(self, name: str) -> list[str]:
        """Where the module that `drawn` gives has the weights of this name, with dots."""
        return [name]

    @torch.no_grad()
    def weights(self, key: Tensor | None) -> dict[str, Tensor]:
        """The weights that the key stands for, or the means (None), by name."""
        return {pair.name: pair.mu.detach().clone() if key is None else functional.sample_normal(
            pair.mu, pair.rho, key, scale=self.scale, kl=None, stream=pair.stream)[0] for pair in self.pairs()}

    def _draw(self, pair: Pair, key: Tensor, n_samples: int, with_kl: bool, transformed: bool):
        """(weights [n_samples, ...], their KL as `Record` keeps it)."""
        if not raw.compiled_for(pair.mu.device):
            return functional.sample_normal(pair.mu, pair.rho, key, scale=self.scale, kl=None, n_samples=n_samples,
                                            stream=pair.stream)[0], None
        arguments = packing.to_draw([pair.mu, pair.rho], key, packing.pack_priors(pair.prior), self.scale,
                                    self.kl if with_kl else None, n_samples, pair.stream)
        return self._run(autograd.SAMPLE, (), arguments, transformed)

    def _run(self, operator, x: tuple, arguments: tuple, transformed: bool):
        """(result, KL as `Record` keeps it) of an operator on (x or nothing, *arguments)."""
        if transformed:
            return operator.apply(*x, *arguments)
        if not torch.is_grad_enabled():
            return operator.forward(*x, *arguments)[:2]  # what is kept for a gradient is of no use
        if _tracing() is not None:
            raise RuntimeError("torch.jit.trace would lose the gradients of drawn weights: trace under "
                               "torch.no_grad(), or trace bnn_fast.draw(model, seed), an ordinary module")
        return autograd.draw(operator, x[0] if x else None, arguments)

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

    @property
    def _state(self) -> State:
        return self._local.state

    @property
    def device(self) -> torch.device:
        for tensor in self.tensors():
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")  # nothing is drawn

    def identities(self) -> list[tuple[int, ...]]:
        """For each pair what tells it from those of other layers, as long as the layers live."""
        if "parametrizations" not in self._modules:
            tensors = self.tensors()
            return [(id(mu), id(rho)) for mu, rho in zip(tensors[::2], tensors[1::2]) if mu is not None]
        names = [name for name in self.names if self._parameters.get(name, name) is not None]
        return [tuple(map(id, (*self.sources(mu), *self.sources(rho)))) for mu, rho in zip(names[::2], names[1::2])]

    def drawing_mode(self) -> Mode:
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
        return fresh_keys(1, device)[0]

    def estimated_kl(self, record: Record) -> Tensor | None:
        """The KL of a layer that estimates it from what the recorded call was given; None for all the others."""
        return None

    def _remember(self, tensors: tuple, key: Tensor, n_samples: int, kl, compiling: bool, given=None) -> None:
        """Keep the key and, with gradients on, the KL (see Record) of a call with these `_registered` tensors."""
        if "parametrizations" in self._modules:
            kl = None  # two backward passes would walk the parametrization twice
        state = self._state
        state.key = key
        if torch.is_grad_enabled():
            state.record = Record(tensors, self.options(), key, n_samples, kl, compiling, given)
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


def _parts(value, n_samples: int):
    """n_samples equal parts of a tensor along dimension 0; anything else, that many times."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return [value] * n_samples
    return value.chunk(n_samples) if value.shape[0] else [value] * n_samples


def _before_saving(layer: VariationalLayer, prefix: str, keep_vars: bool) -> None:
    layer.keep_pruned()


def _after_loading(layer: VariationalLayer, incompatible_keys) -> None:
    layer.find_pruned()


def named_layers(model: nn.Module) -> list[tuple[str, VariationalLayer]]:
    """(qualified name, layer) of each variational layer in `model`, under its first name: as of model.named_modules(), which takes
    three times as long.
    """
    found: list[tuple[str, VariationalLayer]] = []
    _collect(model, "", set(), found)
    return found


def _collect(module: nn.Module, name: str, seen: set[nn.Module], found: list[tuple[str, VariationalLayer]]) -> None:
    seen.add(module)
    if isinstance(module, VariationalLayer):
        found.append((name, module))
    for key, child in module._modules.items():
        if child is not None and child not in seen:
            _collect(child, f"{name}.{key}" if name else key, seen, found)
