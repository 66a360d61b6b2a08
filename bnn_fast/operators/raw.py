"""The raw operators of the compiled extension, torch.ops.bnn_fast.*, and their shapes without data.

They carry no gradient (autograd.py adds it), take positional arguments only and trust what they are given:
the checks are in functional.py. csrc/ops.cpp holds the schemas.
"""
from __future__ import annotations

import functools
import warnings

import torch

from .._build import EXTENSION_ERROR, build_info

HAS_EXTENSION = EXTENSION_ERROR is None


def compiled_for(device: torch.device) -> bool:
    """Whether tensors on `device` have compiled operators; elsewhere the plain twin (reference.py) runs, with the same noise."""
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

    def _scalar(mu):
        return mu.new_empty((), dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)

    def _like(tensor):
        return tensor.new_empty(tensor.shape)

    @torch.library.register_fake("bnn_fast::_sample_normal")
    def _(mu, rho, key, prior_loc, prior_scale, loc, prior_sd, scale, kl, n_samples, stream, row_offset,
          column_offset):
        return mu.new_empty((n_samples, *mu.shape)), _scalar(mu)

    @torch.library.register_fake("bnn_fast::_sample_normal_backward")
    def _(grad_w, grad_kl, mu, rho, *tail):
        return _like(mu), _like(rho)

    @torch.library.register_fake("bnn_fast::_kl_normal")
    def _(mu, rho, prior_loc, prior_scale, loc, prior_sd, scale, reduce):
        return _scalar(mu) if reduce else _like(mu)

    @torch.library.register_fake("bnn_fast::_kl_normal_backward")
    def _(grad, mu, rho, *tail):
        return _like(mu), _like(rho)

    @torch.library.register_fake("bnn_fast::_variational_linear")
    def _(x, weight_mu, *tail):
        return x.new_empty((*x.shape[:-1], weight_mu.shape[0])), _scalar(weight_mu)

    @torch.library.register_fake("bnn_fast::_variational_linear_backward")
    def _(grad_y, grad_kl, x, weight_mu, weight_rho, bias_mu, bias_rho, *tail):
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
