"""Linear layers and activations that follow each other, run as one operator (csrc/chain.h) where all is as usual, else one by
one: keys, noise, KL and results are the same.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import checks
from ..operators import arguments as packing
from ..operators import autograd, functional, raw
from .base import VariationalLayer
from .modes import top_hooks
from .ordinary import LONGEST, WIDEST, WIDEST_TRAINED, in_chains, ordinary
from .variational_linear import VariationalLinear


def _coded(name: str, *numbers: float) -> tuple[int, float, float]:
    return checks.ACTIVATIONS[name], *(*map(float, numbers), 0.0, 0.0)[:2]


in_chains.update({
    VariationalLinear: True, nn.Linear: False,
    nn.Identity: lambda m: _coded("identity"),
    nn.ReLU: lambda m, code=_coded("relu"): code,
    nn.LeakyReLU: lambda m: _coded("leaky_relu", m.negative_slope),
    nn.ELU: lambda m: _coded("elu", m.alpha),
    nn.GELU: lambda m: _coded("gelu" if m.approximate == "none" else "gelu_tanh"),
    nn.SiLU: lambda m: _coded("silu"),
    nn.Tanh: lambda m: _coded("tanh"),
    nn.Sigmoid: lambda m: _coded("sigmoid"),
    nn.Softplus: lambda m: _coded("softplus", m.beta, m.threshold),
})


class Sequential(nn.Sequential):
    """nn.Sequential whose linear layers, at most 128 wide (on the CPU 1024 without gradients), and the activations behind them run as one
    operator each way, with the keys, noise, KL and results of the layers one by one.

    What makes a chain: two or more of VariationalLinear (estimator "weight", one scale and kl) and nn.Linear, one of them
    variational, all in float32, on the CPU or in float64, on CUDA or in bfloat16 or float16, each followed by nothing or by one of ReLU,
    LeakyReLU, ELU, GELU, SiLU, Tanh, Sigmoid, Softplus and Identity; those in a nested Sequential count. Anything else ends it:
    another module, hooks on one, global ones too, parametrizations, wrappers (FSDP, activation checkpoints), shared parameters,
    autocast, torch.compile. Then layers run one by one. `explain(model, x)` says what runs how, and why.

    Arguments, names and state_dict are those of nn.Sequential; `fuse(model)` makes it of every nn.Sequential in a model. For the gradient
    intermediate results are computed again; drawn weights are kept, up to 2^20 of all draws, or else drawn again.
    """

    def forward(self, x):
        return run(self._modules.values(), x)


# Of each draw, that a chain wider than WIDEST_TRAINED is worth: where they are fewer, layers do not write their weights to memory. On
# two cores with AVX-512, 100 draws of 784-400-400-10: 1.08 of the layers' time at 16 rows, 0.83 at 64, 0.66 at 1,000.
FEWEST_ROWS = 32

TYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


class Step(NamedTuple):
    """A layer of a chain with the activation behind it, if there is one."""
    layer: nn.Module
    activation: nn.Module | None

    def code(self) -> tuple[int, float, float]:
        return _coded("identity") if self.activation is None else in_chains[type(self.activation)](self.activation)


def run(modules: Iterable[nn.Module], x, draws: int = 1):
    """What the modules give, one after the other. draws: x [B, ...] is that of so many draws, and the output [draws * B, ...]."""
    modules, steps = list(modules), ordinary()
    if steps is not None and not torch_module._has_any_global_hook() and (y := steps.chain(modules, x, draws)) is not None:
        return y
    for part in modules if torch.compiler.is_compiling() else parts(modules):  # that makes kernels of its own
        y = _run_chain(part, x, draws) if isinstance(part, list) else None
        if y is None:
            y = x
            for module in modules_of(part):
                y, draws = module(y) if draws == 1 else _on_shared(module, y, draws), 1
        x, draws = y, 1
    return x


def _on_shared(module: nn.Module, x: Tensor, draws: int):
    """What the module gives on x [B, ...] repeated for so many draws; linear layers and convolutions read the x that they share where
    it is.
    """
    if not takes_shared(module, x):
        return module(x.repeat(draws, *(1,) * (x.dim() - 1)))
    x = functional.autocast(x)
    return module(x.expand(draws, *x.shape)).flatten(0, 1)


def takes_shared(module: nn.Module, x) -> bool:
    """Whether the module gives on x [S, B, ...] what it gives on its rows [S * B, ...], and copies none that the draws share. Hooks
    see what they are used to.
    """
    return isinstance(module, VariationalLayer) and isinstance(x, Tensor) and is_plain(module) and module.shares(x)


def modules_of(part: nn.Module | list[Step]) -> list[nn.Module]:
    return [part] if isinstance(part, nn.Module) else [m for step in part for m in step if m is not None]


def parts(modules: Iterable[nn.Module]) -> Iterator[nn.Module | list[Step]]:
    """The modules, and in the place of some that follow each other the chain that they are."""
    chain, seen = [], set()
    for module in flat(modules):
        if _is_step(module):
            if chain and not _continues(chain, seen, module):
                yield from _chain_or_modules(chain)
                chain, seen = [], set()
            chain.append(Step(module, None))
            seen.update(map(id, module._parameters.values()))
        elif chain and chain[-1].activation is None and callable(in_chains.get(type(module))) and is_plain(module):
            chain[-1] = Step(chain[-1].layer, module)
        else:
            yield from _chain_or_modules(chain)
            chain, seen = [], set()
            yield module
    yield from _chain_or_modules(chain)


def flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules, those within an nn.Sequential that does nothing else than call them in its place."""
    for module in modules:
        if runs_its_children(module):
            yield from flat(module._modules.values())
        else:
            yield module


def runs_its_children(module: nn.Module) -> bool:
    """Whether a call of the module is nothing but calls of its children."""
    return getattr(type(module), "forward", None) in (nn.Sequential.forward, Sequential.forward) and is_plain(module)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return (type(module).__call__ is nn.Module.__call__ and "forward" not in module.__dict__
            and getattr(module, "_compiled_call_impl", None) is None
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
            and not torch_module._has_any_global_hook())


def _chain_or_modules(chain: list[Step]) -> list:
    """One layer, or none that is drawn, is no chain."""
    if len(chain) > 1 and any(isinstance(step.layer, VariationalLinear) for step in chain):
        return [chain]
    return [m for step in chain for m in modules_of([step])]


def _is_step(module: nn.Module) -> bool:
    drawn = in_chains.get(type(module))
    if drawn is True:
        fits = module.estimator == "weight" and "weight_mu" in module._parameters and "parametrizations" not in module._modules
    else:
        fits = drawn is False and isinstance(module._parameters.get("weight"), Tensor)
    if not fits or not is_plain(module):
        return False
    on_cpu = module._parameters["weight_mu" if drawn else "weight"].is_cpu
    widest = WIDEST if on_cpu and not torch.is_grad_enabled() else WIDEST_TRAINED
    return max(module.in_features, module.out_features) <= widest


def _continues(chain: list[Step], seen: set[int], module: nn.Module) -> bool:
    """Whether the layer fits to those before it: a posterior has one draw, and one operator one meaning of rho and one KL."""
    if len(chain) == LONGEST or chain[-1].layer.out_features != module.in_features:
        return False
    if any(id(t) in seen for t in module._parameters.values() if t is not None):
        return False
    if isinstance(module, nn.Linear):
        return True
    drawn = next((step.layer for step in chain if isinstance(step.layer, VariationalLinear)), module)
    return (drawn.scale, drawn.kl) == (module.scale, module.kl)


def _run_chain(chain: list[Step], x, draws: int) -> Tensor | None:
    """y, or None, and nothing has happened, where the layers have to be called one by one."""
    if why_not(chain, x, draws) is not None:
        return None
    layers = [step.layer for step in chain if isinstance(step.layer, VariationalLinear)]
    modes = [layer._mode(False)[0] for layer in layers]
    n_samples, mean = modes[0].n_samples, modes[0].mean
    modes, links, keys = iter(modes), [], []
    for step in chain:
        layer, key, prior = step.layer, None, None
        if isinstance(layer, nn.Linear):
            tensors = list(layer._parameters.values())
        elif mean:
            tensors = [layer.weight_mu, layer.bias_mu]
        else:
            layer.keep_pruned()
            key, tensors = layer._key(next(modes), x.device), list(layer.tensors())
            there = 2 if layer.bias_mu is None else 4
            prior = packing.pack_prior(layer.priors()[:there] if layer.prior_tensors else (), layer._numbers[:there])
            keys.append(key)
        links.append(packing.Link([t for t in tensors if t is not None], key, prior, step.code()))
    arguments = packing.to_chain(links, layers[0].scale, layers[0].kl if torch.is_grad_enabled() else None, n_samples, draws > 1)
    if not torch.is_grad_enabled():
        y, call = autograd.CHAIN.forward(x, *arguments)[0], None
    else:
        y, call = autograd.draw(autograd.CHAIN, x, arguments)
        call.layers = len(keys)
    for layer, key in zip(layers, keys):
        layer._remember(layer._registered(layer.tensors()), key, n_samples, None if call is None else (call,), False)
    return y


def why_not(chain: list[Step], x, draws: int = 1) -> str | None:
    """Why the chain does not run as one operator on x; None if it does."""
    if autograd.nodes is None:
        return "this build has no nodes for autograd"
    if (autograd.transformed() or torch._C._get_tracing_state() is not None or torch._C._current_graph_task_id() != -1
            or top_hooks(False) is not None or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()):
        return "a transform, a trace, a mode or a hook of torch is to see every layer, or a backward pass repeats it"
    if raw.in_plain.get():
        return "bnn_fast.plain() asks for plain PyTorch"
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.device.type not in TYPES:
        return "the operator runs on dense tensors on the CPU and on CUDA"
    if not raw.compiled_for(x.device):
        return "this build has no kernels for CUDA"
    first = chain[0].layer
    tensors = [t for step in chain for t in step.layer._parameters.values() if t is not None]
    types = TYPES[x.device.type]
    if x.dtype not in types or any(t.dtype != x.dtype or t.device != x.device for t in tensors):
        return f"the operator runs there where x and all parameters are of one dtype: {', '.join(str(t)[6:] for t in types)}"
    if x.dim() < 2 or x.shape[-1] != first.in_features:
        return f"it takes x [B, ..., {first.in_features}]"
    widest = max(max(step.layer.in_features, step.layer.out_features) for step in chain)
    modes = [step.layer.drawing_mode() for step in chain if isinstance(step.layer, VariationalLinear)]
    if any((mode.n_samples, mode.mean) != (modes[0].n_samples, modes[0].mean) for mode in modes):
        return "the layers are in different contexts"
    if draws == 1 and x.shape[0] % modes[0].n_samples or draws not in (1, modes[0].n_samples):
        return "the rows of x are not those of whole draws"
    if widest > WIDEST_TRAINED and x.shape[:-1].numel() < FEWEST_ROWS * (modes[0].n_samples if draws == 1 else 1):
        return f"layers wider than {WIDEST_TRAINED} take at least {FEWEST_ROWS} rows"
    return None
