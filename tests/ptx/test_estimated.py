"""The CUDA kernels of the estimators "local" and "flipout", in either regime, against the reference with the same key."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from kernels import DTYPES, HALVES, SCALES, cast, draw_arguments, make_prior, posterior, random

from bnn_fast import Normal, checks, reference
from ptx import build
from ptx.operators import MULTIPROCESSORS

ESTIMATORS = ("local", "flipout")
KEY = torch.tensor([0x123456789ABCDEF, 3, 70])  # x begins at row 70
ALIGNED, UNALIGNED = (36, 72), (35, 71)  # outputs, inputs: more than a tile of either, and not all of the last one
ONE, FEW, MANY = 1, 3, 13  # rows, for each of which there are kernels
LARGE = 21  # more than the fused kernels take
NAMES = ("y", "kl", "x", "weight_mu", "weight_rho", "bias_mu", "bias_rho")


def layer(shape, dtype=torch.float32, bias=True):
    return *posterior(*shape, dtype=dtype), *(posterior(shape[0], dtype=dtype, seed=1) if bias else (None, None))


def gradients_of(rows, outputs, x_dtype, dtype):
    return random(*rows, outputs, dtype=x_dtype, seed=7), torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32))


def run(ops, x, parameters, estimator, *, key=KEY, need_x=True, grads=None, **options):
    """y, the KL, and the gradients of x and the parameters."""
    arguments = draw_arguments(*parameters, key=key, **options)
    arguments = *arguments[:-1], [*arguments[-1], checks.ESTIMATORS[estimator]]
    grad_y, grad_kl = grads or gradients_of(x.shape[:-1], parameters[0].shape[0], x.dtype, parameters[0].dtype)
    grad_kl = grad_kl if options.get("kl") else None
    y, kl, kept = ops._estimated_linear(x, *arguments)
    given = None if grad_y is None else x
    return [y, kl, *ops._estimated_linear_backward([grad_y, grad_kl], given, *arguments, need_x, kept)]


def run_reference(x, parameters, estimator, *, key=KEY, grads=None, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *parameters)]
    y, kl = reference.variational_linear(*leaves, key, estimator=estimator, **options)
    grad_y, grad_kl = grads or gradients_of(x.shape[:-1], parameters[0].shape[0], x.dtype, parameters[0].dtype)
    results = [(y, grad_y.to(y.dtype))] + ([] if kl is None else [(kl, grad_kl.to(kl.dtype))])
    outputs, given = zip(*results)
    wanted = torch.autograd.grad(outputs, [t for t in leaves if t is not None], given, materialize_grads=True)
    return [y.detach(), torch.zeros(()) if kl is None else kl.detach(), *wanted]


def check(ops, shape, rows, estimator, *, dtype=torch.float32, x_dtype=None, bias=True, **options):
    """Against the reference in float64, whose numbers the results are but for a rounding of their type and of the products."""
    x, parameters = random(*rows, shape[1], dtype=x_dtype or dtype, seed=2), layer(shape, dtype, bias)
    options = dict(prior=Normal(0.25, 0.5), bias_prior=Normal(-0.5, 2.0), kl="analytic") | options
    grads = gradients_of(rows, shape[0], x.dtype, dtype)
    found = run(ops, x, parameters, estimator, grads=grads, **options)
    wide = {name: cast(option, torch.float64) for name, option in options.items()}
    true = run_reference(x.double(), [None if t is None else t.double() for t in parameters], estimator, grads=grads, **wide)
    assert len(found) == len(true)
    for name, got, wanted, like in zip(NAMES, found, true, (x, None, x, *(parameters[0],) * 4)):
        assert got.shape == wanted.shape and got.dtype == (like.dtype if like is not None else torch.promote_types(dtype, torch.float32))
        if got.numel():
            exact = got.dtype == torch.float64 and dtype == torch.float64
            rounding = 1e-13 if exact else 2e-6 + (torch.finfo(got.dtype).eps if got.dtype in HALVES else 0)
            error, size = (got.double() - wanted).abs().max().item(), wanted.abs().max().item()
            assert error <= rounding * (size + 1e-3), f"{name}: {error:.3g} of {size:.3g}: {shape} {rows} {estimator} {dtype} {options}"


def fused_kernels(interpreted) -> set[str]:
    """Of those launched since the list was cleared, the kernels that make two products at a time: their direction and what they
    are made for, estimator and rows."""
    names = {build.short_name(launch.kernel) for launch in interpreted.launches}
    found = (re.search(r"(forward|backward)_kernel<(\d+), (\d+)>", name) for name in names)
    return {" ".join(match.groups()) for match in found if match}


def both_ways(estimator, rows) -> set[str]:
    return {f"{way} {checks.ESTIMATORS[estimator]} {rows}" for way in ("forward", "backward")}


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return request.param


@pytest.mark.parametrize("batch", [ONE, FEW, MANY])
def test_every_scale_type_and_kl(estimator, batch, cuda_ops):
    for i, (scale, kl) in enumerate(itertools.product(SCALES, ("analytic", None))):
        check(cuda_ops, (ALIGNED, UNALIGNED)[i % 4 // 2], (batch,), estimator, scale=scale, kl=kl, bias=i % 3 > 0)
    of_priors = [(torch.float32, "loc"), (torch.float32, "scale"), *((dtype, True) for dtype in HALVES)]
    for i, (shape, (dtype, tensors)) in enumerate(itertools.product((ALIGNED, UNALIGNED), of_priors)):
        priors = dict(prior=make_prior(tensors, *shape, dtype=dtype), bias_prior=make_prior(tensors, shape[0], dtype=dtype, seed=1))
        check(cuda_ops, shape, (batch,), estimator, **priors, dtype=dtype, scale=SCALES[i % 5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_gemms(estimator, dtype, cuda_ops):
    for i, (shape, rows, n_samples, kl) in enumerate([
            (ALIGNED, (LARGE,), 1, "analytic"), (UNALIGNED, (LARGE,), 1, None), (UNALIGNED, (2, 17), 1, "sampled"),
            (ALIGNED, (6, 3), 3, "sampled"),
            (UNALIGNED, (42,), 2, "analytic"), (ALIGNED, (4,), 2, "sampled")]):
        scale = ("softplus", "exp", "square")[i % 3]
        check(cuda_ops, shape, rows, estimator, dtype=dtype, n_samples=n_samples, kl=kl, scale=scale, bias=i % 2 == 0,
              prior=make_prior(i == 2, *shape, dtype=dtype))


def test_in_several_blocks_of_rows(estimator, cuda_ops):
    check(cuda_ops, (300, 400), (54,), estimator, n_samples=3)


@pytest.mark.parametrize("x_dtype", HALVES, ids=str)
def test_sixteen_bits_of_x_alone(estimator, x_dtype, cuda_ops):
    for rows in ((FEW,), (LARGE,)):
        check(cuda_ops, UNALIGNED, rows, estimator, x_dtype=x_dtype)


@pytest.mark.parametrize("outputs, inputs", [(1, 1), (65, 3), (3, 65), (0, 5), (5, 0)])
def test_awkward_shapes_and_samples(estimator, outputs, inputs, cuda_ops):
    for rows, n_samples in (((0,), 1), ((), 1), ((16,), 1), ((6, 2), 2), ((3, 0), 1)):
        check(cuda_ops, (outputs, inputs), rows, estimator, n_samples=n_samples)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_any_number_of_multiprocessors(estimator, multiprocessors, interpreted):
    interpreted.runtime.stand_in_set_multiprocessors(multiprocessors)
    try:
        for batch in (ONE, FEW, MANY) if multiprocessors == 1 else (FEW,):
            check(interpreted, (130, 257 if batch == MANY else 260), (batch,), estimator)
    finally:
        interpreted.runtime.stand_in_set_multiprocessors(MULTIPROCESSORS)


def test_which_kernels_run_and_the_same_bits_twice(estimator, interpreted):
    of_several_samples = both_ways("local", 16) if estimator == "local" else set()
    for rows, n_samples, kl, kernels in (
            (1, 1, "analytic", both_ways(estimator, 1)), (4, 1, "analytic", both_ways(estimator, 4)), (16, 1, None, both_ways(estimator, 16)),
            (17, 1, "analytic", set()), (16, 1, "sampled", set()), (4, 2, None, of_several_samples)):
        x, parameters = random(n_samples * rows, 70), layer((40, 70))
        interpreted.launches.clear()
        once, twice = (run(interpreted, x, parameters, estimator, n_samples=n_samples, kl=kl) for _ in range(2))
        assert fused_kernels(interpreted) == kernels
        assert all(torch.equal(a, b) for a, b in zip(once, twice))


@pytest.mark.parametrize("rows, kl", [(ONE, "analytic"), (FEW, "analytic"), (MANY, "analytic"), (MANY, "sampled")])
def test_gradients_of_either_alone_and_without_that_of_x(estimator, rows, kl, cuda_ops):
    shape = (19, 37)
    x, parameters = random(rows, 37, seed=2), layer(shape)
    grad_y, grad_kl = random(19, rows, seed=4).T, torch.tensor(0.3)
    whole = run(cuda_ops, x, parameters, estimator, kl=kl, grads=(grad_y, grad_kl))[2:]
    without_x = run(cuda_ops, x, parameters, estimator, kl=kl, grads=(grad_y.contiguous(), grad_kl), need_x=False)[2:]
    of_y = run(cuda_ops, x, parameters, estimator, kl=kl, grads=(grad_y, None))[2:]
    of_kl = run(cuda_ops, x, parameters, estimator, kl=kl, grads=(None, grad_kl))[2:]
    assert without_x[0].shape == of_kl[0].shape == (0,) and torch.equal(whole[0], of_y[0])
    for together, without, y_alone, kl_alone in zip(whole[1:], without_x[1:], of_y[1:], of_kl[1:], strict=True):
        assert torch.equal(together, without) and y_alone.any() and kl_alone.any()
        torch.testing.assert_close(together, y_alone + kl_alone)


@pytest.mark.parametrize("rows", [FEW, LARGE])
@pytest.mark.parametrize("rho", [-math.inf, -120.0, 0.0, 120.0])
def test_every_rho(estimator, rows, rho, cuda_ops):
    """And rows of zeros. No NaN, and a pruned weight has no gradient."""
    x = random(rows, 6)
    x[0] = 0.0
    parameters = random(5, 6), torch.full((5, 6), rho), random(5), torch.full((5,), -math.inf)
    y, kl, grad_x, *grads = run(cuda_ops, x, parameters, estimator, kl="analytic")
    assert all(t.isfinite().all() for t in (y, kl, grad_x, *grads))
    assert torch.equal(y[0], parameters[2]) and not any(grad.any() for grad in grads[2:])
    assert any(grad.any() for grad in grads[:2]) != (rho == -math.inf)


@pytest.mark.parametrize("rows", [FEW, LARGE])
def test_an_overflowing_variance_is_no_nan(estimator, rows, cuda_ops):
    x = random(rows, 6)
    x[:, 2] = 0.0
    parameters = random(5, 6), torch.full((5, 6), 60.0), None, None  # sigma = 1e26: its square is inf in float32
    for t in run(cuda_ops, x, parameters, estimator, scale="exp"):
        assert not t.isnan().any()


def test_squares_beyond_sixteen_bits(cuda_ops):
    """In float16 300^2 is inf and (1e-4)^2 is 0."""
    rho = torch.full((4, 2), math.log(math.expm1(1e-4)))
    for rows in (FEW, LARGE):
        x, grads = torch.full((rows, 2), 300.0, dtype=torch.float16), gradients_of((rows,), 4, torch.float16, rho.dtype)
        found = run(cuda_ops, x, (rho * 0, rho, None, None), "local", grads=grads)
        wanted = run_reference(x.double(), (rho.double() * 0, rho.double(), None, None), "local", grads=grads, kl=None)
        for got, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), true.double(), rtol=2e-3, atol=1e-6)
            assert got.any() == (got.dim() > 0)


@pytest.mark.parametrize("need_x", [True, False])
def test_samples_that_share_their_input(need_x, interpreted):
    """Have their products in common, not their noise: the rows of one sample are multiplied, backward too where x needs no gradient."""
    x, parameters = random(1, 4, 9).expand(5, 4, 9), layer((7, 9))
    options = dict(n_samples=5, kl="analytic", need_x=need_x, key=torch.tensor([9, 2]))
    interpreted.launches.clear()
    found = run(interpreted, x, parameters, "local", **options)
    assert fused_kernels(interpreted) == ({"forward 1 4"} if need_x else both_ways("local", 4))
    for a, b in zip(found, run(interpreted, x.contiguous(), parameters, "local", **options), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_key_of_two_begins_at_the_first_row(estimator, dtype, cuda_ops):
    x, parameters = random(8, 37, dtype=dtype), layer((19, 37), dtype)
    whole = run(cuda_ops, x, parameters, estimator, key=torch.tensor([4, 1]))[0]
    part = run(cuda_ops, x[5:], parameters, estimator, key=torch.tensor([4, 1, 5]))[0]
    torch.testing.assert_close(part, whole[5:])
    assert not torch.equal(run(cuda_ops, x[5:], parameters, estimator, key=torch.tensor([4, 1]))[0], part)
