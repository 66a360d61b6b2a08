"""The CUDA kernels of variational_linear, in every regime, against the reference with the same key."""

from __future__ import annotations

import math

import pytest
import torch
from judging import check_linear, check_zero_sigma
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
from ptx.operators import MULTIPROCESSORS

# outputs, inputs and batch of one sample, which choose the regime (csrc/cuda/bind_variational_linear.cpp)
REGIMES = {"small": (19, 37, 5), "fused": (67, 37, 5), "drawn": (67, 37, 70)}
PLAIN = dict(
    prior=Normal(), bias_prior=Normal(), scale="softplus", n_samples=1, row_offset=0, column_offset=0
)
# Every pair of a scale, a KL, a number of samples and offsets is in it.
OPTIONS = [
    (SCALES[a], KLS[b], (1, 3, 9)[(a + b) % 3], ((0, 0), (5, 7), (2**32 - 70, 4))[(a + 2 * b) % 3])
    for a in range(len(SCALES))
    for b in range(3)
]


def expected(sizes: tuple[int, int, int], dtype: torch.dtype, n_samples: int) -> str:
    """The regime of these sizes; the fused kernels take no float64 and at most eight samples."""
    (name,) = (name for name, of_name in REGIMES.items() if of_name == sizes)
    return "drawn" if name == "fused" and (dtype == torch.float64 or n_samples > 8) else name


@pytest.fixture(params=list(REGIMES))
def regime(request) -> tuple[int, int, int]:
    return REGIMES[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_options(dtype, regime, cuda_ops):
    outputs, inputs, batch = regime
    for i, (scale, kl, n_samples, (row_offset, column_offset)) in enumerate(OPTIONS):
        tensors, bias = i % 2 == 0, i // 2 % 2 == 0
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            *posterior(outputs, inputs, dtype=dtype),
            *(posterior(outputs, dtype=dtype, seed=1) if bias else (None, None)),
            prior=make_prior(tensors, outputs, inputs, dtype=dtype),
            bias_prior=make_prior(tensors, outputs, dtype=dtype, seed=1),
            scale=scale,
            kl=kl,
            n_samples=n_samples,
            row_offset=row_offset,
            column_offset=column_offset,
            regime=expected(regime, dtype, n_samples),
            ops=cuda_ops,
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linear_with_half_inputs_and_float_parameters(dtype, regime, cuda_ops):
    outputs, inputs, batch = regime
    for kl, n_samples, bias in zip(KLS, (1, 3, 1), (True, False, True)):
        check_linear(
            random(n_samples * batch, inputs, dtype=dtype, seed=2),
            *posterior(outputs, inputs),
            *(posterior(outputs, seed=1) if bias else (None, None)),
            kl=kl,
            n_samples=n_samples,
            column_offset=3,
            regime=expected(regime, dtype, n_samples),
            ops=cuda_ops,
        )


@pytest.mark.parametrize(
    "outputs, inputs",
    [
        (1, 1),
        (3, 1),
        (1, 3),
        (17, 20),
        (64, 64),
        (65, 3),
        (3, 65),
        (17, 127),
        (127, 17),
        (65, 65),
        (1, 1023),
        (1023, 1),
        (0, 5),
        (5, 0),
        (0, 0),
    ],
)
def test_linear_awkward_shapes(outputs, inputs, cuda_ops):
    for batch, n_samples, column_offset in ((0, 1, 0), (1, 1, 0), (3, 2, 3), (16, 1, 0), (17, 1, 1)):
        check_linear(
            random(n_samples * batch, inputs, seed=2),
            *posterior(outputs, inputs),
            *posterior(outputs, seed=1),
            n_samples=n_samples,
            row_offset=3,
            column_offset=column_offset,
            ops=cuda_ops,
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_linear_split_over_any_number_of_multiprocessors(multiprocessors, dtype, interpreted):
    interpreted.runtime.stand_in_set_multiprocessors(multiprocessors)
    try:
        for batch in (2, 64) if dtype in HALVES else (2, 9, 16):
            check_linear(
                random(batch, 257, dtype=dtype, seed=2),
                *posterior(130, 257, dtype=dtype),
                *posterior(130, dtype=dtype, seed=1),
                kl="sampled",
                ops=interpreted,
            )
    finally:
        interpreted.runtime.stand_in_set_multiprocessors(MULTIPROCESSORS)


def test_linear_strides_and_dimensions(regime, cuda_ops):
    outputs, inputs, batch = regime
    mu, rho = posterior(outputs, inputs)
    for x in (
        random(2, batch, inputs),
        random(inputs, 2 * batch).T,
        random(1, inputs).expand(2 * batch, inputs),
        random(2 * batch, 1).expand(2 * batch, inputs),
        random(2 * batch, 2 * inputs)[:, ::2],
        random(2 * batch, inputs + 2)[:, 1:-1],
    ):
        check_linear(x, mu, rho, *posterior(outputs, seed=1), n_samples=2, ops=cuda_ops)
    check_linear(random(inputs), mu, rho, *posterior(outputs, seed=1), ops=cuda_ops)
    check_linear(
        random(2 * batch * inputs + 1)[1:].view(-1, inputs),
        random(inputs, outputs).T,
        random(outputs, 1).expand(outputs, inputs),
        random(1).expand(outputs),
        random(2 * outputs)[::2],
        prior=Normal(
            random(inputs, outputs, seed=5).T, random(outputs, 1).abs().expand(outputs, inputs) + 0.5
        ),
        n_samples=2,
        ops=cuda_ops,
    )


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_linear_backward_takes_gradients_of_any_stride_and_either_alone(kl, regime, cuda_ops):
    outputs, inputs, batch = regime
    arguments = (random(batch, inputs), *posterior(outputs, inputs), *posterior(outputs, seed=1), KEY)
    grad_y, grad_kl = random(outputs, batch, seed=4).T, torch.tensor(0.3)

    def gradients(**given):
        return raw_linear(*arguments, **PLAIN, kl=kl, **given, ops=cuda_ops)[2]

    whole = gradients(grad_y=grad_y, grad_kl=grad_kl)
    for a, b in zip(whole, gradients(grad_y=grad_y.contiguous(), grad_kl=grad_kl)):
        assert torch.equal(a, b)
    only_y, only_kl = gradients(grad_y=grad_y), gradients(grad_kl=grad_kl)
    no_x = gradients(grad_y=grad_y, grad_kl=grad_kl, need_grad_x=False)
    assert torch.equal(whole[0], only_y[0]) and only_kl[0].shape == no_x[0].shape == (0,)
    for together, of_y, of_kl, without_x in zip(whole[1:], only_y[1:], only_kl[1:], no_x[1:]):
        torch.testing.assert_close(together, of_y + of_kl)
        assert torch.equal(together, without_x)
        assert of_y.abs().sum() > 0 and of_kl.abs().sum() > 0


@pytest.mark.parametrize(
    "scale, kl",
    [("softplus", "analytic"), ("exp", "sampled"), ("sqrt_exp", "analytic"), ("square", "sampled"), ("identity", "analytic")],
)
def test_linear_pruned_weights(scale, kl, regime, cuda_ops):
    outputs, inputs, batch = regime
    mu, rho = posterior(outputs, inputs)
    bias_mu, bias_rho = posterior(outputs, seed=1)
    pruned, bias_pruned = random(outputs, inputs, seed=8) > 0, random(outputs, seed=9) > 0
    rho[pruned], bias_rho[bias_pruned] = -math.inf, -math.inf
    x = random(2 * batch, inputs, seed=2)
    check_linear(x, mu, rho, bias_mu, bias_rho, scale=scale, kl=kl, n_samples=2, ops=cuda_ops, regime=expected(regime, x.dtype, 2))
    gradients = raw_linear(
        x,
        mu,
        rho,
        bias_mu,
        bias_rho,
        KEY,
        **(PLAIN | dict(scale=scale, n_samples=2)),
        kl=kl,
        grad_y=random(2 * batch, outputs),
        grad_kl=torch.tensor(1.0),
        ops=cuda_ops,
    )[2]
    for gradient, mask in zip(gradients[1:], (pruned, pruned, bias_pruned, bias_pruned)):
        assert torch.equal(gradient == 0, mask)


@pytest.mark.parametrize("scale, kl", [("square", "analytic"), ("square", "sampled"), ("identity", "sampled")])
def test_a_sigma_of_zero(scale, kl, regime, cuda_ops):
    check_zero_sigma(scale, *regime, kl, ops=cuda_ops)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_linear_multiplies_by_the_cpus_weights_bit_for_bit(dtype, regime, cuda_ops):
    outputs, inputs, batch = regime
    mu, rho = posterior(outputs, inputs, dtype=dtype)
    drawn = OPS._sample_normal(*draw_arguments(mu, rho, row_offset=2, column_offset=6))[0][0]
    for first in range(0, inputs, batch):
        columns = torch.arange(first, first + batch) % inputs
        rows = torch.eye(inputs, dtype=dtype)[columns]
        options = PLAIN | dict(row_offset=2, column_offset=6)
        y, _, _ = raw_linear(rows, mu, rho, None, None, KEY, **options, kl=None, ops=cuda_ops)
        assert regime_of(rows, mu, 1, cuda_ops) == expected(regime, dtype, 1)
        assert torch.equal(y, drawn[:, columns].T)


def test_each_regime_has_its_own_kernels_and_the_same_bits_twice(interpreted):
    launched = []
    for name, (outputs, inputs, batch) in REGIMES.items():
        x, parameters = random(batch, inputs), (*posterior(outputs, inputs), *posterior(outputs, seed=1))
        assert regime_of(x, parameters[0], 1, interpreted) == name
        interpreted.launches.clear()
        results = []
        for _ in range(2):
            y, kl, gradients = raw_linear(
                x,
                *parameters,
                KEY,
                **PLAIN,
                kl="analytic",
                grad_y=random(batch, outputs),
                grad_kl=torch.tensor(0.3),
                ops=interpreted,
            )
            results.append((y, kl, *gradients))
        for a, b in zip(*results):
            assert torch.equal(a, b)
        launched.append(frozenset(launch.kernel for launch in interpreted.launches))
    assert len(set(launched)) == len(REGIMES)
