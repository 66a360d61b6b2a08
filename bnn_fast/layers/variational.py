"""Any module with its parameters drawn."""
from __future__ import annotations

import contextlib
import copy
import textwrap
import threading

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from .. import checks
from ..priors import Normal
from .base import VariationalLayer, named_layers


class Variational(VariationalLayer):
    """Any module, with its parameters drawn at every call: for modules that have no counterpart of their own here.

    Args:
        module: it is copied. All its floating-point parameters get posteriors, those that it has in several places one; their
            means are the parameters as they are. Its buffers stay, and are updated as the module does it.
        prior, bias_prior, scale, kl: as in VariationalLinear. A bias is what the last part of the name calls so.
        init_sigma: the standard deviation that every parameter begins with.

    The posterior of the parameter "layers.0.weight" is called "layers_0_weight", its parameters layers_0_weight_mu and
    layers_0_weight_rho; a name that there is already gets a "_" more. They have the parameter's requires_grad.

    The call is the module's. Under `sampling` with several samples the module runs once for each: dimension 0 of every tensor among
    inputs and outputs has to be the batch. Calls of one layer by several threads wait for each other. Activation checkpointing goes
    around the layer: within the module, what it repeats would find no parameters, and raises an error.

    Raises TypeError or ValueError if the module is none, has no floating-point parameters or some that are complex, on several
    devices or still lazy, or holds variational layers.
    """

    def __init__(self, module: nn.Module, *, prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None,
                 scale: str = "softplus", kl: str = "analytic", init_sigma: float = 0.01):
        super().__init__(prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init_sigma=init_sigma)
        if init_sigma is None:
            raise TypeError("init_sigma: expected a positive number, given None")
        parameters, self._places = _parameters(module), {}
        # deepcopy takes what its memo holds for a parameter wherever it meets the parameter
        self.module = copy.deepcopy(module, {id(parameter): None for parameter in parameters})
        self._recurrent = tuple((name, m) for name, m in self.module.named_modules() if isinstance(m, nn.RNNBase))
        self._lock = _Lock()
        for parameter, places in parameters.items():
            name = places[0].replace(".", "_")
            while name in self._places:
                name += "_"
            self._places[name] = places
            self._given = {"device": parameter.device, "dtype": parameter.dtype}, prior, bias_prior
            self.add_posterior(name, tuple(parameter.shape))
            for tensor in self.tensors()[-2:]:
                tensor.requires_grad_(parameter.requires_grad)
            with torch.no_grad():
                self.tensors()[-2].copy_(parameter)

    def reset_parameters(self) -> None:
        """Set the standard deviations to init_sigma again. The means stay: how the module makes them only the module knows."""
        means = [pair.mu.detach().clone() for pair in self.pairs()]
        super().reset_parameters()
        with torch.no_grad():
            for pair, mean in zip(self.pairs(), means):
                pair.mu.copy_(mean)

    def compute(self, weights: dict[str, Tensor], *inputs, **keywords):
        drawn = {place: w for name, w in weights.items() for place in self._places[name]}
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock.lock, self._flat_weights(drawn):
            return torch.func.functional_call(self.module, drawn, inputs, keywords, tie_weights=False)

    @contextlib.contextmanager
    def _flat_weights(self, drawn: dict[str, Tensor]):
        """torch's recurrent modules have a list of their parameters, which functional_call does not know of."""
        def put(found: dict[str, Tensor]) -> None:
            for prefix, module in self._recurrent:
                module._flat_weights = [found.get(f"{prefix}.{name}" if prefix else name) for name in module._flat_weights_names]

        put(drawn)
        try:
            yield
        finally:
            put({})

    def drawn(self, key: Tensor | None) -> nn.Module:
        return self._with(self.weights(key))

    def places(self, name: str) -> list[str]:
        return self._places[name]

    def _with(self, weights: dict[str, Tensor]) -> nn.Module:
        """The module with these parameters."""
        with self._lock.lock:
            module = copy.deepcopy(self.module)
        for name, w in weights.items():
            parameter = nn.Parameter(w, requires_grad=getattr(self, f"{name}_mu").requires_grad)
            for place in self._places[name]:
                owner, _, own_name = place.rpartition(".")
                setattr(module.get_submodule(owner), own_name, parameter)
        return module

    def _is_bias(self, name: str) -> bool:
        return "bias" in self._places[name][0].rpartition(".")[2]

    def extra_repr(self) -> str:
        return super().extra_repr().replace(f", init={self.init!r}", "")

    def __repr__(self) -> str:
        module = self._with({pair.name: pair.mu.detach().to("meta") for pair in self.pairs()})
        return f"{self._get_name()}(\n  {self.extra_repr()}\n{textwrap.indent(f'(module): {module!r}', '  ')}\n)"


class _Lock:
    """A lock that copies and pickles as a new one. functional_call puts the drawn parameters into the one module there is."""

    def __init__(self):
        self.lock = threading.RLock()

    def __deepcopy__(self, memo):
        return _Lock()

    def __reduce__(self):
        return _Lock, ()


def _parameters(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each of the module's floating-point parameters with the names that it has."""
    checks.module("module", module)
    if named_layers(module):
        raise ValueError(f"module: expected one without variational layers, given {named_layers(module)[0][0]!r} among its modules")
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedTensorMixin):
            raise ValueError(f"module: expected parameters with shapes, given {name} of a lazy module: call it once before")
        if parameter.is_complex():
            raise TypeError(f"module: expected real parameters, given {name}, {checks.describe(parameter)}")
        if parameter.is_floating_point():
            found.setdefault(parameter, []).append(name)
    if not found:
        raise ValueError(f"module: expected one with floating-point parameters, given {checks.describe(type(module))}")
    devices = dict.fromkeys(parameter.device for parameter in found)
    if len(devices) > 1:
        raise ValueError(f"module: expected its parameters on one device, given {', '.join(map(str, devices))}")
    return found
