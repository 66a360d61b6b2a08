"""Derivatives that the fused operators do not have, by the way that their error names."""
from __future__ import annotations

import pytest
import torch
from common import twin  # noqa: F401
from torch import nn
from torch.autograd import forward_ad

import bnn_fast as bf


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(bf.VariationalLinear(1, 16, dtype=torch.float64), nn.Tanh(),
                         bf.VariationalLinear(16, 1, dtype=torch.float64))


def second_derivative(model, x):
    u = model(x)
    u_x = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]


def test_second_derivatives_of_the_outputs(twin):
    model, h = network(), 1e-4
    x = torch.linspace(-1, 1, 7, dtype=torch.float64).unsqueeze(1).requires_grad_()
    with bf.sampling(model, seed=3):
        with bf.plain():
            u_xx = second_derivative(model, x)
        with torch.no_grad():
            expected = (model(x + h) - 2 * model(x) + model(x - h)) / h ** 2
        torch.testing.assert_close(u_xx, expected, rtol=1e-5, atol=1e-6)
        (u_xx.square().sum() + bf.kl_divergence(model)).backward()  # after it too
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_same_draw_in_plain_pytorch(twin):
    model, x = network(), torch.randn(5, 1, dtype=torch.float64)
    with bf.sampling(model, seed=1):
        fused = model(x)
        with bf.plain():
            torch.testing.assert_close(model(x), fused)


def test_the_error_names_the_way():
    if not bf.build_info()["extension"]:
        pytest.skip("bnn_fast was installed without its extension")
    model, x = network(), torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"double backward(.|\n)*with bnn_fast\.plain\(\)"):
        second_derivative(model, x)


def test_forward_mode(twin):
    model = network()
    x, v = torch.randn(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    with bf.sampling(model, seed=2), bf.plain():
        y, jvp = torch.func.jvp(model, (x,), (v,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
        expected = torch.autograd.functional.jvp(model, x, v)[1]
    torch.testing.assert_close(jvp, expected)
    torch.testing.assert_close(dual, expected)
    if twin == "plain":
        return
    with pytest.raises(RuntimeError, match=r"forward-mode(.|\n)*bnn_fast\.plain"):
        torch.func.jvp(model, (x,), (v,))
    with pytest.raises(RuntimeError, match=r"forward-mode(.|\n)*bnn_fast\.plain"), forward_ad.dual_level():
        model(forward_ad.make_dual(x, v))
