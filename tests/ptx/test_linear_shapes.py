"""Shapes that lead the CUDA kernels of variational_linear where those of test_linear.py do not: whole vectors and
cp.async, second tiles and rounds, several blocks of rows, more than one part of every sum.
"""

from __future__ import annotations

import math

import pytest
import torch
from judging import check_linear
from kernels import HALVES, KLS, SCALES, make_prior, posterior, random, regime_of

# outputs, inputs: rows of x, or of grad_y, and of the weights are whole vectors of 16 bytes; more than one tile
ALIGNED = [(72, 200), (200, 72)]
SINGLE = (torch.float32, *HALVES)


@pytest.mark.parametrize("n_samples", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", SINGLE, ids=str)
def test_fused_aligned_shapes(dtype, n_samples, cuda_ops):
    """Every scale with every KL, for few and for many rows, priors of numbers and of tensors."""
    most = 64 if dtype in HALVES and n_samples == 1 else 16
    for i, (scale, kl) in enumerate((scale, kl) for scale in SCALES for kl in KLS):
        (outputs, inputs), batch = ALIGNED[i % 2], (4, most)[(i + n_samples) % 2]
        tensors = i // 2 % 2 == 0
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            *posterior(outputs, inputs, dtype=dtype),
            *(posterior(outputs, dtype=dtype, seed=1) if i % 3 else (None, None)),
            prior=make_prior(tensors, outputs, inputs, dtype=dtype),
            bias_prior=make_prior(tensors, outputs, dtype=dtype, seed=1),
            scale=scale,
            kl=kl,
            n_samples=n_samples,
            column_offset=4 * (i % 2),
            regime="fused",
            ops=cuda_ops,
        )


@pytest.mark.parametrize("shape", [*ALIGNED, (71, 201)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float parameters", "its own"])
def test_fused_kernels_for_many_rows_of_16_bits(parameters, dtype, shape, cuda_ops):
    kind = parameters or dtype
    for i, (scale, kl) in enumerate(((0, 1), (1, 2), (2, 0), (0, 2), (1, 1), (2, 2), (2, 1))):
        check_linear(
            random(17 + 8 * i, shape[1], dtype=dtype, seed=2),
            *posterior(*shape, dtype=kind),
            *posterior(shape[0], dtype=kind, seed=1),
            prior=make_prior(i % 2 == 1, *shape, dtype=kind),
            bias_prior=make_prior(i % 2 == 0, shape[0], dtype=kind, seed=1),
            scale=SCALES[scale],
            kl=KLS[kl],
            regime="fused",
            ops=cuda_ops,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_whole_vectors_but_begin_amid_one(dtype, cuda_ops):
    """x, grad_y and the weights as views into larger memory: cp.async and vectors may not be used."""
    outputs, inputs, batch = 72, 200, 4

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    check_linear(
        shifted(random(batch, inputs, dtype=dtype, seed=2)),
        *(shifted(t) for t in posterior(outputs, inputs, dtype=dtype)),
        grad_y=shifted(random(batch, outputs, dtype=dtype, seed=7)),
        regime="fused",
        ops=cuda_ops,
    )


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_block_of_a_small_layer_walks_several_tiles(dtype, kl, cuda_ops):
    check_linear(
        random(265 * 70, 3, dtype=dtype, seed=2),
        *posterior(5, 3, dtype=dtype),
        *posterior(5, dtype=dtype, seed=1),
        kl=kl,
        n_samples=265,
        regime="small",
        ops=cuda_ops,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_layers_of_whole_quads(dtype, cuda_ops):
    """In one tile, in several, and with every thread at work."""
    for (outputs, inputs), batch, n_samples, kl in (
        ((64, 64), 300, 1, "analytic"),
        ((8, 12), 9, 40, "sampled"),
        ((12, 8), 700, 1, "sampled"),
        ((20, 52), 33, 2, None),
    ):
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            *posterior(outputs, inputs, dtype=dtype),
            *posterior(outputs, dtype=dtype, seed=1),
            prior=make_prior(batch == 9, outputs, inputs, dtype=dtype),
            kl=kl,
            n_samples=n_samples,
            regime="small",
            ops=cuda_ops,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs, inputs, batch, n_samples", [(300, 400, 18, 3), (100, 100, 3, 30)])
def test_drawn_in_several_blocks_of_rows(outputs, inputs, batch, n_samples, dtype, cuda_ops):
    for kl, tensors in (("analytic", True), ("sampled", False)):
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            *posterior(outputs, inputs, dtype=dtype),
            *posterior(outputs, dtype=dtype, seed=1),
            prior=make_prior(tensors, outputs, inputs, dtype=dtype),
            kl=kl,
            n_samples=n_samples,
            row_offset=3,
            regime="drawn",
            ops=cuda_ops,
        )


def test_more_parts_of_the_kl_than_threads(cuda_ops):
    check_linear(random(16, 4), *posterior(4112, 4), *posterior(4112, seed=1), n_samples=8, regime="fused", ops=cuda_ops)


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("outputs, inputs, batch", [(20, 8, 5), (68, 8, 4), (68, 8, 40)])
@pytest.mark.parametrize("scale", ["exp", "sqrt_exp"])
def test_an_overflowing_sigma_has_an_infinite_gradient(scale, outputs, inputs, batch, kl, n_samples, cuda_ops):
    from test_kernels_overflow import check_overflow

    check_overflow(scale, outputs, inputs, batch, kl, n_samples, ops=cuda_ops)
