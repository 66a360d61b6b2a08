"""Embeddings and bags of them: their draws, samples and gradients against torch's modules and the draw of the whole table."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from common import twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast.operators import reference

from .embeddings import CASES, COLUMNS, ROWS, TOKENS, Case, call, every


def test_the_rows_are_those_of_the_whole_draw_bit_by_bit(twin):
    """Where sigma is exactly 1 and mu is 0, drawn weights are the noise."""
    mu, key = torch.zeros(300, 70), torch.tensor([-5, 2 ** 32 - 3])
    table = bf.functional.sample_normal(mu, mu, key, scale="exp", kl=None, n_samples=3, stream=1)[0]
    rows, samples = torch.randint(300, (500,)), torch.randint(3, (500,))
    found = reference.sample_rows(mu, mu, rows, samples, key, scale="exp", stream=1)
    assert torch.equal(found, table[samples, rows])


@pytest.mark.parametrize("columns", [64, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", bf.checks.SCALES)
def test_drawn_rows_are_those_of_the_drawn_table_to_the_last_bit(scale, dtype, columns, twin):
    torch.manual_seed(0)
    layer, tokens = bf.VariationalEmbedding(500, columns, scale=scale, init_sigma=0.5, dtype=dtype), torch.randint(500, (400,))
    nn.init.normal_(layer.weight_rho, -2.0, 2.0)
    with bf.sampling(layer, 2, seed=3):
        found = layer(tokens)
    assert found.requires_grad
    for s, half in enumerate(tokens.chunk(2)):
        assert torch.equal(found.chunk(2)[s], bf.draw(layer, seed=3, first_sample=s)(half))


@every
def test_a_draw_is_torchs_module(case):
    layer = case.layer().eval()
    with bf.sampling(layer, seed=3):
        drawn = bf.draw(layer, seed=3)
        y = call(layer, case.inputs)
    assert repr(drawn) == repr(case.module(drawn.weight)) and type(drawn).__name__ == case.name and not drawn.training
    assert repr(layer).startswith(f"Variational{repr(drawn)[:-1]}, prior=")
    torch.testing.assert_close(y, call(drawn, case.inputs))
    torch.testing.assert_close(y, call(case.module(drawn.weight), case.inputs))
    assert not torch.equal(call(layer, case.inputs), call(layer, case.inputs))


@every
def test_means_and_their_gradients(case):
    layer = case.layer()
    module = case.module(layer.weight_mu)
    with bf.sampling(layer, mean=True):
        y, expected = call(layer, case.inputs), call(module, case.inputs)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert layer.weight_mu.grad.layout == module.weight.grad.layout
    assert torch.equal(layer.weight_mu.grad.to_dense(), module.weight.grad.to_dense())
    assert torch.equal(call(bf.draw(layer, mean=True), case.inputs), y)


@every
def test_samples_are_draws_with_their_gradients(case, twin):
    """Two draws in one call, a batch for each, against torch's modules with the drawn tables."""
    layer = case.layer(dtype=torch.float64, scale="exp")
    inputs = case.in_dtype(torch.float64)
    case = Case(case.name, inputs, **case.settings)
    with bf.sampling(layer, 2, seed=1):
        y = call(layer, inputs)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view_as(y)
    (y * weight).sum().backward()
    mu, rho = torch.zeros_like(layer.weight_mu), torch.zeros_like(layer.weight_rho)
    for s, half in enumerate(case.halves()):
        module = case.module(bf.draw(layer, 1, first_sample=s).weight, scale_grad_by_freq=False)
        expected = call(module, half)
        torch.testing.assert_close(y.chunk(2)[s], expected)
        (expected * weight.chunk(2)[s]).sum().backward()
        gradient = module.weight.grad.to_dense()
        if layer.scale_grad_by_freq:    # by its definition: that of torch's bags counts other rows' in torch 2.13 on the CPU
            gradient /= half[0].flatten().bincount(minlength=ROWS).clamp(min=1).unsqueeze(1)
        mu += gradient
        rho += gradient * (module.weight - layer.weight_mu)    # sigma eps, with sigma = e^rho
    assert layer.weight_mu.grad.is_sparse == layer.weight_rho.grad.is_sparse == layer.sparse
    torch.testing.assert_close(layer.weight_mu.grad.to_dense(), mu)
    torch.testing.assert_close(layer.weight_rho.grad.to_dense(), rho.detach())


@pytest.mark.parametrize("name", ["Embedding", "Bag, weights", "Bag, offsets and weights"])
def test_gradcheck(name, twin):
    layer, inputs = CASES[name].layer(dtype=torch.float64), CASES[name].in_dtype(torch.float64)
    weights = [x.requires_grad_() for x in inputs if x.is_floating_point()]

    def outputs(mu, rho, *weights):
        with bf.sampling(layer, 2, seed=1):
            given = (*(x for x in inputs if not x.is_floating_point()),), {"per_sample_weights": w for w in weights}
            return torch.func.functional_call(layer, {"weight_mu": mu, "weight_rho": rho}, *given)

    assert torch.autograd.gradcheck(outputs, (layer.weight_mu, layer.weight_rho, *weights), fast_mode=True)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast(case, dtype):
    layer = case.layer()
    with bf.sampling(layer, seed=1):
        expected = call(layer, case.inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(layer, case.inputs), expected)   # as torch's embeddings, which autocast leaves alone
        y = call(layer.to(dtype), case.in_dtype(dtype))
        assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@every
def test_copies_checkpoints_and_meta(case, tmp_path):
    layer = case.layer(kl="sampled")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), case.layer(kl="sampled", device="meta").to_empty(device="cpu")):
        other.load_state_dict(layer.state_dict())
        with bf.sampling(layer, seed=1):
            y = call(layer, case.inputs)
        with bf.sampling(other, seed=1):
            assert torch.equal(call(other, case.inputs), y)
    assert call(case.layer(device="meta"), [x.to("meta") for x in case.inputs]).is_meta


@every
def test_an_empty_batch(case):
    layer, inputs = case.layer(), [x[:0] for x in case.inputs]
    if case.settings.get("include_last_offset"):
        inputs[1] = torch.tensor([0])
    for n in (1, 3):
        with bf.sampling(layer, n, seed=1):
            y = call(layer, inputs)
        assert y.shape == (0, *inputs[0].shape[1:], COLUMNS) if case.name == "Embedding" else y.shape == (0, COLUMNS)
        (y.sum() + bf.kl_divergence(layer)).backward()


def test_in_a_model(twin):
    torch.manual_seed(0)
    model = nn.Sequential(bf.VariationalEmbedding(ROWS, COLUMNS, padding_idx=0, init_sigma=0.2), nn.Flatten(),
                          bf.VariationalLinear(3 * COLUMNS, 2))
    many = bf.mc_forward(model, TOKENS, 5, seed=1)
    for s in range(5):
        torch.testing.assert_close(bf.draw(model, 1, first_sample=s)(TOKENS), many[s])
    torch.testing.assert_close(bf.predict(model, TOKENS, n_samples=5, seed=1).samples, many)
    torch.testing.assert_close(bf.mc_forward(model, TOKENS, 5, seed=1, vectorized=False), many)
    bf.freeze(model)
    assert torch.equal(model(TOKENS), model(TOKENS))
    bf.unfreeze(model)
    with bf.plain():
        torch.testing.assert_close(bf.mc_forward(model, TOKENS, 5, seed=1), many)
    assert bf.prune(model, 0.5) == round(0.5 * (ROWS * COLUMNS + 6 * COLUMNS + 2))
    assert torch.equal(bf.draw(model, 1)[0].weight == 0, model[0].weight_rho == -torch.inf)


@pytest.mark.cuda
@every
def test_on_a_gpu(case):
    layer = case.layer()
    with bf.sampling(layer, 2, seed=1):
        expected = call(layer, case.inputs)
    layer.cuda()
    with bf.sampling(layer, 2, seed=1):
        y = call(layer, [x.cuda() for x in case.inputs])
    torch.testing.assert_close(y.cpu(), expected)
    (y.square().sum() + bf.kl_divergence(layer)).backward()
    assert layer.weight_rho.grad.is_cuda and layer.weight_rho.grad.isfinite().all()
