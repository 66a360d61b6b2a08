"""Shapes that lead the CUDA kernels of variational_linear where those of test_linear.py do not: whole vectors and
cp.async, second tiles and rounds, several blocks of rows, more than one part of every sum.
"""

from __future__ import annotations

import pytest
import torch
from judging import check_linear, check_overflow
from kernels import (
    DTYPES,
    HALVES,
    KEY,
    KLS,
    OPS,
    SCALES,
    draw_arguments,
    make_prior,
    posterior,
    random,
    raw_linear,
    regime_of,
)

from bnn_fast import Normal

# outputs, inputs: rows of x, or of grad_y, and of the weights are whole vectors of 16 bytes; more than one tile
ALIGNED = [(72, 200), (200, 72)]


UNALIGNED = (71, 201)
ALL_OPTIONS = [(scale, kl) for scale in SCALES for kl in KLS]
WITH_PRIORS = [(kl, prior) for kl in ("analytic", "sampled") for prior in (True, "loc", "scale")]
OWN_TYPES = [(dtype, dtype) for dtype in (torch.float32, *HALVES)]
MIXED_TYPES = [(dtype, torch.float32) for dtype in HALVES]


def check_fused(shape, batch, dtypes, ops, n_samples=1, scale="softplus", kl="sampled", prior=False, bias=True, offset=0):
    outputs, inputs = shape
    dtype = dtypes[1]
    check_linear(
        random(n_samples * batch, inputs, dtype=dtypes[0], seed=2),
        *posterior(outputs, inputs, dtype=dtype),
        *(posterior(outputs, dtype=dtype, seed=1) if bias else (None, None)),
        prior=make_prior(prior, outputs, inputs, dtype=dtype),
        bias_prior=make_prior(prior, outputs, dtype=dtype, seed=1),
        scale=scale,
        kl=kl,
        n_samples=n_samples,
        column_offset=offset,
        regime="fused",
        ops=ops,
    )


@pytest.mark.parametrize("dtypes", OWN_TYPES + MIXED_TYPES, ids=str)
def test_fused_aligned_shapes(dtypes, cuda_ops):
    """Every option, for few and for many rows."""
    for i, (scale, kl) in enumerate(ALL_OPTIONS):
        options = dict(scale=scale, kl=kl, prior=i % 4 == 3, bias=i % 3 > 0, offset=4 * (i % 2))
        check_fused(ALIGNED[i // 2 % 2], (13, 3)[i % 2], dtypes, cuda_ops, **options)


@pytest.mark.parametrize("dtypes", OWN_TYPES, ids=str)
def test_fused_priors(dtypes, cuda_ops):
    for i, (kl, prior) in enumerate(WITH_PRIORS):
        check_fused(ALIGNED[i % 2], 3, dtypes, cuda_ops, kl=kl, prior=prior)
        check_fused(UNALIGNED, 13, dtypes, cuda_ops, kl=kl, prior=prior)
    for shape, batch in ((UNALIGNED, 3), (ALIGNED[0], 13)):
        check_fused(shape, batch, dtypes, cuda_ops, kl="analytic", prior=True)


@pytest.mark.parametrize("scale, kl", [("exp", "analytic"), ("square", "analytic"), ("identity", "sampled")])
def test_fused_scales_for_few_rows(scale, kl, cuda_ops):
    """These are for many rows among ALL_OPTIONS, and float32 has kernels of its own for at most four."""
    check_fused(UNALIGNED, 3, OWN_TYPES[0], cuda_ops, scale=scale, kl=kl)


@pytest.mark.parametrize("dtypes", OWN_TYPES + MIXED_TYPES[:1], ids=str)
def test_fused_samples(dtypes, cuda_ops):
    """Three keep one of the four warps of a group idle."""
    for shape, batch, n_samples, options in (
        (ALIGNED[0], 3, 3, dict(scale="sqrt_exp")),
        (ALIGNED[1], 13, 3, dict(kl="analytic")),
        (UNALIGNED, 4, 8, dict(scale="exp")),
        (ALIGNED[0], 16, 8, dict(kl="analytic", bias=False)),
        (ALIGNED[1], 16, 2, dict(kl=None)),
    ):
        check_fused(shape, batch, dtypes, cuda_ops, n_samples, **options)


@pytest.mark.parametrize("dtypes", OWN_TYPES[1:] + MIXED_TYPES, ids=str)
def test_fused_kernels_for_many_rows_of_16_bits(dtypes, cuda_ops):
    for i, (scale, kl) in enumerate(ALL_OPTIONS):
        check_fused(ALIGNED[i % 2], 17 + 3 * i, dtypes, cuda_ops, scale=scale, kl=kl, bias=i % 3 > 0)
    for i, (kl, prior) in enumerate(WITH_PRIORS):
        check_fused((ALIGNED[0], UNALIGNED)[i % 2], 33, dtypes, cuda_ops, kl=kl, prior=prior)
    check_fused(UNALIGNED, 64, dtypes, cuda_ops, kl="analytic", prior=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs, batch", [(19, 37, 5), (200, 72, 4), (200, 72, 16), (200, 72, 64)])
def test_without_the_gradient_of_x(outputs, inputs, batch, dtype, cuda_ops):
    arguments = (random(batch, inputs, dtype=dtype), *posterior(outputs, inputs, dtype=dtype), None, None, KEY)
    options = dict(prior=Normal(), bias_prior=Normal(), scale="softplus", kl=None, n_samples=1, row_offset=0,
                   column_offset=0, grad_y=random(batch, outputs, dtype=dtype, seed=4), ops=cuda_ops)
    whole = raw_linear(*arguments, **options)[2]
    without = raw_linear(*arguments, **options, need_grad_x=False)[2]
    assert without[0].shape == (0,) and whole[0].shape == (batch, inputs)
    assert torch.equal(whole[1], without[1]) and torch.equal(whole[2], without[2])


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


@pytest.mark.parametrize(
    "side, dtype, kl, prior",
    [
        (5, torch.float32, "sampled", "loc"),
        (5, torch.bfloat16, "analytic", "scale"),
        (24, torch.float32, None, False),
        (24, torch.float64, "sampled", "scale"),
    ],
    ids=str,
)
def test_a_block_of_a_small_layer_walks_several_tiles(side, dtype, kl, prior, cuda_ops):
    """More samples than half of kSmallBlocks leave each one block; and in 24 x 24 a thread multiplies several elements of a tile."""
    inputs = 3 if side == 5 else side
    check_linear(
        random(133 * 70, inputs, dtype=dtype, seed=2),
        *posterior(side, inputs, dtype=dtype),
        *posterior(side, dtype=dtype, seed=1),
        prior=make_prior(prior, side, inputs, dtype=dtype),
        kl=kl,
        n_samples=133,
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
        ((20, 52), 33, 2, "analytic"),
    ):
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            *posterior(outputs, inputs, dtype=dtype),
            *posterior(outputs, dtype=dtype, seed=1),
            prior=make_prior({9: "loc", 700: "scale", 33: True}.get(batch, False), outputs, inputs, dtype=dtype),
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
    mu, rho = posterior(4112, 4)
    arguments = draw_arguments(mu, rho, kl="analytic", n_samples=5)
    x = random(5, 4)
    assert regime_of(x, mu, 5, cuda_ops) == "fused"
    for got, expected in zip(cuda_ops._variational_linear(x, *arguments), OPS._variational_linear(x, *arguments)):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("outputs, inputs, batch", [(20, 8, 5), (68, 8, 4), (68, 8, 40)])
@pytest.mark.parametrize("scale", ["exp", "sqrt_exp"])
def test_an_overflowing_sigma_has_an_infinite_gradient(scale, outputs, inputs, batch, kl, n_samples, cuda_ops):
    check_overflow(scale, outputs, inputs, batch, kl, n_samples, ops=cuda_ops)
