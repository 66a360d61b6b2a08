"""The raw operators of the compiled extension, torch.ops.bnn_fast.*, and their shapes without data.

They carry no gradient (autograd.py adds it), take positional arguments only and trust what they are given:
the checks are in functional.py. csrc/ops.cpp holds the schemas.
"""
from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings

import torch

from .. import checks
from .._build import EXTENSION_ERROR, build_info

HAS_EXTENSION = EXTENSION_ERROR is None


_plain = contextvars.ContextVar("bnn_fast.plain", default=False)


@contextlib.contextmanager
def plain():
    """Context in which layers and functions run in plain PyTorch, with the same noise, slower: for derivatives of any order (a
    loss with second derivatives of the outputs, as of a physics-informed network) and in forward mode.

    What is computed within is differentiable after it too. It holds for the thread, or the task of asyncio, that entered it,
    and not in compiled code.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def compiled_for(device: torch.device) -> bool:
    """Whether tensors on `device` have compiled operators; elsewhere the plain twin (reference.py) runs, with the same noise."""
    if not torch.compiler.is_compiling() and _plain.get():
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
    kl_normal = torch.ops.bnn_fast._kl_normal.default
    kl_normal_backward = torch.ops.bnn_fast._kl_normal_backward.default
    variational_linear = torch.ops.bnn_fast._variational_linear.default
    variational_linear_backward = torch.ops.bnn_fast._variational_linear_backward.default

    def _together(**tensors):
        """For plain meta tensors as for those of a trace: one that has no data among others that have some would have the
        fakes run, whose results nobody fills."""
        given = {name: t for name, t in tensors.items() if t is not None}
        devices = {name: t.device for name, t in given.items()}
        if len(set(devices.values())) > 1:
            first, *rest = given
            name = next(name for name in rest if devices[name] != devices[first])
            raise ValueError(f"{name}: expected to be on {devices[first]} as {first} is, given {checks.describe(given[name])}")

    def _scalar(mu):
        return mu.new_empty((), dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)

    def _like(tensor):
        return tensor.new_empty(tensor.shape)

    @torch.library.register_fake("bnn_fast::_sample_normal")
    def _(mu, rho, key, prior_loc, prior_scale, loc, prior_sd, scale, kl, n_samples, stream, row_offset,
          column_offset):
        _together(mu=mu, rho=rho, key=key, prior_loc=prior_loc, prior_scale=prior_scale)
        return mu.new_empty((n_samples, *mu.shape)), _scalar(mu)

    @torch.library.register_fake("bnn_fast::_sample_normal_backward")
    def _(grad_w, grad_kl, mu, rho, key, prior_loc, prior_scale, *tail):
        _together(mu=mu, rho=rho, key=key, prior_loc=prior_loc, prior_scale=prior_scale, grad_weight=grad_w, grad_kl=grad_kl)
        return _like(mu), _like(rho)

    @torch.library.register_fake("bnn_fast::_kl_normal")
    def _(mu, rho, prior_loc, prior_scale, loc, prior_sd, scale, reduce):
        _together(mu=mu, rho=rho, prior_loc=prior_loc, prior_scale=prior_scale)
        return _scalar(mu) if reduce else _like(mu)

    @torch.library.register_fake("bnn_fast::_kl_normal_backward")
    def _(grad, mu, rho, prior_loc, prior_scale, *tail):
        _together(mu=mu, rho=rho, prior_loc=prior_loc, prior_scale=prior_scale, grad=grad)
        return _like(mu), _like(rho)

    def _layer_together(x, weight_mu, weight_rho, bias_mu, bias_rho, key, weight_loc, weight_sd, bias_loc, bias_sd, **grads):
        _together(weight_mu=weight_mu, weight_rho=weight_rho, bias_mu=bias_mu, bias_rho=bias_rho, x=x, key=key,
                  weight_loc=weight_loc, weight_scale=weight_sd, bias_loc=bias_loc, bias_scale=bias_sd, **grads)
        return weight_mu

    @torch.library.register_fake("bnn_fast::_variational_linear")
    def _(x, *arguments):
        weight_mu = _layer_together(x, *arguments[:9])
        return x.new_empty((*x.shape[:-1], weight_mu.shape[0])), _scalar(weight_mu)

    @torch.library.register_fake("bnn_fast::_variational_linear_backward")
    def _(grad_y, grad_kl, x, weight_mu, weight_rho, bias_mu, bias_rho, *tail):
        _layer_together(x, weight_mu, weight_rho, bias_mu, bias_rho, *tail[:5], grad_y=grad_y, grad_kl=grad_kl)

        def or_none(tensor):
            return weight_mu.new_empty((0,)) if tensor is None else _like(tensor)

        need_grad_x = tail[-1] and grad_y is not None
        return (_like(x) if need_grad_x else weight_mu.new_empty((0,)), _like(weight_mu), _like(weight_rho),
                or_none(bias_mu), or_none(bias_rho))
else:
    warnings.warn(
        "bnn_fast runs without its compiled operators, in plain PyTorch and slower "
        f"({EXTENSION_ERROR}). Build them with `pip install --no-build-isolation .` (or `make build`) in the "
        "project's folder.", stacklevel=2)
