"""The CUDA kernels of a chain of narrow layers against the reference of its layers one by one, with the same key."""

from __future__ import annotations

import functools
import math

import chains
import pytest
import torch
from chains import links_of
from kernels import HALVES, KLS, SCALES, random

from bnn_fast import checks
from bnn_fast.operators import arguments as packing

DTYPES = (torch.float32, *HALVES)
# sizes, rows, samples, shared, which layers are not drawn, which have no bias: tiles of 32, 64 and 128 rows, ragged ones; layers that fill
# the products' tiles and that do not; slices of weights, one and several
SHAPES = {
    "regression": ((13, 50, 1), 32, 1, False, (), ()),
    "narrow": ((1, 20, 20, 1), 37, 3, False, (), (1,)),
    "shared": ((5, 7, 33, 2), 70, 2, True, (1,), (0, 2)),
    "wide": ((128, 128, 10), 33, 1, False, (0,), ()),
    "one row": ((3, 4, 2), 1, 2, False, (), ()),
}
PARTS = (2, 2), 130, 133, True, (), ()  # a block takes two tiles, of 128 rows, of each sample


def run(ops, x, links, kl, samples, shared, scale="softplus", need_x=True, keeps=True):
    """[y, KL, gradients of x and of all tensors]"""
    arguments = packing.to_chain(links, scale, kl, samples, shared)
    y, value, kept = ops._variational_chain(x, *arguments)
    grad_y, grad_kl = chains.gradients(y, x.dtype)
    grads = [grad_y, None if kl is None else torch.tensor(grad_kl)]
    return [y, value, *ops._variational_chain_backward(grads, x, *arguments, need_x, kept if keeps else None)]


def compare(ops, shape, activation="relu", kl="analytic", dtype=torch.float32, **options):
    chains.compare(functools.partial(run, ops), SHAPES.get(shape, shape), activation, kl, dtype, **options)


def given(shape, dtype=torch.float32, **options):
    """(x, links, samples, shared)"""
    sizes, rows, samples, shared, fixed, without = SHAPES.get(shape, shape)
    x = random(rows if shared else samples * rows, sizes[0], dtype=dtype, seed=9)
    return x, links_of(sizes, fixed, without, dtype=dtype, **options), samples, shared


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(shape, dtype, cuda_ops):
    compare(cuda_ops, shape, kl=KLS[(list(SHAPES).index(shape) + DTYPES.index(dtype)) % 3], dtype=dtype)


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_activations(activation, cuda_ops):
    compare(cuda_ops, "narrow", activation)
    for dtype in HALVES:
        x, links, samples, shared = given(((3, 9, 6), 7, 2, False, (), ()), dtype, activation=activation, last=True)
        truth = chains.all_of(chains.plain, x, links, torch.float64, "analytic", samples, shared)
        for a, b in zip(run(cuda_ops, x, links, "analytic", samples, shared), truth, strict=True):
            assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * (1 + b.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_priors(dtype, cuda_ops):
    for shape in ("shared", ((4, 8, 8, 4), 3, 2, True, (), ())):
        for kl in ("analytic", "sampled"):
            compare(cuda_ops, shape, "tanh", kl, dtype, tensors=True)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_scales(scale, kl, cuda_ops):
    x, links, samples, shared = given(((3, 9, 2), 1, 2, True, (), ()))
    got = run(cuda_ops, x, links, kl, samples, shared, scale)
    truth = chains.all_of(functools.partial(chains.plain, scale=scale), x, links, torch.float64, kl, samples, shared)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_samples_than_blocks(dtype, cuda_ops):
    """Of the launch that draws; and no rows."""
    x, links, *_ = given(((1, 1), 0, 1, True, (), ()), dtype)
    arguments, samples = packing.to_chain(links, "softplus", "sampled", 1060, True), 1060
    _, value, kept = cuda_ops._variational_chain(x, *arguments)
    drawn = [cuda_ops._sample_normal(links[0].tensors[2 * i:2 * i + 2], links[0].key, [], [0.1, 1.5], [0, 0, 2, samples, i, 0, 0])
             for i in range(2)]
    assert torch.equal(kept, torch.cat([w.flatten() for w, _ in drawn]))
    torch.testing.assert_close(value, drawn[0][1] + drawn[1][1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_with_several_tiles(dtype, cuda_ops):
    compare(cuda_ops, PARTS, dtype=dtype)


def test_more_samples_than_lanes(cuda_ops):
    """Of the warp that adds up a gradient."""
    compare(cuda_ops, ((2, 3, 2), 3, 70, True, (0,), ()), kl="sampled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_those_of_the_layers_bit_for_bit(dtype, cuda_ops):
    x, links, *_ = given("shared", dtype)
    kept = cuda_ops._variational_chain(x, *packing.to_chain(links, "softplus", None, 4, True))[2]
    drawn = []
    for link in links:
        for i in range(len(link.tensors) // 2 if link.key is not None else 0):
            pair, numbers = link.tensors[2 * i:2 * i + 2], [0.0, 1.0]
            drawn.append(cuda_ops._sample_normal(pair, link.key, [], numbers, [0, 0, 0, 4, i, 0, 0])[0].flatten())
    assert torch.equal(kept, torch.cat(drawn))


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_many_samples_are_drawn_in_groups(kl, cuda_ops):
    """Of 2 ** 24 weights; of 2 ** 12 where they are interpreted."""
    x, links, *_ = given(((20, 20, 2), 1, 1, True, (), ()))
    arguments = packing.to_chain(links, "softplus", kl, 11, True)
    y, value, _ = cuda_ops._variational_chain(x, *arguments)
    truth, kl_truth = chains.plain(x.double(), chains.in_dtype(links, torch.float64), kl, 11, True)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.double(), kl_truth, rtol=1e-6, atol=0.0)


def test_gradients_without_what_a_forward_kept(cuda_ops):
    """The same bits."""
    x, links, samples, shared = given("narrow")
    with_kept, without = (run(cuda_ops, x, links, "sampled", samples, shared, keeps=keeps) for keeps in (True, False))
    assert all(map(torch.equal, with_kept, without))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeatable_and_parameters_alone(dtype, cuda_ops):
    x, links, samples, shared = given("narrow", dtype)
    one, two, without = (run(cuda_ops, x, links, "analytic", samples, shared, need_x=need_x) for need_x in (True, True, False))
    assert all(map(torch.equal, one, two))
    assert without[2].numel() == 0 and all(map(torch.equal, one[3:], without[3:]))


def test_the_kl_alone(cuda_ops):
    x, links, samples, shared = given("shared")
    for kl in ("analytic", "sampled"):
        arguments = packing.to_chain(links, "softplus", kl, samples, shared)
        found = cuda_ops._variational_chain_backward([None, torch.tensor(2.0)], None, *arguments, True, None)
        leaves = chains.in_dtype(links, torch.float64)
        value = chains.plain(x.double(), leaves, kl, samples, shared)[1]
        tensors = [t for link in leaves for t in link.tensors]
        truth = torch.autograd.grad(2 * value, tensors, allow_unused=True)
        for a, b in zip(found[1:], truth, strict=True):
            torch.testing.assert_close(a.double(), torch.zeros_like(a).double() if b is None else b, rtol=1e-5, atol=1e-5)


def test_layers_of_which_none_is_drawn(cuda_ops):
    compare(cuda_ops, ((3, 5, 2), 7, 1, False, (0, 1), (0,)), kl=None)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_and_no_features(rows, cuda_ops):
    for sizes in ((3, 4, 2), (0, 4, 2), (3, 0, 2), (3, 0)):
        for dtype in DTYPES:
            compare(cuda_ops, (sizes, rows, 1, False, (), ()), dtype=dtype)


def test_pruned_weights_have_no_gradient(cuda_ops):
    x, links, samples, shared = given("one row")
    mu, rho = links[0].tensors[:2]
    mu[1], rho[1] = 0.0, -math.inf
    y, value, grad_x, grad_mu, grad_rho, *rest = run(cuda_ops, x, links, "analytic", samples, shared)
    assert all(t.isfinite().all() for t in (y, value, grad_x, grad_mu, grad_rho, *rest))
    assert not grad_mu[1].any() and not grad_rho[1].any() and grad_mu[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_beyond_the_batch_is_no_nan(dtype, cuda_ops):
    """Rows behind the batch's end, which a tile has, do not reach the sums: 0 times an infinite activation would be NaN. Those here are
    first that of the bias, then infinite; the batch's are 0.
    """
    def link(outputs, inputs, weight, *bias):
        return packing.Link([torch.full((outputs, inputs), weight, dtype=dtype), *(torch.full((outputs,), b, dtype=dtype) for b in bias)],
                            None, None, (1, 0.0, 0.0))

    large = torch.finfo(dtype).max / 2
    links = [link(4, 3, large, large), link(4, 4, 4.0), link(2, 4, 1.0, 1.0)]
    for t in run(cuda_ops, torch.full((3, 3), -2.0, dtype=dtype), links, None, 1, False):
        assert t.isfinite().all()


def test_two_launches_each_way(interpreted):
    """Forward the weights and their KL, then all layers and the KL's sum; backward all layers, then the gradients. tests/inference/
    test_launches.py counts what is beside them.
    """
    x, links, samples, shared = given(((1, 20, 20, 20, 20, 1), 8, 1, False, (), ()))
    arguments = packing.to_chain(links, "softplus", "analytic", samples, shared)
    interpreted.launches.clear()
    y, value, kept = interpreted._variational_chain(x, *arguments)
    assert [kernel(at) for at in interpreted.launches] == ["chain_draw_kernel", "chain_forward_kernel"]
    interpreted.launches.clear()
    interpreted._variational_chain_backward([y, value], x, *arguments, True, kept)
    assert [kernel(at) for at in interpreted.launches] == ["chain_parts_kernel", "chain_gradient_kernel"]


def kernel(launch) -> str:
    names = ("chain_draw_kernel", "chain_forward_kernel", "chain_parts_kernel", "chain_gradient_kernel")
    return next(name for name in names if name in launch.kernel)


@pytest.mark.parametrize("sizes, dtype, message", [
    ((3, 4), torch.float64, "expected float32, bfloat16 or float16"),
    ((3, 129), torch.float32, "a layer has 3 inputs and 129 outputs, expected at most 128 on CUDA"),
])
def test_refused(sizes, dtype, message, cuda_ops):
    x, links, samples, shared = given((sizes, 2, 1, False, (), ()), dtype)
    with pytest.raises(RuntimeError, match=message):
        run(cuda_ops, x, links, None, samples, shared)
