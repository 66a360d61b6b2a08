"""The CUDA kernels of sample_normal and kl_normal against the CPU's (bits) and the reference (accuracy)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from judging import check_kl, check_sample
from kernels import (
    DTYPES,
    KEY,
    KLS,
    OPS,
    SCALES,
    draw_arguments,
    posterior,
    random,
    raw_sample,
)

from bnn_fast import Normal


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (3, 1), (1, 17), (5, 127), (3, 1027), (0, 4), (2, 3, 5)], ids=str
)
def test_weights_have_the_cpus_bits(shape, dtype, cuda_ops):
    mu, rho = posterior(*shape, dtype=dtype)
    for n_samples, stream, row, column in ((1, 0, 0, 0), (3, 1, 2, 5), (2, 7, 2**32 - 9, 2**32 - 6)):
        for key in (KEY, torch.tensor([-(2**63), 2**32 - 2])):
            place = dict(stream=stream, row_offset=row, column_offset=column)
            arguments = draw_arguments(mu, rho, key=key, n_samples=n_samples, **place)
            (got, kl), (expected, _) = cuda_ops._sample_normal(*arguments), OPS._sample_normal(*arguments)
            assert got.shape == (n_samples, *shape) and kl == 0
            assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize("scale", SCALES)
def test_sigma_has_the_cpus_bits(scale, cuda_ops):
    special = torch.tensor([-math.inf, math.inf, 1e4, -1e4, 0.0, -0.0])
    rho = torch.cat([torch.linspace(-130, 130, 20_000), special])
    arguments = draw_arguments(torch.zeros_like(rho), rho, scale=scale)
    assert torch.equal(bits(cuda_ops._sample_normal(*arguments)[0]), bits(OPS._sample_normal(*arguments)[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_sample_normal(scale, kl, dtype, cuda_ops):
    for tensors, n_samples, offsets in (
        (False, 1, (0, 0)),
        (True, 3, (3, 6)),
        ("loc", 9, (1, 4)),
        ("scale", 1, (0, 0)),
    ):
        check_sample(
            7,
            41,
            dtype=dtype,
            tensors=tensors,
            scale=scale,
            kl=kl,
            n_samples=n_samples,
            offsets=offsets,
            ops=cuda_ops,
        )


@pytest.mark.parametrize(
    "shape", [(), (1,), (3, 1), (1, 3), (127, 17), (2, 3, 7), (130, 257), (0, 3), (3, 0)], ids=str
)
def test_sample_normal_shapes(shape, cuda_ops):
    for dtype, offsets in ((torch.float32, (0, 0)), (torch.bfloat16, (0, 1))):
        check_sample(*shape, dtype=dtype, scale="softplus", n_samples=1, offsets=offsets, ops=cuda_ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_kl_normal(scale, dtype, cuda_ops):
    shapes = itertools.cycle([(19, 37), (3, 1023), (5,), (2, 3, 7), (), (0, 3)])
    for tensors, reduction, shape in zip((False, True) * 6, ("sum", "sum", "none", "none") * 3, shapes):
        check_kl(*shape, dtype=dtype, tensors=tensors, reduction=reduction, scale=scale, ops=cuda_ops)


@pytest.mark.parametrize("columns", [701, 700])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_pruned_and_extreme_weights(scale, kl, columns, cuda_ops):
    """Against the CPU's operators, which their own tests hold against the reference over the whole range."""
    high = 40.0 if scale in ("exp", "sqrt_exp") else 120.0
    mu, rho = random(3, columns), torch.linspace(-120, high, 3 * columns).reshape(3, columns)
    rho[random(3, columns, seed=8) > 1] = -math.inf
    options = dict(
        prior=Normal(), scale=scale, kl=kl, n_samples=2, grad_w=random(2, 3, columns), grad_kl=torch.tensor(0.3)
    )
    (w, value), gradients = raw_sample(mu, rho, **options, ops=cuda_ops)
    (cpu_w, cpu_value), cpu_gradients = raw_sample(mu, rho, **options)
    assert torch.equal(bits(w), bits(cpu_w)) and (w == mu)[:, rho == -math.inf].all()
    torch.testing.assert_close(value, cpu_value, rtol=1e-5, atol=0)
    for got, expected in zip(gradients, cpu_gradients):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert (got[rho == -math.inf] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_is_infinite_and_never_nan(dtype, scale, cuda_ops):
    for value_of_rho, kl in itertools.product((1e4, math.inf), ("analytic", "sampled")):
        mu, rho = torch.zeros(3, 9, dtype=dtype), torch.full((3, 9), value_of_rho, dtype=dtype)
        w, value = cuda_ops._sample_normal(*draw_arguments(mu, rho, scale=scale, kl=kl, n_samples=2))
        assert not w.isnan().any() and not value.isnan()
        if scale in ("exp", "sqrt_exp") or value_of_rho == math.inf:
            assert w.isinf().all() and value == math.inf


def test_strides_and_absent_gradients(cuda_ops):
    mu, rho = random(21, 9).T, random(1, 21, seed=3).expand(9, 21)
    prior = Normal(random(21, 9, seed=5).T, random(9, 1, seed=6).abs().expand(9, 21) + 0.5)
    options = dict(scale="softplus", n_samples=2)
    grad_w, grad_kl = random(9, 21, 2).permute(2, 0, 1), torch.tensor(0.3)
    for kl in ("analytic", "sampled"):

        def gradients(*tensors, grad_w=grad_w, grad_kl=grad_kl, prior=prior):
            drawn, found = raw_sample(
                *tensors, prior=prior, kl=kl, grad_w=grad_w, grad_kl=grad_kl, **options, ops=cuda_ops
            )
            return *drawn, *found

        given = gradients(mu, rho)
        dense = gradients(
            mu.contiguous(),
            rho.contiguous(),
            grad_w=grad_w.contiguous(),
            prior=Normal(prior.loc.contiguous(), prior.scale.contiguous()),
        )
        for a, b in zip(given, dense):
            assert torch.equal(a, b)
        for whole, of_w, of_kl in zip(
            given[2:], gradients(mu, rho, grad_kl=None)[2:], gradients(mu, rho, grad_w=None)[2:]
        ):
            torch.testing.assert_close(whole, of_w + of_kl)
            assert of_w.abs().sum() > 0 and of_kl.abs().sum() > 0


def test_a_shifted_view_is_read_where_it_is(cuda_ops):
    """Not aligned as torch aligns fresh memory."""
    for dtype in DTYPES:
        mu, rho = posterior(703, dtype=dtype)
        where_it_is, aligned = (
            cuda_ops._sample_normal(*draw_arguments(*pair, kl="analytic"))
            for pair in ((mu[1:], rho[1:]), (mu[1:].clone(), rho[1:].clone()))
        )
        for a, b in zip(where_it_is, aligned):
            assert torch.equal(a, b)


def test_two_runs_have_the_same_bits(cuda_ops):
    mu, rho = posterior(130, 257)
    options = dict(
        prior=Normal(),
        scale="softplus",
        kl="sampled",
        n_samples=2,
        grad_w=random(2, 130, 257),
        grad_kl=torch.tensor(0.3),
    )
    first, second = (raw_sample(mu, rho, **options, ops=cuda_ops) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])):
        assert torch.equal(a, b)
