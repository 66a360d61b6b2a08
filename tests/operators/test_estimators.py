"""The estimators "local" and "flipout": compiled and plain against each other, gradients, and what every kernel keeps to."""
from __future__ import annotations

import math

import pytest
import torch
from common import key_of, needs_extension, posterior
from kernels import OPS, draw_arguments

from bnn_fast import functional, reference
from bnn_fast.operators import autograd, raw
from bnn_fast.operators.noise import random_signs, standard_normal
from bnn_fast.priors import Normal

ESTIMATORS = ("local", "flipout")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KEY = torch.tensor([5, 3, 70])  # the input begins at row 70


def layer(outputs, inputs, dtype=torch.float32, bias=True):
    return *posterior(outputs, inputs, dtype=dtype), *(posterior(outputs, dtype=dtype, seed=9) if bias else (None, None))


def run(module, x, parameters, key=KEY, estimator="local", **options):
    """y, the KL, and the gradients of x and the parameters by a loss of both."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *parameters)]
    y, kl = module.variational_linear(*leaves, key, estimator=estimator, **options)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    loss = (y * weights).sum().to(torch.float64)
    (loss if kl is None else loss + 0.3 * kl).backward()
    return [y.detach(), torch.zeros(()) if kl is None else kl.detach(), *(t.grad for t in leaves if t is not None)]


def assert_close(found, expected, tolerance):
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        if wanted.numel():
            size = wanted.double().abs().max().item()
            assert (got.double() - wanted.double()).abs().max().item() <= tolerance * (size + 1e-6)


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_many_rows_for_many_outputs(estimator):
    """Fused where products outrun the GEMMs, by them elsewhere."""
    parameters, x = layer(640, 20, torch.float32, bias=True), torch.randn(40, 20)
    options = dict(estimator=estimator, kl="analytic", n_samples=1, prior=Normal(0.1, 0.7))
    assert_close(run(functional, x, parameters, **options), run(reference, x, parameters, **options), 2e-5)


# aligned and awkward, few rows and many: the fused regime and that of the GEMMs
@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kl", ["analytic", "sampled", None])
@pytest.mark.parametrize("outputs, inputs", [(5, 3), (33, 71), (64, 256), (6, 700), (300, 40)])
@pytest.mark.parametrize("rows", [(3,), (6,), (3, 2), (258,), (6, 0), (0,)])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_kernels_against_reference(estimator, kl, outputs, inputs, rows, n_samples):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        parameters = layer(outputs, inputs, dtype, bias=len(rows) == 1)
        parameters[1].data[0, 0] = -math.inf
        x = torch.randn(*rows, inputs, dtype=dtype)
        options = dict(estimator=estimator, kl=kl, n_samples=n_samples, prior=Normal(0.1, 0.7))
        assert_close(run(functional, x, parameters, **options), run(reference, x, parameters, **options), tolerance)


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [5, 130])
@pytest.mark.parametrize("scale", ["softplus", "exp", "sqrt_exp"])
def test_priors_of_tensors_and_scales(estimator, rows, scale):
    parameters = layer(7, 30)
    prior = Normal(torch.randn(7, 30), torch.rand(7, 30) + 0.5)
    options = dict(estimator=estimator, scale=scale, prior=prior, bias_prior=Normal(0.2, 2.0))
    x = torch.randn(rows, 30)
    assert_close(run(functional, x, parameters, **options), run(reference, x, parameters, **options), 2e-5)


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [4, 130])
@pytest.mark.parametrize("parameters_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sixteen_bits(estimator, rows, parameters_in, low):
    if parameters_in not in (torch.float32, low):
        pytest.skip("x has the parameters' type, or they have float32")
    parameters = layer(9, 40, parameters_in)
    x = torch.randn(rows, 40).to(low)
    wide = run(reference, x.double(), [t.double() for t in parameters], estimator=estimator)
    for module in (functional, reference):
        found = run(module, x, parameters, estimator=estimator)
        assert [t.dtype for t in found[:3]] == [low, torch.float32, low]
        assert found[3].dtype == parameters_in
        assert_close([t.double() for t in found], [t.double() for t in wide], 4 * torch.finfo(low).eps)


@needs_extension
@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_squares_beyond_sixteen_bits(module, dtype):
    """In float16 300^2 is inf and (1e-4)^2 is 0."""
    mu = torch.zeros(4, 2, dtype=dtype)
    rho = torch.full((4, 2), math.log(math.expm1(1e-4)), dtype=dtype)
    x = torch.full((3, 2), 300.0, dtype=torch.float16)
    y, _, grad_x, grad_mu, grad_rho = run(module, x, (mu, rho, None, None), kl=None)
    eps = standard_normal(KEY, 1, 3, 4, stream=2, row_offset=70)[0]
    sigma = rho.double().exp().log1p()[0, 0].item()
    torch.testing.assert_close(y.double(), eps.double() * 300 * math.sqrt(2) * sigma, rtol=2e-3, atol=0)
    for grad in (grad_x, grad_mu, grad_rho):
        assert grad.isfinite().all() and (grad != 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension), reference])
@pytest.mark.parametrize("n_samples, bias, kl", [(1, True, "analytic"), (2, False, "sampled"), (2, True, None)])
def test_gradcheck(estimator, module, n_samples, bias, kl):
    parameters = [t for t in layer(3, 5, torch.float64, bias) if t is not None]

    def both(x, *given):
        y, value = module.variational_linear(x, *given, *(() if bias else (None, None)), KEY, estimator=estimator, kl=kl,
                                             n_samples=n_samples)
        return y if value is None else (y, value)

    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    # without the nodes the KL is an operator of its own, which has to have a gradient
    assert torch.autograd.gradcheck(both, (x, *parameters), check_undefined_grad=autograd.nodes is not None)
    if module is reference:
        assert torch.autograd.gradgradcheck(both, (x, *parameters))


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias, kl, n_samples", [(True, "analytic", 1), (False, "sampled", 2)])
def test_opcheck(estimator, dtype, bias, kl, n_samples):
    parameters = [None if t is None else t.detach() for t in layer(5, 3, dtype, bias)]
    arguments = draw_arguments(*parameters, key=key_of(7), kl=kl, n_samples=n_samples)
    arguments = *arguments[:-1], [*arguments[-1], {"local": 1, "flipout": 2}[estimator]]
    x = torch.randn(4, 2, 3).to(dtype)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(raw.estimated_linear, (x, *arguments), test_utils=tests)
    y, value, kept = raw.estimated_linear(x, *arguments)
    for grads, given, need_x in [((y, value), x, True), ((y, None), x, False), ((None, value), None, False)]:
        torch.library.opcheck(raw.estimated_linear_backward, (list(grads), given, *arguments, need_x, kept), test_utils=tests)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension), reference])
@pytest.mark.parametrize("rows", [4, 130])
@pytest.mark.parametrize("rho", [-math.inf, -120.0, -30.0, 0.0, 120.0])
def test_every_rho(estimator, module, rows, rho):
    """And rows of zeros. No NaN, and a pruned weight has no gradient."""
    x = torch.randn(rows, 6)
    x[0] = 0.0
    parameters = torch.randn(5, 6), torch.full((5, 6), rho), torch.randn(5), torch.full((5,), -math.inf)
    y, kl, grad_x, *grads = run(module, x, parameters, estimator=estimator)
    assert all(t.isfinite().all() for t in (y, kl, grad_x, *grads))
    torch.testing.assert_close(y[0], parameters[2])
    assert not any(grad.any() for grad in grads[2:])
    if rho in (-math.inf, -120.0):  # sigma^2 underflows: the means
        torch.testing.assert_close(y, x @ parameters[0].T + parameters[2])
    assert any(grad.any() for grad in grads[:2]) != (rho == -math.inf)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension), reference])
@pytest.mark.parametrize("rows", [4, 130])
def test_an_overflowing_variance_is_no_nan(estimator, module, rows):
    x = torch.randn(rows, 6)
    x[:, 2] = 0.0
    parameters = torch.randn(5, 6), torch.full((5, 6), 60.0), None, None  # sigma = 1e26: its square is inf in float32
    for t in run(module, x, parameters, estimator=estimator, scale="exp", kl=None):
        assert not t.isnan().any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension), reference])
@pytest.mark.parametrize("shape", [(12, 7), (12, 3, 7)])
def test_a_part_of_the_batch_and_samples_apart(estimator, module, shape):
    """Rows from the k-th on with k in the key, and one sample at a time, give what the whole does."""
    parameters, x = layer(5, 7, torch.float64), torch.randn(*shape, dtype=torch.float64)
    (mu, rho, *bias) = parameters

    def outputs(x, key, n_samples=1):
        return module.variational_linear(x, mu, rho, *bias, key, estimator=estimator, n_samples=n_samples)[0].detach()

    whole = outputs(x, torch.tensor([4, 1]))
    parts = [outputs(x[first:first + 5], torch.tensor([4, 1, first])) for first in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(parts), whole)
    samples = outputs(torch.cat([x, x]), torch.tensor([4, 1]), 2)
    torch.testing.assert_close(samples, torch.cat([whole, outputs(x, torch.tensor([4, 2]))]))
    if x.dim() == 2:
        torch.testing.assert_close(outputs(x[0], torch.tensor([4, 1])), whole[0])


@needs_extension
@pytest.mark.parametrize("rows, outputs", [(3, 7), (40, 5)])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_samples_that_share_their_input(rows, outputs, need_x, kl):
    """Have their mean and variance in common, not their noise; so has their gradient, where x needs none."""
    parameters, x = layer(outputs, 9, torch.float64), torch.randn(rows, 9, dtype=torch.float64)
    found = []
    for module in (functional, reference):
        leaves = [t.detach().clone().requires_grad_() for t in parameters]
        repeated = x.repeat(4, 1).requires_grad_(need_x)
        y, value = module.variational_linear(repeated, *leaves, KEY, estimator="local", n_samples=4, kl=kl)
        ((y * torch.cos(torch.arange(y.numel()).reshape(y.shape))).sum() + value).backward()
        found.append([y.detach(), value.detach(), *(t.grad for t in leaves), *([repeated.grad] if need_x else [])])
    assert_close(*found, 1e-11)
    assert not torch.equal(found[0][0][:rows], found[0][0][rows:2 * rows])


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [16, 130])
def test_bitwise_for_any_number_of_threads(estimator, rows):
    parameters, x = layer(130, 300), torch.randn(rows, 300)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(run(functional, x, parameters, estimator=estimator, n_samples=2))
    finally:
        torch.set_num_threads(threads)
    if rows > 64:  # the products are the vendor's, whose sums may depend on the number of threads
        found = [[each[1]] for each in found]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_extension
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sums_over_many_rows(estimator):
    """Of narrow layers: in blocks of rows, on several threads, with the same bits."""
    parameters, x = layer(37, 3), torch.randn(3 * 2500, 3)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(run(functional, x, parameters, estimator=estimator, n_samples=3, kl="analytic"))
    finally:
        torch.set_num_threads(threads)
    assert_close(found[0], run(reference, x, parameters, estimator=estimator, n_samples=3, kl="analytic"), 2e-5)
    assert torch.equal(found[0][5], found[1][5])  # the bias's mean, whose gradient no GEMM has part in


def test_signs_are_bits():
    signs = random_signs(key_of(3), 2, 50, 300, stream=3)
    assert signs.shape == (2, 50, 300) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 0.03
    assert torch.equal(signs[:, 7:], random_signs(key_of(3), 2, 43, 300, stream=3, row_offset=7))
    assert not torch.equal(signs, random_signs(key_of(3), 2, 50, 300, stream=4))


@pytest.mark.parametrize("module", [pytest.param(functional, marks=needs_extension), reference])
def test_what_is_refused(module):
    mu, rho, *bias = layer(5, 7)
    x = torch.randn(3, 7)
    with pytest.raises(ValueError, match="estimator: expected one of 'weight', 'local', 'flipout', given 'path'"):
        module.variational_linear(x, mu, rho, *bias, key_of(1), estimator="path")
    with pytest.raises(ValueError, match="row_offset: expected 0 with estimator='local', .* given int 2"):
        module.variational_linear(x, mu, rho, *bias, key_of(1), estimator="local", row_offset=2)
    with pytest.raises(ValueError, match=r"key: expected shape \[2\]"):
        module.variational_linear(x, mu, rho, *bias, torch.zeros(4, dtype=torch.int64), estimator="local")


@needs_extension
def test_the_operator_checks_what_it_is_given():
    mu, rho, *bias = (t.detach() for t in layer(5, 7))
    arguments = draw_arguments(mu, rho, key=key_of(1))
    x = torch.randn(3, 7)
    with pytest.raises(RuntimeError, match="options has 7 numbers, expected 8"):
        OPS._estimated_linear(x, *arguments)
    for estimator in (0, 3):
        with pytest.raises(RuntimeError, match=f"estimator is {estimator}, expected 1"):
            OPS._estimated_linear(x, *arguments[:-1], [*arguments[-1], estimator])
    local = *arguments[:-1], [*arguments[-1], 1]
    with pytest.raises(RuntimeError, match="kept is absent"):
        OPS._estimated_linear_backward([torch.zeros(3, 5), None], x, *local, True, None)
    with pytest.raises(RuntimeError, match="kept has shape"):
        OPS._estimated_linear_backward([torch.zeros(3, 5), None], x, *local, True, torch.zeros(3, 4))
