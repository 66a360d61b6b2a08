"""Recurrences and attention: gradcheck, torch.compile, and inputs of other types, none at all or without data."""
from __future__ import annotations

import pytest
import torch
from common import twin  # noqa: F401
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import bnn_fast as bf

from .test_sequences import CASES, equal, every

ALONE = [name for name, case in CASES.items() if not issubclass(getattr(nn, case.name), nn.RNNBase)]   # what torch.compile takes


@every
def test_gradcheck(case, twin):
    layer = case.layer(dtype=torch.float64)
    inputs = tree_map(lambda x: x.requires_grad_(), case.inputs(2, dtype=torch.float64))
    names, parameters = zip(*layer.named_parameters())
    leaves, form = torch.utils._pytree.tree_flatten(inputs)

    def outputs(*values):
        given = torch.utils._pytree.tree_unflatten(values[len(names):], form)
        with bf.sampling(layer, 2, seed=1):
            found = torch.func.functional_call(layer, dict(zip(names, values)), given)
        return tuple(y for y in tree_leaves(found) if y is not None)

    assert torch.autograd.gradcheck(outputs, (*parameters, *leaves), fast_mode=True)


@pytest.mark.parametrize("name", ALONE)
def test_compiled_whole(name):
    torch._dynamo.reset()
    layer, inputs = CASES[name].layer(), CASES[name].inputs(4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, layer):
        layer.zero_grad()
        with bf.sampling(layer, 2, seed=5):
            y = run(*inputs)
            (tree_leaves(y)[0].square().mean() + bf.kl_divergence(layer)).backward()
        found.append([*tree_leaves(y), *(p.grad for p in layer.parameters())])
    equal(*found)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_beside_parameters_of_32(case, dtype):
    layer, inputs = case.layer(), case.inputs(4)
    with bf.sampling(layer, seed=1):
        found, expected = layer(*tree_map(lambda x: x.to(dtype), inputs)), layer(*inputs)
    for y, true in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), true, rtol=0.05, atol=0.05)


@every
def test_an_empty_batch_and_no_data(case):
    inputs = case.inputs(0)
    for n in (1, 3):
        layer = case.layer()
        with bf.sampling(layer, n, seed=1):
            try:
                expected = case.ordinary()(*inputs)
            except RuntimeError as error:
                pytest.skip(f"torch's module takes no empty batch: {error}"[:100])
            found = layer(*inputs)
        assert [y.shape for y in tree_leaves(found)] == [y.shape for y in tree_leaves(expected)]
        (tree_leaves(found)[0].sum() + bf.kl_divergence(layer)).backward()
    without = case.layer(device="meta")
    found = without(*tree_map(lambda x: x.to("meta"), case.inputs(4)))
    assert [y.shape for y in tree_leaves(found)] == [y.shape for y in tree_leaves(layer(*case.inputs(4)))]
    assert all(y.is_meta for y in tree_leaves(found))
