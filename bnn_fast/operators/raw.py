"""The raw operators of the compiled extension, torch.ops.bnn_fast.*, and their shapes without data.

They carry no gradient (autograd.py adds it), take positional arguments only and trust what they are given:
the checks are in functional.py. csrc/ops.cpp holds the schemas, arguments.py packs what they take.
"""
from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings

import torch

from .. import checks
from .._build import EXTENSION_ERROR, build_info
from . import arguments

HAS_EXTENSION = EXTENSION_ERROR is None


_tracing = torch._C._get_tracing_state
in_plain = contextvars.ContextVar("bnn_fast.plain", default=False)


@contextlib.contextmanager
def plain():
    """Context in which layers and functions run in plain PyTorch, with the same noise, slower: for derivatives of any order (a
    loss with second derivatives of the outputs, as of a physics-informed network) and in forward mode.

    What is computed within is differentiable after it too. It holds for the thread, or the task of asyncio, that entered it,
    and not in compiled code.
    """
    token = in_plain.set(True)
    try:
        yield
    finally:
        in_plain.reset(token)


def compiled_for(device: torch.device) -> bool:
    """Whether tensors on `device` have compiled operators; elsewhere the plain twin (reference.py) runs, with the same noise. So it
    does in a trace of torch.jit, which makes constants of the operators' lists, and some versions of torch take the tensors out
    of those at their first use; with gradients on layers refuse to be traced.
    """
    if not torch.compiler.is_compiling() and (in_plain.get() or (_tracing() is not None and not torch.is_grad_enabled())):
        return False
    if device.type == "cuda":
        return HAS_EXTENSION and _has_cuda_kernels()
    return HAS_EXTENSION and device.type in ("cpu", "meta")


@functools.cache
def _has_cuda_kernels() -> bool:
    built = bool(build_info()["cuda_architectures"])
    if not built:
        warnings.warn(
            "this bnn_fast was built without CUDA kernels: layers on CUDA tensors run in plain PyTorch and slower. Build "
            "them with nvcc on PATH (or CUDA_HOME set) by `BNN_FAST_CUDA=1 pip install --no-build-isolation .` in the "
            "project's folder.", stacklevel=3)
    return built


if HAS_EXTENSION:
    sample_normal = torch.ops.bnn_fast._sample_normal.default
    sample_normal_backward = torch.ops.bnn_fast._sample_normal_backward.default
    sample_rows = torch.ops.bnn_fast._sample_rows.default
    sample_rows_backward = torch.ops.bnn_fast._sample_rows_backward.default
    kl_normal = torch.ops.bnn_fast._kl_normal.default
    kl_normal_backward = torch.ops.bnn_fast._kl_normal_backward.default
    variational_linear = torch.ops.bnn_fast._variational_linear.default
    variational_linear_backward = torch.ops.bnn_fast._variational_linear_backward.default
    noisy_linear = torch.ops.bnn_fast._noisy_linear.default
    noisy_linear_backward = torch.ops.bnn_fast._noisy_linear_backward.default

    estimated_linear = torch.ops.bnn_fast._estimated_linear.default
    estimated_linear_backward = torch.ops.bnn_fast._estimated_linear_backward.default
    variational_chain = torch.ops.bnn_fast._variational_chain.default
    variational_chain_backward = torch.ops.bnn_fast._variational_chain_backward.default

    def _together(names, posterior, prior, **others):
        """For plain meta tensors as for those of a trace: one that has no data among others that have some would have the
        fakes run, whose results nobody fills."""
        of_prior = {f"prior[{i}]": t for i, t in enumerate(prior)}
        given = {name: t for name, t in (dict(zip(names, posterior)) | others | of_prior).items() if t is not None}
        devices = {name: t.device for name, t in given.items()}
        if len(set(devices.values())) > 1:
            first, *rest = given
            name = next(name for name in rest if devices[name] != devices[first])
            raise ValueError(f"{name}: expected to be on {devices[first]} as {first} is, given {checks.describe(given[name])}")
        return posterior[0]

    def _scalar(mu):
        return mu.new_empty((), dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)

    def _like(tensors):
        return [t.new_empty(t.shape) for t in tensors]

    @torch.library.register_fake("bnn_fast::_sample_normal")
    def _(posterior, key, prior, numbers, options):
        mu = _together(arguments.PAIR, posterior, prior, key=key)
        return mu.new_empty((options[arguments.N_SAMPLES], *mu.shape)), _scalar(mu)

    @torch.library.register_fake("bnn_fast::_sample_normal_backward")
    def _(grads, posterior, key, prior, numbers, options):
        _together(arguments.PAIR, posterior, prior, key=key, grad_weight=grads[0], grad_kl=grads[1])
        return _like(posterior)

    @torch.library.register_fake("bnn_fast::_sample_rows")
    def _(posterior, look_up, key, prior, numbers, options):
        mu = _together(arguments.PAIR, posterior, prior, key=key, **dict(zip(arguments.LOOK_UP, look_up)))
        shape, sum_of_kl = (look_up[0].shape[-1], mu.shape[1]), _scalar(mu)
        keeps = mu.device.type != "cuda" and shape[0] * shape[1] <= arguments.KEPT
        return (mu.new_empty(shape), sum_of_kl if options[arguments.KL] else sum_of_kl.new_empty((0,)),
                sum_of_kl.new_empty(shape if keeps else (0,)))

    @torch.library.register_fake("bnn_fast::_sample_rows_backward")
    def _(grads, posterior, look_up, key, prior, numbers, options, kept):
        mu = _together(arguments.PAIR, posterior, prior, key=key, grad_y=grads[0], grad_kl=grads[1], kept=kept,
                       **dict(zip(arguments.LOOK_UP, look_up)))
        if options[arguments.GRADIENT] != arguments.GRADIENTS["sparse"]:
            return _like(posterior)
        rows = look_up[0] if look_up[0].dim() == 1 else look_up[0][0]
        values = (mu.new_empty((rows.shape[0], mu.shape[1])) for _ in posterior)
        return [torch.ops.aten.embedding_sparse_backward(v, rows, mu.shape[0], -1, False) for v in values]

    @torch.library.register_fake("bnn_fast::_kl_normal")
    def _(posterior, prior, numbers, options):
        mu = _together(arguments.PAIR, posterior, prior)
        return _scalar(mu) if options[arguments.REDUCE] else mu.new_empty(mu.shape)

    @torch.library.register_fake("bnn_fast::_kl_normal_backward")
    def _(grads, posterior, prior, numbers, options):
        _together(arguments.PAIR, posterior, prior, grad_kl=grads[0])
        return _like(posterior)

    @torch.library.register_fake("bnn_fast::_sum_values")
    def _(values):
        return values[0].new_empty(())

    @torch.library.register_fake("bnn_fast::_noisy_linear")
    @torch.library.register_fake("bnn_fast::_variational_linear")
    def _(x, posterior, key, prior, numbers, options):
        weight_mu = _together(arguments.LAYER, posterior, prior, x=x, key=key)
        return x.new_empty((*x.shape[:-1], weight_mu.shape[0])), _scalar(weight_mu)

    @torch.library.register_fake("bnn_fast::_noisy_linear_backward")
    @torch.library.register_fake("bnn_fast::_variational_linear_backward")
    def _(grads, x, posterior, key, prior, numbers, options, need_grad_x):
        weight_mu = _together(arguments.LAYER, posterior, prior, x=x, key=key, grad_y=grads[0], grad_kl=grads[1])
        need_grad_x = need_grad_x and grads[0] is not None
        return [x.new_empty(x.shape) if need_grad_x else weight_mu.new_empty((0,)), *_like(posterior)]

    @torch.library.register_fake("bnn_fast::_estimated_linear")
    def _(x, posterior, key, prior, numbers, options):
        weight_mu = _together(arguments.LAYER, posterior, prior, x=x, key=key)
        shape, local = (*x.shape[:-1], weight_mu.shape[0]), options[arguments.ESTIMATOR] == checks.ESTIMATORS["local"]
        return x.new_empty(shape), _scalar(weight_mu), x.new_empty(shape if local else (0,), dtype=_scalar(x).dtype)

    @torch.library.register_fake("bnn_fast::_estimated_linear_backward")
    def _(grads, x, posterior, key, prior, numbers, options, need_grad_x, kept):
        weight_mu = _together(arguments.LAYER, posterior, prior, x=x, key=key, grad_y=grads[0], grad_kl=grads[1], kept=kept)
        need_grad_x = need_grad_x and grads[0] is not None
        return [x.new_empty(x.shape) if need_grad_x else weight_mu.new_empty((0,)), *_like(posterior)]

    @torch.library.register_fake("bnn_fast::_variational_chain")
    def _(x, parameters, keys, prior, numbers, options):
        _together(("parameters",), parameters, prior, x=x)
        samples, drawn, outputs = options[arguments.N_SAMPLES], 0, 0
        tensors = iter(parameters)
        for kind in options[arguments.LAYERS::2]:
            own = [next(tensors) for _ in range((1 + kind % 2) * (1 + kind // 2))]
            outputs = own[0].shape[0]
            drawn += sum(t.numel() for t in own[::2]) if kind % 2 else 0
        shape = [*x.shape[:-1], outputs]
        if options[arguments.SHARED] and x.dim() > 1:
            shape[0] *= samples
        return x.new_empty(shape), _scalar(x), x.new_empty((drawn * samples if drawn * samples <= arguments.KEPT else 0,))

    @torch.library.register_fake("bnn_fast::_variational_chain_backward")
    def _(grads, x, parameters, keys, prior, numbers, options, need_grad_x, kept):
        _together(("parameters",), parameters, prior, x=x, grad_y=grads[0], grad_kl=grads[1], kept=kept)
        need_grad_x = need_grad_x and grads[0] is not None
        return [x.new_empty(x.shape) if need_grad_x else parameters[0].new_empty((0,)), *_like(parameters)]
else:
    warnings.warn(
        "bnn_fast runs without its compiled operators, in plain PyTorch and slower "
        f"({EXTENSION_ERROR}). Build them with `pip install --no-build-isolation .` (or `make build`) in the "
        "project's folder.", stacklevel=2)
