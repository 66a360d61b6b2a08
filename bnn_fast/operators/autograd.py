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
from . import arguments as packing
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

    Its arguments are as arguments.py has them; x and the posterior's tensors have a gradient. `backward` takes (gradients of
    the results, *arguments) and, where there is an x, whether it needs a gradient. `draws`: its results are (y, kl), or else
    the KL alone. `keeps`: they are (y, kl, kept), and backward takes the last behind all else.
    """

    def __init__(self, forward, backward, names: tuple[str, ...], has_x: bool, draws: bool, keeps: bool = False):
        self.forward = forward
        self.backward = backward
        self.has_x, self.keeps = has_x, keeps
        self.traced, self.transformable = _transformable(self)
        if nodes is not None:
            self.node = nodes.Operator(forward.name(), backward.name(), names, has_x, draws)

    def inputs(self, form: tuple) -> int:
        """How many tensors, the first of all, have a gradient."""
        sizes = form[0]
        return 1 + sizes[1] if self.has_x else sizes[0]

    def apply(self, *arguments):
        """The operator as one function, without what it keeps."""
        results = self._apply(arguments)
        return results[:2] if self.keeps else results

    def _apply(self, arguments: tuple):
        form, tensors = packing.spread(arguments)
        if not torch.compiler.is_compiling():
            return self.transformable.apply(form, *tensors)
        # torch.compile does not trace a function of *arguments that needs no gradient
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors[:self.inputs(form)]):
            return self.traced.apply(form, *tensors)
        return self.forward(*arguments)


def _transformable(operator: Operator) -> tuple[type, type]:
    """The forward as a function with setup_context and vmap: for torch.compile, and for all else."""
    has_x, keeps = operator.has_x, operator.keeps
    run_forward, run_backward = operator.forward, operator.backward

    class Backward(torch.autograd.Function):
        """Of (form, whether x needs a gradient, *tensors), those of the results' gradients first, what is kept last."""

        @staticmethod
        def forward(form, need_x, *tensors):
            end = len(tensors) - keeps
            return tuple(run_backward(*packing.gather(form, tensors), *need_x, *tensors[end:]))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(_DOUBLE)

        @staticmethod
        def vmap(info, in_dims, form, need_x, *tensors):
            return _one_by_one(Backward, info.batch_size, in_dims[2:], (form, need_x), tensors)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(form, *tensors):
            return run_forward(*packing.gather(form, tensors))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.form = inputs[0]
            ctx.save_for_backward(*inputs[1:], *output[2:] if keeps else ())
            if keeps:
                ctx.mark_non_differentiable(output[2])

        @staticmethod
        def backward(ctx, *grads):
            tensors, (sizes, *rest) = ctx.saved_tensors, ctx.form
            grads = grads[:2]
            form = ((len(grads), *sizes), *rest)
            need_x = (ctx.needs_input_grad[1],) if has_x else ()
            # torch.compile's own backward raises when differentiated, and traces no function in a function
            run = Backward.forward if torch.compiler.is_compiling() else Backward.apply
            result = run(form, need_x, *grads, *tensors)
            wanted = list(ctx.needs_input_grad[1:1 + len(result)])
            if has_x and grads[0] is None:
                wanted[0] = False
            return (None, *(g if want else None for g, want in zip(result, wanted)),
                    *(None,) * (len(tensors) - keeps - len(result)))

        @staticmethod
        def vmap(info, in_dims, form, *tensors):
            if has_x and not keeps and in_dims[1] is not None and all(d is None for d in in_dims[2:]):
                return _folded(Forward, info.batch_size, in_dims[1], form, tensors)
            return _one_by_one(Forward, info.batch_size, in_dims[1:], (form,), tensors)

    class WithError(Forward):  # torch.compile traces no function that has a jvp
        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(_FORWARD)

    return Forward, WithError


def _one_by_one(function, batch_size: int, in_dims: tuple, constants: tuple, tensors: tuple):
    """vmap by a loop: each element has parameters, noise, or gradients of the parameters of its own."""
    results = [function.apply(*constants, *(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims)))
               for i in range(batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results)), (0,) * len(results[0])


def _folded(function, batch_size: int, x_dim: int, form: tuple, tensors: tuple):
    """vmap over x alone: its dimension joins the batch, behind the samples', and all share the draw."""
    x, n_samples = tensors[0].movedim(x_dim, 0), form[-1][packing.N_SAMPLES]
    if n_samples == 1:
        y, kl = function.apply(form, x, *tensors[1:])
        return (y, kl), (0, None)
    parts = x.unflatten(1, (n_samples, x.shape[1] // n_samples)).movedim(1, 0)  # [S, V, B, ...]
    y, kl = function.apply(form, parts.flatten(0, 2), *tensors[1:])
    y = y.unflatten(0, parts.shape[:3]).movedim(1, 0).flatten(1, 2)
    return (y, kl), (0, None)


def draw(operator: Operator, x: Tensor | None, arguments: tuple):
    """y of an eager call, and its Call, whose KL `read` gives; without the nodes None, and its KL is nobody's yet."""
    if nodes is not None:
        return nodes.draw(operator.node, x, arguments)
    return operator.apply(*(() if x is None else (x,)), *packing.without_kl(arguments))[0], None


def kl_call(arguments: tuple):
    """The Call of a KL without a draw; only with the nodes."""
    return nodes.kl(KL.node, arguments)


def read(calls: list) -> Tensor:
    """The sum of the KLs of the calls, with its gradient. May be read again."""
    return nodes.read(calls)


if raw.HAS_EXTENSION:
    LINEAR = Operator(raw.variational_linear, raw.variational_linear_backward, packing.LAYER, has_x=True, draws=True)
    NOISY = Operator(raw.noisy_linear, raw.noisy_linear_backward, packing.NOISY, has_x=True, draws=True)
    ESTIMATED = Operator(raw.estimated_linear, raw.estimated_linear_backward, packing.LAYER, has_x=True, draws=True, keeps=True)
    CHAIN = Operator(raw.variational_chain, raw.variational_chain_backward, (), has_x=True, draws=True, keeps=True)
    SAMPLE = Operator(raw.sample_normal, raw.sample_normal_backward, packing.PAIR, has_x=False, draws=True)
    ROWS = Operator(raw.sample_rows, raw.sample_rows_backward, packing.PAIR, has_x=False, draws=True, keeps=True)
    KL = Operator(raw.kl_normal, raw.kl_normal_backward, packing.PAIR, has_x=False, draws=False)
