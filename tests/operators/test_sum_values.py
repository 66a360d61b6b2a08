"""The sum of numbers that lie in tensors of their own."""
from __future__ import annotations

import pytest
import torch
from common import needs_extension
from torch import nn

import bnn_fast as bf

pytestmark = needs_extension
OPS = torch.ops.bnn_fast


@pytest.mark.parametrize("count", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum(dtype, count):
    numbers = torch.randn(count, dtype=torch.float64).to(dtype)
    total = OPS._sum_values(list(numbers.unbind()))
    assert total.shape == () and total.dtype == dtype
    torch.testing.assert_close(total, numbers.double().sum().to(dtype), rtol=1e-7 if dtype == torch.float32 else 1e-13, atol=0)


def test_it_is_summed_in_float64():
    assert OPS._sum_values([torch.tensor(v) for v in (2.0 ** 24, 1.0, 1.0, -(2.0 ** 24))]) == 2


def test_wrong_ones_are_named():
    one = torch.tensor(1.0)
    for values, message in (([one, one[None]], r"has shape \[1\], expected \[\]"),
                            ([one, one.double()], "different dtypes"), ([one.half()], "expected float32 or float64")):
        with pytest.raises(RuntimeError, match=message):
            OPS._sum_values(values)


def test_opcheck():
    torch.library.opcheck(OPS._sum_values.default, ([torch.tensor(1.0), torch.tensor(2.0)],), test_utils=(
        "test_schema", "test_faketensor"))


def test_layers_of_two_types():
    model = nn.ModuleList([bf.VariationalLinear(3, 4), bf.VariationalLinear(3, 4, dtype=torch.float64), bf.VariationalLinear(3, 4)])
    expected = sum(kl.double().sum() for kl in bf.kl_divergence(model, reduction="none").values())
    total = bf.kl_divergence(model)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    total.backward()
    assert model[1].weight_mu.grad.dtype == torch.float64 and model[0].weight_mu.grad.abs().sum() > 0
