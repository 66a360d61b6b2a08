"""Shapes that lead the CUDA kernels of sample_normal and kl_normal where those of test_sample.py do not: rows of whole
vectors, and more quads than threads.
"""

from __future__ import annotations

import pytest
import torch
from judging import check_kl, check_sample
from kernels import DTYPES, KLS, OPS, SCALES, kl_arguments, posterior, raw_sample

from bnn_fast import Normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_whole_vectors(scale, dtype, cuda_ops):
    for i, tensors in enumerate((True, False, "loc", "scale")):
        for kl in KLS if i < 2 else KLS[1:]:
            check_sample(
                6, 64, dtype=dtype, tensors=tensors, scale=scale, kl=kl, n_samples=1 + i, offsets=(2, 8), ops=cuda_ops
            )
        check_kl(6, 64, dtype=dtype, tensors=tensors, reduction="none", scale=scale, ops=cuda_ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [64, 63])
def test_the_sampled_kl_alone_has_a_gradient(columns, dtype, cuda_ops):
    mu, rho = posterior(6, columns, dtype=dtype)
    options = dict(prior=Normal(), scale="softplus", kl="sampled", n_samples=2, grad_kl=torch.tensor(0.3, dtype=dtype))
    zero = torch.zeros(2, 6, columns, dtype=dtype)
    alone = raw_sample(mu, rho, **options, grad_w=None, ops=cuda_ops)[1]
    for a, b in zip(alone, raw_sample(mu, rho, **options, grad_w=zero, ops=cuda_ops)[1]):
        assert torch.equal(a, b) and (a != 0).all()


@pytest.mark.parametrize("dtype, columns", [(torch.float32, 8), (torch.bfloat16, 7), (torch.float64, 8)], ids=str)
def test_a_thread_takes_more_than_one_round(dtype, columns, cuda_ops):
    """More quads than 2112 blocks of 256 threads (csrc/cuda/sample_normal.cu), against the CPU's operators."""
    rows = 2112 * 256 // 2 + 700
    mu, rho = posterior(rows, columns, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    options = dict(prior=Normal(0.25, 0.5), scale="exp", kl="analytic", n_samples=1, grad_w=mu[None], grad_kl=torch.tensor(0.3, dtype=wide))
    got, expected = (raw_sample(mu, rho, **options, ops=ops) for ops in (cuda_ops, OPS))
    if dtype != torch.float64:
        assert torch.equal(got[0][0], expected[0][0])
    arguments = kl_arguments(mu, rho, prior=Normal(0.25, 0.5), scale="exp", reduce=False)
    results = [(*of[0], *of[1], ops._kl_normal(*arguments)) for of, ops in ((got, cuda_ops), (expected, OPS))]
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=rounding, atol=1e-5)
