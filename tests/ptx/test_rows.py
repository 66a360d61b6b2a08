"""The CUDA kernels of rows that are looked up: the CPU's bits and the operators of the whole tensor; rows that there are not."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels import DTYPES, KLS, OPS, SCALES
from row_judging import COUNTS, DRAWS, ROWS, check_rows, make_rows

LOOK_UPS = ([ROWS, COUNTS], [torch.stack((ROWS, DRAWS)), COUNTS], [ROWS], [ROWS, COUNTS])
# Of more than one quad and of one, whole vectors and ragged: columns, column_offset, the prior's tensors.
SHAPES = ((8, 4, True), (5, 3, "scale"), (3, 0, "loc"), (8, 0, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_rows(scale, kl, dtype, cuda_ops):
    for i, (columns, column_offset, tensors) in enumerate(SHAPES):
        check_rows(columns, exact=False, ops=cuda_ops, dtype=dtype, kl=kl, scale=scale, tensors=tensors, look_up=LOOK_UPS[i],
                   n_samples=1 + i % 2, stream=i, row_offset=5 * i, column_offset=column_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kl_alone_has_a_gradient(dtype, cuda_ops):
    for kl in ("analytic", "sampled"):
        given = make_rows(6, dtype=dtype, kl=kl)
        alone, beside = (given._replace(grad_y=grad_y).run(ops=cuda_ops)[2] for grad_y in (None, torch.zeros_like(given.grad_y)))
        for a, b in zip(alone, beside):
            assert torch.equal(a._values(), b._values()) and a._values().any()


@pytest.mark.parametrize("columns", [1027, 1028])
def test_more_quads_than_threads(columns, cuda_ops):
    for dtype in (torch.float32, torch.float64):
        check_rows(columns, exact=False, ops=cuda_ops, dtype=dtype, look_up=[ROWS[:2], COUNTS])


def test_a_forward_is_one_launch(interpreted):
    interpreted.launches.clear()
    make_rows(8, kl=None).run(ops=interpreted)
    assert [launch.kernel.count("rows_forward") for launch in interpreted.launches] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_that_there_is_not_is_nan_and_read_nowhere(dtype, cuda_ops):
    """As a look-up of one's own the memory around the table is not the kernels' to read: the interpreter would say so."""
    rows = torch.tensor([1, 7, -1, 2**62, 0, -(2**63)])
    inside = torch.tensor([0, 4])
    for kl, gradient in itertools.product((None, "analytic", "sampled"), ("sparse", "dense")):
        given = make_rows(5, dtype=dtype, kl=kl, look_up=[rows, COUNTS])
        y, value, gradients = given.run(gradient, cuda_ops)
        alone = given._replace(look_up=[rows[inside], COUNTS], grad_y=given.grad_y[inside])
        expected, expected_value, expected_gradients = alone.run(gradient)
        outside = torch.ones(6, dtype=torch.bool).index_fill(0, inside, False)
        assert y[outside].isnan().all()
        torch.testing.assert_close((y[inside], value), (expected, expected_value))
        for got, true in zip(gradients, expected_gradients):
            torch.testing.assert_close(got.to_dense(), true.to_dense())
    nothing = given._replace(mu=given.mu[:0], rho=given.rho[:0], look_up=[rows, COUNTS[:0]])
    y, value, gradients = nothing.run("dense", cuda_ops)
    assert y.isnan().all() and value == 0 and all(g.shape == (0, 5) for g in gradients)


def test_empty_shapes(cuda_ops):
    for count, columns in itertools.product((0, 3), (0, 3)):
        for gradient, kl in itertools.product(("sparse", "dense"), KLS):
            given = make_rows(columns, kl=kl, look_up=[ROWS[:count], COUNTS])
            y, value, gradients = given.run(gradient, cuda_ops)
            expected = given.run(gradient)
            assert torch.equal(y, expected[0]) and value.shape == expected[1].shape
            for got, true in zip(gradients, expected[2]):
                assert torch.equal(got._indices() if got.is_sparse else got, true._indices() if got.is_sparse else true) or got.numel()


def test_two_runs_have_the_same_bits(cuda_ops):
    given = make_rows(70, kl="sampled")
    first, second = (given.run("dense", cuda_ops) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2]))


def test_strides(cuda_ops):
    given = make_rows(6)
    turned = given._replace(mu=given.mu.T.contiguous().T, rho=given.rho.T.contiguous().T, grad_y=given.grad_y.T.contiguous().T,
                            look_up=[torch.stack((ROWS, ROWS), 1)[:, 0], COUNTS])
    for ops in (cuda_ops, OPS):
        for a, b in zip(given.run("dense", ops)[2], turned.run("dense", ops)[2]):
            assert torch.equal(a, b)
