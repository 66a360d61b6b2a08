"""The CUDA kernels with a noisy layer's factorised noise, in every regime, against the reference with the same key."""

from __future__ import annotations

import math

import pytest
import torch
from kernels import DTYPES, HALVES, KEY, draw_arguments, posterior, random, regime_of

from bnn_fast import reference

# outputs, inputs and batch, which choose the regime; whole vectors and not; for the fused kernels few rows and many
SMALL, DRAWN = [(19, 37, 5), (16, 12, 3)], [(67, 37, 70), (68, 36, 70)]
FUSED = [(67, 37, 3), (68, 72, 3), (67, 37, 13), (68, 72, 13)]
FUSED_HALVES = [*FUSED, (67, 37, 40), (68, 72, 40)]


def run(ops, tensors, grad_y, offsets=(0, 0)):
    x, *parameters = tensors
    arguments = draw_arguments(*parameters, scale="identity", stream=5, row_offset=offsets[0], column_offset=offsets[1])
    y, _ = ops._noisy_linear(x, *arguments)
    return [y, *ops._noisy_linear_backward([grad_y, None], x, *arguments, True)]


def run_reference(tensors, grad_y, offsets=(0, 0)):
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    y = reference.noisy_linear(*leaves, KEY, row_offset=offsets[0], column_offset=offsets[1])
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y.double())]


def check(ops, sizes, dtype=torch.float32, x_dtype=None, bias=True, offsets=(0, 0), change=lambda *tensors: None):
    outputs, inputs, batch = sizes
    x_dtype = x_dtype or dtype
    tensors = [random(batch, inputs, dtype=x_dtype, seed=2), *posterior(outputs, inputs, dtype=dtype),
               *(posterior(outputs, dtype=dtype, seed=1) if bias else (None, None))]
    change(*tensors)
    grad_y = random(batch, outputs, dtype=x_dtype, seed=7)
    found = run(ops, tensors, grad_y, offsets)
    for i, (got, true) in enumerate(zip(found, run_reference(tensors, grad_y, offsets), strict=True)):
        assert got.shape == true.shape and got.dtype == (x_dtype if i < 2 else dtype)
        # the drawn weights are rounded to x's type, and so is what comes of them
        rounding = 1e-13 if dtype == torch.float64 else 2e-6 + 2 * (torch.finfo(x_dtype).eps if x_dtype in HALVES else 0)
        error, size = ((got.double() - true).abs().max().item(), true.abs().max().item()) if true.numel() else (0.0, 0.0)
        assert error <= rounding * (size + 1e-3), f"result {i}: {error:.3g} of {size:.3g}: {sizes} {dtype} {x_dtype} {bias} {offsets}"
    return tensors, found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_in_every_regime(dtype, cuda_ops):
    fused = [] if dtype == torch.float64 else FUSED_HALVES if dtype in HALVES else FUSED
    for regime, shapes in (("small", SMALL), ("fused", fused), ("drawn", DRAWN)):
        for i, sizes in enumerate(shapes):
            for bias, offsets in (((True, (5, 7)), (False, (0, 0))) if i == 0 else ((True, (2**32 - 72, 4 * i)),)):
                (x, mu, *_), _ = check(cuda_ops, sizes, dtype, bias=bias, offsets=offsets)
                assert regime_of(x, mu, 1, cuda_ops) == regime


@pytest.mark.parametrize("x_dtype", HALVES, ids=str)
def test_half_inputs_and_float_parameters(x_dtype, cuda_ops):
    for sizes in (SMALL[0], *FUSED_HALVES[1:], DRAWN[0]):
        check(cuda_ops, sizes, x_dtype=x_dtype)


@pytest.mark.parametrize("outputs, inputs", [(1, 1), (1, 300), (300, 1), (65, 3), (3, 65), (0, 5), (5, 0)])
def test_awkward_shapes(outputs, inputs, cuda_ops):
    for batch in (0, 1, 16, 17):
        check(cuda_ops, (outputs, inputs, batch), offsets=(3, 2))


@pytest.mark.parametrize("sizes", [SMALL[0], FUSED[0], DRAWN[0]])
def test_weights_without_noise(sizes, cuda_ops):
    """sigma = -inf: no noise and no gradients; of either sign and 0: noise as it is."""
    outputs, inputs, _ = sizes
    masks = random(outputs, inputs, seed=8) > 0, random(outputs, seed=9) > 0

    def change(x, mu, sigma, bias_mu, bias_sigma):
        sigma[0], sigma[1] = 0.0, -1.0
        sigma[masks[0]], bias_sigma[masks[1]] = -math.inf, -math.inf

    _, (_, _, *gradients) = check(cuda_ops, sizes, change=change)
    for gradient, mask in zip(gradients, (masks[0], masks[0], masks[1], masks[1]), strict=True):
        assert torch.equal(gradient == 0, mask)


def test_the_noise_is_the_cpus_bit_for_bit(cuda_ops):
    outputs, inputs = 70, 90
    zero, one = torch.zeros(outputs, inputs), torch.ones(outputs, inputs)
    for rows in (2, 90):
        x = torch.eye(inputs)[:rows]
        arguments = draw_arguments(zero, one, zero[:, 0].contiguous(), zero[:, 0].contiguous(), scale="identity", stream=5)
        assert torch.equal(cuda_ops._noisy_linear(x, *arguments)[0], torch.ops.bnn_fast._noisy_linear(x, *arguments)[0])
