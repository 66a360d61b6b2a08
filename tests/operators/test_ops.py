"""The raw operators: schemas, fakes, and gradients against finite differences."""
from __future__ import annotations

import itertools

import pytest
import torch
from common import key_of, needs_extension, posterior
from kernels import SCALES, draw_arguments, kl_arguments

from bnn_fast import functional, reference
from bnn_fast.operators import raw as ops
from bnn_fast.priors import Normal

TESTS = ("test_schema", "test_faketensor")  # the operators carry no gradient of their own
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def linear_arguments(dtype, bias, tensor_prior, kl, n_samples, x_dtype=None):
    weight = posterior(5, 3, dtype=dtype, grad=False)
    bias_pair = posterior(5, dtype=dtype, seed=1, grad=False) if bias else ()
    prior = Normal(torch.randn(5, 3, dtype=dtype), torch.rand(5, 3, dtype=dtype) + 0.5) if tensor_prior else Normal()
    x = torch.randn(4, 2, 3).to(x_dtype or dtype)
    return x, draw_arguments(*weight, *bias_pair, key=key_of(7), prior=prior, bias_prior=Normal(0.1, 0.8), kl=kl,
                             n_samples=n_samples, row_offset=2, column_offset=3)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias, tensor_prior, kl, n_samples",
                         [(True, False, "analytic", 1), (False, True, "sampled", 2), (True, True, None, 4)])
def test_opcheck_variational_linear(dtype, bias, tensor_prior, kl, n_samples):
    x, tail = linear_arguments(dtype, bias, tensor_prior, kl, n_samples)
    torch.library.opcheck(ops.variational_linear, (x, *tail), test_utils=TESTS)
    grad_y, grad_kl = torch.randn(4, 2, 5).to(dtype), ops.variational_linear(x, *tail)[1]
    for grads, given_x, need_x in [((grad_y, grad_kl), x, True), ((grad_y, None), x, False),
                                   ((None, grad_kl), None, False),
                                   ((None, grad_kl), x, True)]:
        torch.library.opcheck(ops.variational_linear_backward, (list(grads), given_x, *tail, need_x),
                              test_utils=TESTS)


@needs_extension
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_opcheck_with_low_precision_inputs(low):
    x, tail = linear_arguments(torch.float32, True, False, "analytic", 1, x_dtype=low)
    torch.library.opcheck(ops.variational_linear, (x, *tail), test_utils=TESTS)
    grad_y = torch.randn(4, 2, 5).to(low)
    torch.library.opcheck(ops.variational_linear_backward, ([grad_y, torch.ones(())], x, *tail, True),
                          test_utils=TESTS)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (7,), (2, 3, 4), (0, 3), ()])
def test_opcheck_sample_and_kl(dtype, shape):
    mu, rho = posterior(*shape, dtype=dtype, grad=False)
    arguments = draw_arguments(mu, rho, key=key_of(7), prior=Normal(0.0, torch.ones_like(mu)), scale="exp", kl="sampled",
                               n_samples=3)
    torch.library.opcheck(ops.sample_normal, arguments, test_utils=TESTS)
    w, kl = ops.sample_normal(*arguments)
    for grads in [(w, kl), (w, None), (None, kl)]:
        torch.library.opcheck(ops.sample_normal_backward, (list(grads), *arguments), test_utils=TESTS)
    for reduce in (True, False):
        arguments = kl_arguments(mu, rho, prior=Normal(mu, 1.0), scale="sqrt_exp", reduce=reduce)
        torch.library.opcheck(ops.kl_normal, arguments, test_utils=TESTS)
        grad = ops.kl_normal(*arguments)
        torch.library.opcheck(ops.kl_normal_backward, ([grad], *arguments), test_utils=TESTS)


PRIORS = {"numbers": Normal(0.1, 0.7), "tensors": None}


def prior_of(kind: str, mu) -> Normal:
    return PRIORS[kind] or Normal(torch.linspace(-1, 1, mu.numel(), dtype=mu.dtype).reshape(mu.shape),
                                  torch.linspace(0.5, 2, mu.numel(), dtype=mu.dtype).reshape(mu.shape))


@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension, id="compiled"),
                                    pytest.param(reference, id="reference")])
@pytest.mark.parametrize("scale, kl",
                         list(itertools.product(SCALES,
                                                ["analytic", "sampled", None])))
def test_gradcheck(module, scale, kl):
    """Every combination of scale and KL, and over them the priors, the bias and the number of samples."""
    for kind, bias, n_samples in [("numbers", True, 1), ("tensors", False, 2), ("tensors", True, 3)]:
        weight, bias_pair = posterior(4, 3), posterior(4, seed=1) if bias else (None, None)
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        bias_prior = prior_of(kind, bias_pair[0]) if bias else None

        def linear(x, mu, rho, bias_mu, bias_rho):
            y, value = module.variational_linear(
                x, mu, rho, bias_mu, bias_rho, key_of(3), prior=prior_of(kind, weight[0].detach()),
                bias_prior=bias_prior,
                scale=scale, kl=kl, n_samples=n_samples)
            return y if value is None else (y, value)

        assert torch.autograd.gradcheck(linear, (x, *weight, *bias_pair))

        def sample(mu, rho):
            w, value = module.sample_normal(mu, rho, key_of(3), prior=prior_of(kind, weight[0].detach()),
                                            scale=scale, kl=kl,
                                            n_samples=n_samples)
            return w if value is None else (w, value)

        assert torch.autograd.gradcheck(sample, weight)


@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension, id="compiled"),
                                    pytest.param(reference, id="reference")])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_gradcheck_kl_normal(module, scale, reduction):
    for kind in PRIORS:
        mu, rho = posterior(4, 3)
        assert torch.autograd.gradcheck(lambda m,
                                        r: module.kl_normal(m, r, prior=prior_of(kind, mu.detach()),
                                                            scale=scale,
                                                                      reduction=reduction), (mu, rho))
