"""Embeddings under torch.func, torch.compile and checkpointing, and the derivatives that there are not."""
from __future__ import annotations

import pytest
import torch
from common import needs_extension, twin  # noqa: F401
from torch import nn

import bnn_fast as bf

from .embeddings import CASES, COLUMNS, ROWS, TOKENS, call, every


def loss_of(layer, parameters, tokens):
    return torch.func.functional_call(layer, parameters, (tokens,)).square().sum()


@pytest.mark.parametrize("name", ["Embedding, padding", "Embedding, frequency", "Bag, padding"])
@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.filterwarnings("ignore:There is a performance drop")     # torch's own, of bags
def test_under_torch_func(name, n_samples, twin):
    layer = CASES[name].layer(dtype=torch.float64)
    parameters, batch = {name: p.detach() for name, p in layer.named_parameters()}, torch.stack([TOKENS, TOKENS.flip(0), TOKENS.clamp(max=3)])
    with bf.sampling(layer, n_samples, seed=4):
        torch.testing.assert_close(torch.func.vmap(layer)(batch), torch.stack([layer(one) for one in batch]))
        found = torch.func.vmap(torch.func.grad(loss_of, argnums=1), in_dims=(None, None, 0))(layer, parameters, batch)
        for i, one in enumerate(batch):
            layer.zero_grad()
            layer(one).square().sum().backward()
            torch.testing.assert_close([f[i] for f in found.values()], [p.grad for p in layer.parameters()])
        stacked = {name: torch.stack((p, 2 * p)) for name, p in parameters.items()}
        values = torch.func.vmap(loss_of, in_dims=(None, 0, None))(layer, stacked, TOKENS)
        for i, value in enumerate(values):
            torch.testing.assert_close(value, loss_of(layer, {name: p[i] for name, p in stacked.items()}, TOKENS))


@needs_extension
def test_derivatives_that_there_are_not_are_refused():
    layer, sparse = CASES["Embedding"].layer(dtype=torch.float64), CASES["Embedding, sparse"].layer()
    for one in (layer, sparse):
        gradients = torch.autograd.grad(one(TOKENS).square().sum(), list(one.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            sum(g.to_dense().sum() for g in gradients).backward()
    with bf.sampling(layer, seed=4):
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(lambda p: loss_of(layer, p, TOKENS), (parameters,), (parameters,))
        with bf.plain():
            second = torch.func.jacrev(torch.func.jacrev(lambda mu: loss_of(layer, {**parameters, "weight_mu": mu}, TOKENS)))(parameters["weight_mu"])
    assert (second.flatten(2).flatten(0, 1).diagonal() == 2.0 * TOKENS.flatten().bincount(minlength=ROWS).repeat_interleave(COLUMNS)).all()


@pytest.mark.parametrize("name", ["Embedding, padding", "Bag, weights", "Bag, offsets"])
def test_compiled_whole(name):
    torch._dynamo.reset()
    case = CASES[name]
    layer = case.layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, layer):
        layer.zero_grad()
        with bf.sampling(layer, 2, seed=5):
            y = call(run, case.inputs)
        y.square().sum().backward()
        found.append((y.detach(), layer.weight_mu.grad.to_dense(), layer.weight_rho.grad.to_dense()))
        assert layer.weight_mu.grad.is_sparse == layer.sparse
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["Embedding, sparse", "Bag"])
def test_batches_of_several_sizes_are_compiled_once(name):
    """With the KL of the rows looked up, which counts by the size of the batch."""
    torch._dynamo.reset()
    layer, graphs = CASES[name].layer(kl_rows="batch", row_counts=torch.ones(ROWS, dtype=torch.int64), n_data=100), []

    def loss(tokens):
        return layer(tokens).square().sum() + bf.kl_divergence(layer)

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for batch in (4, 6, 9, 2):
        tokens = torch.randint(ROWS, (batch, 3))
        found = []
        for run in (compiled, loss):
            layer.zero_grad()
            with bf.sampling(layer, seed=5):
                value = run(tokens)
            value.backward()
            found.append((value.detach(), layer.weight_mu.grad.to_dense(), layer.weight_rho.grad.to_dense()))
        torch.testing.assert_close(*found)
    assert len(graphs) == 1


@every
def test_recomputed_under_checkpointing(case):
    layer = case.layer()
    outer = nn.Linear(COLUMNS, 2)
    found = []
    for checkpointed in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)

        def run(*inputs):
            return outer(call(layer, inputs)).square().sum()

        loss = torch.utils.checkpoint.checkpoint(run, *case.inputs, use_reentrant=False) if checkpointed else run(*case.inputs)
        loss.backward()
        found.append((loss.detach(), layer.weight_mu.grad.to_dense(), layer.weight_rho.grad.to_dense()))
    for a, b in zip(*found):
        assert torch.equal(a, b)
