"""The CUDA kernel of sum_values against the CPU's operator, to the bit: one launch, and a second where there are more than 64."""
from __future__ import annotations

import pytest
import torch

OPS = torch.ops.bnn_fast


@pytest.mark.parametrize("count", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum(dtype, count, cuda_ops):
    numbers = [torch.tensor(float(v), dtype=dtype) for v in torch.randn(count, dtype=torch.float64)]
    got, expected = cuda_ops._sum_values(numbers), OPS._sum_values(numbers)
    if count <= 64 or dtype == torch.float64:
        assert torch.equal(got, expected)
    else:  # what is between two launches is rounded to the type
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
