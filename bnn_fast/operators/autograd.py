"""Gradients of the raw operators.

There are two ways, with the same formulas (the operators' own) behind them:

*Eager.* One `_Draw` node makes the output y; its `Call` remembers the KL that came out of the same pass.
Nobody differentiates the KL until it is read, and then one `_KL` node covers all the layers read together. A
KL node has edges to the parameters only, so that `nll.backward(); kl.backward()`, in either order and through
any number of layers, never walks a graph twice (a KL that came out of the same node as y would: the engine
goes on from there into the layers below). In `(nll + kl).backward()` the KL node hands its gradient to the
draw's node, which the engine is still to run, and one fused pass serves both.

*Under torch.func or torch.compile.* One function (y, kl) with setup_context, save_for_backward and a vmap
rule.

A backward that is itself differentiated would silently give zeros: it goes through a function whose backward
raises.
"""
from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from . import raw

_engine = torch._C
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_handover = threading.Lock()
_AGAIN = ("Trying to backward through bnn_fast's graph a second time after its input was freed. "
          "Specify retain_graph=True in the first backward call.")
_MODIFIED = ("{}, needed for the gradient, has been modified by an inplace operation: "
             "it is at version {}, expected version {}.")
_FREED = object()
_DOUBLE = "bnn_fast's operators are differentiable once: their gradients have no gradient (double backward)."


def transformed() -> bool:
    """Whether torch.compile is tracing or a torch.func transform is active."""
    return torch.compiler.is_compiling() or _engine._are_functorch_transforms_active()


class Operator:
    """A raw operator as autograd sees it.

    Its arguments are (*inputs, *other tensors, *numbers); `inputs` names those that have a gradient.
    `backward` takes (*output gradients, *arguments) and, where the first input is x, whether x needs a
    gradient.
    """

    def __init__(self, forward, backward, inputs: tuple[str, ...], tensors: int):
        self.forward = forward
        self.backward = backward
        self.inputs = inputs
        self.has_x = inputs[0] == "x"
        self.parameters = inputs[self.has_x:]
        self.differentiable, self.transformable = _transformable(self, tensors)

    def apply(self, *arguments):
        """The operator under torch.func and torch.compile."""
        if torch.compiler.is_compiling() and not _wants_gradient(arguments[:len(self.inputs)]):
            # torch.compile does not trace a function of *arguments that needs no gradient
            return self.forward(*arguments)
        return self.transformable.apply(*arguments)


def _wants_gradient(inputs: tuple) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _transformable(operator: Operator, tensors: int) -> tuple[type, type]:
    """(backward, forward) as functions with setup_context and vmap."""
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

    return Backward, Forward


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


class Call:
    """One eager call: what the gradient of its KL needs, and how its two nodes find each other.

    `arguments` are the operator's, without x where it has one.
    """
    __slots__ = ("operator", "arguments", "parameters", "versions", "kl", "node", "task", "pending")

    def __init__(self, operator: Operator, arguments: tuple):
        self.operator = operator
        self.arguments = arguments
        self.parameters = arguments[:len(operator.parameters)]
        self.versions = [None if p is None else p._version for p in self.parameters]
        self.kl = self.node = self.task = self.pending = None

    def check_versions(self) -> None:
        for name, parameter, version in zip(self.operator.parameters, self.parameters, self.versions):
            if parameter is not None and parameter._version != version:
                raise RuntimeError(_MODIFIED.format(name, parameter._version, version))

    def gradients(self, grads: tuple, x: tuple = (), need_x: tuple = ()) -> tuple:
        """Gradients of the operator's inputs, (*x, *parameters)."""
        self.check_versions()
        function = self.operator.differentiable.apply if torch.is_grad_enabled() else self.operator.backward
        found = function(*grads, *x, *self.arguments, *need_x)
        return found if None not in self.versions else tuple(
            None if p is None else g for g, p in zip(found, (*x, *self.parameters)))

    def kl_gradients(self, grad: Tensor) -> tuple:
        """Gradients of the parameters from the KL alone, or None's where the draw's node sees to them."""
        if self.hand_over(grad):
            return (None,) * len(self.parameters)
        if self.operator is KL:
            return self.gradients((grad,))
        if self.operator.has_x:
            return self.gradients((None, grad), (None,), (False,))[1:]
        return self.gradients((None, grad))

    def take(self) -> Tensor | None:
        """By the draw's node: the KL's gradient, if its node has run already in this backward pass."""
        task = _engine._current_graph_task_id()
        with _handover:
            pending, self.pending, self.task = self.pending, None, task
        return pending[1] if pending is not None and pending[0] == task else None

    def hand_over(self, grad: Tensor) -> bool:
        """By the KL's node: leave its gradient to the draw's node, if that is still to run in this pass."""
        node = None if self.node is None else self.node()
        if node is None or not _engine._will_engine_execute_node(node):
            return False
        task = _engine._current_graph_task_id()
        with _handover:
            if self.task == task:
                return False
            pending = self.pending
            self.pending = (task, grad + pending[1] if pending is not None and pending[0] == task else grad)
        return True


class _Draw(torch.autograd.Function):
    """y of a call. Inputs are kept as attributes: save_for_backward would free the parameters with x.

    Old style: setup_context's binding of arguments costs more than a small layer.
    """

    @staticmethod
    def forward(ctx, call, x, *parameters):
        ctx.set_materialize_grads(False)
        ctx.call = call
        call.node = weakref.ref(ctx)
        if not call.operator.has_x:
            y, call.kl = call.operator.forward(*call.arguments)
            return y
        if _engine._autograd._top_saved_tensors_default_hooks(False) is None:
            ctx.x, ctx.x_version = x, x._version
        else:
            ctx.save_for_backward(x)  # checkpointing and offloading work through these hooks
            ctx.x = None
        y, call.kl = call.operator.forward(x, *call.arguments)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        call = ctx.call
        grad_kl = call.take()
        if grad_y is None and grad_kl is None:
            return (None,) * len(ctx.needs_input_grad)
        if not call.operator.has_x:
            return None, None, *call.gradients((grad_y, grad_kl))
        if grad_y is None:
            return None, None, *call.gradients((None, grad_kl), (None,), (False,))[1:]
        x = ctx.saved_tensors[0] if ctx.x is None else ctx.x
        if x is _FREED:
            raise RuntimeError(_AGAIN)
        if x is ctx.x and x._version != ctx.x_version:
            raise RuntimeError(_MODIFIED.format("x", x._version, ctx.x_version))
        if ctx.x is not None and not _keep_graph():
            ctx.x = _FREED
        need_x = ctx.needs_input_grad[1]
        grads = call.gradients((grad_y, grad_kl), (x,), (need_x,))
        return None, grads[0] if need_x else None, *grads[1:]


class _KL(torch.autograd.Function):
    """The sum of the KLs of some calls, or the elementwise KL of one."""

    @staticmethod
    def forward(ctx, calls, *parameters):
        ctx.calls = calls
        if len(calls) == 1:
            return calls[0].kl.clone()  # the call's own must not get this node
        total = calls[0].kl
        for call in calls[1:]:
            total = total + call.kl.to(total.device)
        return total

    @staticmethod
    def backward(ctx, grad):
        if len(ctx.calls) == 1:
            return None, *ctx.calls[0].kl_gradients(grad)
        return None, *[g for call in ctx.calls
                       for g in call.kl_gradients(grad.to(call.kl.device, call.kl.dtype))]


# Function.apply first looks for torch.func transforms, which are dealt with elsewhere: several microseconds.
_apply_draw = super(torch.autograd.Function, _Draw).apply
_apply_kl = super(torch.autograd.Function, _KL).apply


def draw(operator: Operator, x: Tensor | None, arguments: tuple) -> tuple[Tensor, Call]:
    """(y, the call) of an eager call; `read([call])` is its KL."""
    call = Call(operator, arguments)
    return _apply_draw(call, x, *call.parameters), call


def kl_call(arguments: tuple) -> Call:
    """The call for a KL without a draw."""
    call = Call(KL, arguments)
    call.kl = KL.forward(*[a.detach() if isinstance(a, Tensor) else a for a in arguments])
    return call


def read(calls: list[Call]) -> Tensor:
    """The sum of the KLs of the calls, with its gradient. May be read again."""
    if len(calls) == 1:
        return _apply_kl(calls, *calls[0].parameters)
    return _apply_kl(calls, *[p for call in calls for p in call.parameters])


if raw.HAS_EXTENSION:
    LINEAR = Operator(raw.variational_linear, raw.variational_linear_backward,
                      ("x", "weight_mu", "weight_rho", "bias_mu", "bias_rho"), tensors=10)
    SAMPLE = Operator(raw.sample_normal, raw.sample_normal_backward, ("mu", "rho"), tensors=5)
    KL = Operator(raw.kl_normal, raw.kl_normal_backward, ("mu", "rho"), tensors=4)
    N_SAMPLES = 16  # position of n_samples among the arguments of LINEAR
