"""Gradients of the raw operators.

There are three ways, with the same formulas (the operators' own) behind them:

*Eager, with the nodes in C++* (csrc/autograd, a second extension that belongs to one version of torch). One node makes the
output y; its `Call` remembers the KL that came out of the same pass. Nobody differentiates the KL until it is read, and
then one node covers all the layers read together; where a backward pass runs both, one fused pass serves both.

*Under torch.func or torch.compile.* One function (y, kl) with setup_context, save_for_backward and a vmap rule.

*Eager, without the nodes.* The same function for y alone; the KL takes a pass of its own. Two outputs of one function would
not do: `nll.backward(); kl.backward()` would walk the layers below twice.

A backward that is itself differentiated would silently give zeros: it goes through a function whose backward raises.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _build
from . import raw

nodes = _build.nodes
_PLAIN = "Within `with bnn_fast.plain():` layers run in plain PyTorch, with the same noise and all derivatives."
_DOUBLE = f"bnn_fast's operators are differentiable once: their gradients have no gradient (double backward). {_PLAIN}"
_FORWARD = f"bnn_fast's operators have no forward-mode derivative. {_PLAIN}"


def transformed() -> bool:
    """Whether torch.compile is tracing or a torch.func transform is active."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Operator:
    """A raw operator as autograd sees it.

    Its arguments are (*inputs, *other tensors, *numbers); `inputs` names those that have a gradient.
    `backward` takes (*output gradients, *arguments) and, where the first input is x, whether x needs a
    gradient.
    """

    def __init__(self, forward, backward, inputs: tuple[str, ...], tensors: int, kl: int | None = None):
        self.forward = forward
        self.backward = backward
        self.inputs = inputs
        self.has_x = inputs[0] == "x"
        self.kl = kl  # which argument, of those behind x, is the KL's kind
        self.traced, self.transformable = _transformable(self, tensors)
        if nodes is not None:
            self.node = nodes.Operator(forward.name(), backward.name(), inputs[self.has_x:], self.has_x, kl is not None)

    def apply(self, *arguments):
        """The operator as one function."""
        if not torch.compiler.is_compiling():
            return self.transformable.apply(*arguments)
        # torch.compile does not trace a function of *arguments that needs no gradient
        return (self.traced.apply if _wants_gradient(arguments[:len(self.inputs)]) else self.forward)(*arguments)


def _wants_gradient(inputs: tuple) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _transformable(operator: Operator, tensors: int) -> tuple[type, type]:
    """The forward as a function with setup_context and vmap: for torch.compile, and for all else."""
    n_inputs = len(operator.inputs)
    has_x = operator.has_x
    run_forward, run_backward = operator.forward, operator.backward

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*arguments):
            return run_backward(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(_DOUBLE)

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return _one_by_one(Backward, info.batch_size, in_dims, arguments)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*arguments):
            return run_forward(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:tensors])
            ctx.numbers = inputs[tensors:]

        @staticmethod
        def backward(ctx, *grads):
            arguments = (*ctx.saved_tensors, *ctx.numbers)
            need_x = (ctx.needs_input_grad[0],) if has_x else ()
            # torch.compile's own backward raises when differentiated, and traces no function in a function
            run = run_backward if torch.compiler.is_compiling() else Backward.apply
            result = run(*grads, *arguments, *need_x)
            wanted = [needed and tensor is not None
                      for needed, tensor in zip(ctx.needs_input_grad, arguments[:n_inputs])]
            if has_x and grads[0] is None:
                wanted[0] = False
            return (*(g if want else None for g, want in zip(result, wanted)),
                    *(None,) * (len(arguments) - n_inputs))

        @staticmethod
        def vmap(info, in_dims, *arguments):
            if has_x and in_dims[0] is not None and all(d is None for d in in_dims[1:]):
                return _folded(Forward, info.batch_size, in_dims[0], arguments)
            return _one_by_one(Forward, info.batch_size, in_dims, arguments)

    class WithError(Forward):  # torch.compile traces no function that has a jvp
        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(_FORWARD)

    return Forward, WithError


def _one_by_one(function, batch_size: int, in_dims: tuple, arguments: tuple):
    """vmap by a loop: each element has parameters, noise, or gradients of the parameters of its own."""
    results = [function.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims)))
               for i in range(batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results)), (0,) * len(results[0])


def _folded(function, batch_size: int, x_dim: int, arguments: tuple):
    """vmap over x alone: its dimension joins the batch, behind the samples', and all share the draw."""
    x, n_samples = arguments[0].movedim(x_dim, 0), arguments[N_SAMPLES]
    if n_samples == 1:
        y, kl = function.apply(x, *arguments[1:])
        return (y, kl), (0, None)
    parts = x.unflatten(1, (n_samples, x.shape[1] // n_samples)).movedim(1, 0)  # [S, V, B, ...]
    y, kl = function.apply(parts.flatten(0, 2), *arguments[1:])
    y = y.unflatten(0, parts.shape[:3]).movedim(1, 0).flatten(1, 2)
    return (y, kl), (0, None)


def draw(operator: Operator, x: Tensor | None, arguments: tuple):
    """y of an eager call, and its Call, whose KL `read` gives; without the nodes None, and its KL is nobody's yet."""
    if nodes is not None:
        return nodes.draw(operator.node, x, arguments)
    without_kl = (*arguments[:operator.kl], 0, *arguments[operator.kl + 1:])
    return operator.apply(*(() if x is None else (x,)), *without_kl)[0], None


def kl_call(arguments: tuple):
    """The Call of a KL without a draw; only with the nodes."""
    return nodes.kl(KL.node, arguments)


def read(calls: list) -> Tensor:
    """The sum of the KLs of the calls, with its gradient. May be read again."""
    return nodes.read(calls)


if raw.HAS_EXTENSION:
    LINEAR = Operator(raw.variational_linear, raw.variational_linear_backward,
                      ("x", "weight_mu", "weight_rho", "bias_mu", "bias_rho"), tensors=10, kl=14)
    SAMPLE = Operator(raw.sample_normal, raw.sample_normal_backward, ("mu", "rho"), tensors=5, kl=8)
    KL = Operator(raw.kl_normal, raw.kl_normal_backward, ("mu", "rho"), tensors=4)
    N_SAMPLES = 16  # position of n_samples among the arguments of LINEAR
