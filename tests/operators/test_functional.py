"""The functions: agreement with the reference for every option, awkward inputs, and what bad input says."""
from __future__ import annotations

import itertools

import pytest
import torch
from common import key_of, needs_extension, posterior, twin  # noqa: F401

from bnn_fast import Normal, checks, functional, reference

SCALES, KLS = tuple(checks.SCALES), ("analytic", "sampled", None)


def run(module, x, weight, bias, **options):
    """Outputs and gradients of everything, of y and KL together."""
    inputs = [t.detach().clone().requires_grad_() if t is not None else None for t in (x, *weight, *bias)]
    y, kl = module.variational_linear(*inputs, key_of(5, 2), **options)
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)).sum()
    if kl is not None:
        loss = loss + kl / 3
    inputs = [t for t in inputs if t is not None]
    return [y, *([] if kl is None else [kl]), *torch.autograd.grad(loss, inputs)]


@needs_extension
@pytest.mark.parametrize("scale, kl", list(itertools.product(SCALES, KLS)))
@pytest.mark.parametrize("rows, out, inputs",
                         [(1, 1, 1), (4, 3, 127), (0, 4, 3), (6, 0, 3), (2, 5, 0), (130, 33, 17)])
def test_variational_linear_agrees_with_the_reference(scale, kl, rows, out, inputs):
    for bias, tensors, n_samples, offsets in [(True, False, 1, (0, 0)), (False, True, 2, (3, 5)),
                                              (True, True, 2, (0, 8))]:
        if rows % n_samples:
            continue
        x = torch.randn(rows, inputs, dtype=torch.float64)
        weight = posterior(out, inputs)
        pair = posterior(out, seed=1) if bias else (None, None)
        prior = Normal(weight[0].detach() + 0.1,
                       torch.full((out, inputs), 0.6).double()) if tensors else Normal(0.1, 0.6)
        options = dict(prior=prior, bias_prior=Normal(0.2, 0.9), scale=scale, kl=kl, n_samples=n_samples,
                       row_offset=offsets[0], column_offset=offsets[1])
        torch.testing.assert_close(run(functional, x, weight, pair, **options),
                                   run(reference, x, weight, pair, **options))


@needs_extension
@pytest.mark.parametrize("scale, kl", list(itertools.product(SCALES, KLS)))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (0, 3), (127, 9), ()])
def test_sample_normal_agrees_with_the_reference(scale, kl, shape):
    for n_samples, stream in [(None, 0), (1, 1), (3, 2)]:
        mu, rho = posterior(*shape)
        found, expected = [module.sample_normal(mu, rho, key_of(5, 2), prior=Normal(0.1, 0.6), scale=scale,
                                                kl=kl,
                                                n_samples=n_samples, stream=stream, row_offset=3,
                                                column_offset=2)
                           for module in (functional, reference)]
        assert found[0].shape == ((*shape,) if n_samples is None else (n_samples, *shape))
        torch.testing.assert_close(found, expected)
        for result, other in zip(found, expected):
            if result is not None:
                torch.testing.assert_close(torch.autograd.grad(result.sum(), (mu, rho), retain_graph=True),
                                           torch.autograd.grad(other.sum(), (mu, rho), retain_graph=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_results(twin, dtype):
    mu, rho = posterior(4, 3, dtype=dtype)
    y, kl = functional.variational_linear(torch.randn(2, 3).to(dtype), mu, rho, None, None, key_of(1))
    assert y.dtype == dtype and kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (y.sum() + kl).backward()
    assert mu.grad.dtype == rho.grad.dtype == dtype
    assert functional.kl_normal(mu, rho, reduction="none").dtype == dtype


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_input_with_float32_parameters(twin, low):
    mu, rho = posterior(4, 3, dtype=torch.float32)
    x = torch.randn(2, 3)
    y, kl = functional.variational_linear(x.to(low), mu, rho, None, None, key_of(1))
    exact, exact_kl = functional.variational_linear(x, mu, rho, None, None, key_of(1))
    assert y.dtype == low and kl.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.05)
    torch.testing.assert_close(kl, exact_kl)
    y.float().square().sum().backward()
    assert mu.grad.dtype == torch.float32


def test_non_contiguous_and_expanded_inputs(twin):
    mu, rho = posterior(4, 3)
    bias = posterior(4, seed=1)
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = functional.variational_linear(x, mu, rho, *bias, key_of(1))
    for same in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0]):
        assert not same.is_contiguous()
        torch.testing.assert_close(functional.variational_linear(same, mu, rho, *bias, key_of(1)), expected)
    transposed = [p.detach().t().contiguous().t() for p in (mu, rho)]
    torch.testing.assert_close(functional.variational_linear(x, *transposed, *bias, key_of(1)), expected)
    y, _ = functional.variational_linear(x[:1].expand(6, 3), mu, rho, *bias, key_of(1))
    torch.testing.assert_close(y,
                               functional.variational_linear(x[:1], mu, rho, *bias, key_of(1))[0].expand(6,
                                                                                                         4))
    y.sum().backward()  # whose gradient is an expanded scalar
    torch.testing.assert_close(bias[0].grad, torch.full((4,), 6.0, dtype=torch.float64))


def test_one_draw_for_the_batch_and_any_leading_dimensions(twin):
    mu, rho = posterior(4, 3)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    y, _ = functional.variational_linear(x, mu, rho, None, None, key_of(1))
    w, _ = functional.sample_normal(mu, rho, key_of(1))
    torch.testing.assert_close(y, x @ w.T)
    torch.testing.assert_close(functional.variational_linear(x[0, 0], mu, rho, None, None, key_of(1))[0],
                               y[0, 0])


def test_samples_are_those_of_single_calls(twin):
    mu, rho = posterior(4, 3)
    bias = posterior(4, seed=1)
    x = torch.randn(2, 3, dtype=torch.float64)
    y, kl = functional.variational_linear(x.repeat(3, 1), mu, rho, *bias, key_of(1, 4), n_samples=3,
                                          kl="sampled")
    singles = [functional.variational_linear(x, mu, rho, *bias, key_of(1, 4 + s), kl="sampled")
               for s in range(3)]
    torch.testing.assert_close(y, torch.cat([one for one, _ in singles]))
    torch.testing.assert_close(kl, sum(value for _, value in singles) / 3)


def test_offsets_cut_a_layer_into_shards(twin):
    mu, rho = posterior(8, 9)
    bias = posterior(8, seed=1)
    x = torch.randn(5, 9, dtype=torch.float64)
    y, kl = functional.variational_linear(x, mu, rho, *bias, key_of(1), kl="sampled")
    rows = [functional.variational_linear(x, mu[a:b], rho[a:b], bias[0][a:b], bias[1][a:b], key_of(1),
                                          kl="sampled",
                                          row_offset=a) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(torch.cat([part for part, _ in rows], 1), y)
    torch.testing.assert_close(sum(value for _, value in rows), kl)
    columns = [functional.variational_linear(x[:, a:b], mu[:, a:b], rho[:, a:b],
                                             *(bias if a == 0 else (None, None)), key_of(1),
                                             kl="sampled", column_offset=a) for a, b in ((0, 5), (5, 9))]
    torch.testing.assert_close(sum(part for part, _ in columns), y)
    torch.testing.assert_close(sum(value for _, value in columns), kl)


def test_pruned_weights(twin):
    mu, rho = posterior(4, 3)
    bias = posterior(4, seed=1)
    with torch.no_grad():
        rho[1] = -torch.inf
    y, kl = functional.variational_linear(torch.ones(2, 3, dtype=torch.float64), mu, rho, *bias, key_of(1))
    kept = [0, 2, 3]
    expected = functional.kl_normal(mu[kept], rho[kept]) + functional.kl_normal(*bias)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(functional.kl_normal(mu, rho, reduction="mean"),
                               functional.kl_normal(mu[kept], rho[kept]) / 9)
    assert (functional.kl_normal(mu, rho, reduction="none")[1] == 0).all()
    (y.sum() + kl).backward()
    for p in (mu, rho):
        assert (p.grad[1] == 0).all() and p.grad.isfinite().all() and (p.grad[kept] != 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_kl_normal_agrees_with_torch_distributions(twin, reduction):
    mu, rho = posterior(4, 3)
    q = torch.distributions.Normal(mu, torch.nn.functional.softplus(rho))
    elements = torch.distributions.kl_divergence(q,
                                                 torch.distributions.Normal(torch.tensor(0.3).double(), 0.7))
    expected = {"sum": elements.sum(), "mean": elements.mean(), "none": elements}[reduction]
    torch.testing.assert_close(functional.kl_normal(mu, rho, prior=Normal(0.3, 0.7), reduction=reduction),
                               expected)


GOOD = dict(x=torch.randn(4, 3), weight_mu=torch.randn(5, 3), weight_rho=torch.randn(5, 3),
            bias_mu=torch.randn(5),
            bias_rho=torch.randn(5), key=key_of(1))
BAD = [
    (dict(x=torch.randn(4, 7)), ValueError,
     r"x: expected a last dimension of 3 .*given a float32 tensor \[4, 7\]"),
    (dict(x=torch.tensor(1.0)), ValueError, "x: expected a last dimension of 3"),
    (dict(x=torch.randn(4, 3).double()), TypeError, "x: expected torch.float32 .*given a float64 tensor"),
    (dict(x=torch.ones(4, 3, dtype=torch.int64)), TypeError, "x: expected torch.float32 .*given a int64"),
    (dict(x=torch.randn(4, 3, device="meta")), ValueError, "x: expected to be on cpu .*on meta"),
    (dict(n_samples=3), ValueError, r"x: expected dimension 0 .*n_samples=3 .*\[4, 3\]"),
    (dict(n_samples=0), ValueError, "n_samples: expected at least 1, given 0"),
    (dict(n_samples=1.5), TypeError, "n_samples: expected an integer, given float 1.5"),
    (dict(weight_mu=torch.randn(5), weight_rho=torch.randn(5)), ValueError,
     r"weight_mu: expected \[out, in\]"),
    (dict(weight_mu=torch.ones(5, 3, dtype=torch.int32)), TypeError,
     "weight_mu: expected a float32, float64"),
    (dict(weight_rho=torch.randn(3, 5)), ValueError,
     r"weight_rho: expected shape \[5, 3\] .*given a float32 tensor \[3, 5\]"),
    (dict(weight_rho=torch.randn(5, 3).bfloat16()), TypeError,
     "weight_rho: expected torch.float32 as weight_mu"),
    (dict(weight_rho=torch.randn(5, 3, device="meta")), ValueError,
     "weight_rho: expected to be on cpu as weight_mu"),
    (dict(bias_mu=None), ValueError, "bias_mu: expected bias_mu and bias_rho together"),
    (dict(bias_mu=torch.randn(4), bias_rho=torch.randn(4)), ValueError, r"bias_mu: expected \[5\]"),
    (dict(bias_mu=torch.randn(5).double(), bias_rho=torch.randn(5).double()), TypeError,
     "bias_mu: expected torch.float32"),
    (dict(key=torch.tensor([1, 2, 3, 4])), ValueError, r"key: expected shape \[2\]"),
    (dict(key=7), TypeError, r"key: expected an int64 tensor \[2\].*given int 7"),
    (dict(key=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "key: expected to be on cpu"),
    (dict(scale="soft"), ValueError, "scale: expected one of 'softplus', 'exp', 'sqrt_exp', 'square', 'identity', given 'soft'"),
    (dict(kl="exact"), ValueError, "kl: expected one of None, 'analytic', 'sampled', given 'exact'"),
    (dict(kl=[]), ValueError, "kl: expected one of"),
    (dict(prior=Normal(torch.zeros(3), 1.0), bias_prior=Normal()), ValueError,
     r"prior.loc: expected shape \[5, 3\]"),
    (dict(prior=Normal(torch.zeros(5, 3), 1.0)), ValueError, "bias_prior: expected a prior for the bias"),
    (dict(prior=1.0), TypeError, "prior: expected a Normal, given float 1.0"),
    (dict(bias_prior="N"), TypeError, "bias_prior: expected a Normal, given str 'N'"),
    (dict(bias_prior=Normal(0.0, torch.ones(5).double())), TypeError,
     "bias_prior.scale: expected torch.float32"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input_names_argument_given_and_expected(twin, change, error, message):
    options = {**GOOD, **change}
    with pytest.raises(error, match=message):
        functional.variational_linear(**options)


def test_bad_input_of_the_other_functions(twin):
    mu, rho = posterior(2, 3)
    with pytest.raises(ValueError, match=r"rho: expected shape \[2, 3\] as mu has"):
        functional.sample_normal(mu, rho.T, key_of(1))
    with pytest.raises(ValueError, match="reduction: expected one of 'sum', 'mean', 'none', given 'avg'"):
        functional.kl_normal(mu, rho, reduction="avg")
    with pytest.raises(ValueError, match="n_samples: expected at least 1"):
        functional.sample_normal(mu, rho, key_of(1), n_samples=0)


@pytest.mark.parametrize("arguments, error, message", [
    ((0.0, 0.0), ValueError, "prior scale: expected to be positive and finite, given 0.0"),
    ((0.0, -1), ValueError, "prior scale: expected to be positive"),
    ((float("nan"), 1.0), ValueError, "prior loc: expected to be finite"),
    ((0.0, torch.tensor([1.0, -2.0])), ValueError,
     "prior scale: expected every element to be positive.*given -2.0"),
    ((torch.tensor([float("inf")]), 1.0), ValueError, "prior loc: expected every element to be finite"),
    ((0.0, torch.ones(2, requires_grad=True)), TypeError, "prior scale: .*requires_grad=True"),
    (("0", 1.0), TypeError, "prior loc: expected a number or a tensor, given str"),
    ((0.0, True), TypeError, "prior scale: expected a number"),
])
def test_bad_priors(arguments, error, message):
    with pytest.raises(error, match=message):
        Normal(*arguments)
