"""Recurrences and attention: draws, samples, KL and gradients against torch's modules."""
from __future__ import annotations

import copy
import pickle
from typing import Callable, NamedTuple

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import bnn_fast as bf


class Case(NamedTuple):
    name: str
    options: dict
    inputs: Callable[..., tuple]    # of the batch
    batch_at: tuple                 # the batch's dimension in each tensor of the output

    def layer(self, **options) -> bf.VariationalLayer:
        torch.manual_seed(0)
        return getattr(bf, f"Variational{self.name}")(**self.options, **{"init_sigma": 0.2, **options})

    def ordinary(self, **options) -> nn.Module:
        return getattr(nn, self.name)(**self.options, **options)


def tensors(*shapes: tuple[int, ...]) -> Callable[..., tuple]:
    """Inputs of these shapes, "B" being the batch; several in a tuple are a state."""
    def make(batch: int, seed: int = 0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)

        def one(shape):
            if isinstance(shape[0], tuple):
                return tuple(one(each) for each in shape)
            sizes = [batch if size == "B" else size for size in shape]
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
        return tuple(one(shape) for shape in shapes)
    return make


SELF = dict(embed_dim=8, num_heads=2)
CASES = {
    "RNN": Case("RNN", dict(input_size=3, hidden_size=4), tensors((5, "B", 3)), (1, 1)),
    "RNN relu": Case("RNN", dict(input_size=3, hidden_size=4, nonlinearity="relu", bias=False, batch_first=True),
                     tensors(("B", 5, 3), (1, "B", 4)), (0, 1)),
    "LSTM": Case("LSTM", dict(input_size=3, hidden_size=4, num_layers=2, batch_first=True, bidirectional=True),
                 tensors(("B", 5, 3)), (0, 1, 1)),
    "LSTM proj": Case("LSTM", dict(input_size=3, hidden_size=4, proj_size=2), tensors((5, "B", 3), ((1, "B", 2), (1, "B", 4))),
                      (1, 1, 1)),
    "GRU": Case("GRU", dict(input_size=3, hidden_size=4, num_layers=2, batch_first=True), tensors(("B", 5, 3)), (0, 1)),
    "RNNCell": Case("RNNCell", dict(input_size=3, hidden_size=4), tensors(("B", 3), ("B", 4)), (0,)),
    "RNNCell relu": Case("RNNCell", dict(input_size=3, hidden_size=4, bias=False, nonlinearity="relu"), tensors(("B", 3)), (0,)),
    "LSTMCell": Case("LSTMCell", dict(input_size=3, hidden_size=4), tensors(("B", 3), (("B", 4), ("B", 4))), (0, 0)),
    "GRUCell": Case("GRUCell", dict(input_size=3, hidden_size=4), tensors(("B", 3)), (0,)),
    "attention": Case("MultiheadAttention", {**SELF, "batch_first": True},
                      tensors(("B", 5, 8), ("B", 6, 8), ("B", 6, 8)), (0, 0)),
    "attention, time first": Case("MultiheadAttention", {**SELF, "kdim": 3, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
                                  tensors((5, "B", 8), (6, "B", 3), (6, "B", 5)), (1, 0)),
    "attention, no bias": Case("MultiheadAttention", {**SELF, "bias": False}, tensors((5, "B", 8), (5, "B", 8), (5, "B", 8)), (1, 0)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def state_name(layer: bf.VariationalLayer, pair: str) -> str:
    return pair.replace("out_proj_", "out_proj.")


def module_with(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    module = case.ordinary(dtype=next(iter(weights.values())).dtype)
    module.load_state_dict({state_name(module, name): w.detach() for name, w in weights.items()})
    return module


def equal(found, expected, **tolerance) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **tolerance)


@every
def test_a_draw_is_torchs_module(case):
    layer, inputs = case.layer(), case.inputs(4)
    with bf.sampling(layer, seed=3):
        module = module_with(case, layer.weights(layer.drawing_mode().key))
        y, drawn = layer(*inputs), bf.draw(layer, seed=3)
    assert type(drawn) is type(module) and repr(drawn) == repr(module)
    equal(y, module(*inputs))
    equal(drawn(*inputs), module(*inputs), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        equal(layer(*inputs), layer(*inputs))
    with bf.sampling(layer, mean=True):
        equal(layer(*inputs), module_with(case, {pair.name: pair.mu for pair in layer.pairs()})(*inputs))


@every
def test_samples_are_draws(case):
    layer, inputs = case.layer(), case.inputs(6)
    places = iter(case.batch_at)
    with bf.sampling(layer, 3, seed=1):
        many = tree_leaves(layer(*inputs))
    parts = [one.chunk(3, next(places)) for one in many]
    inputs_at = [1 if x.dim() == 3 and not layer_batch_first(layer) else 0 for x in inputs if isinstance(x, Tensor)]
    for s in range(3):
        own = tuple(part(x, s, at) for x, at in zip(inputs, [*inputs_at, *[1] * 3]))
        with bf.sampling(layer, seed=1, first_sample=s):
            equal([each[s] for each in parts], layer(*own))


def layer_batch_first(layer) -> bool:
    return getattr(layer, "batch_first", True)


def part(x, s: int, at: int):
    if isinstance(x, tuple):
        return tuple(each.chunk(3, each.dim() - 2)[s] for each in x)
    return x.chunk(3, 1 if x.shape[0] in (1, 2) and x.dim() == 3 else at)[s]


@every
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_kl_and_gradients_against_autograd(case, kl):
    layer = case.layer(kl=kl, prior=bf.Normal(0.1, 0.7), bias_prior=bf.Normal(-0.2, 0.4), scale="exp", dtype=torch.float64)
    inputs = case.inputs(3, dtype=torch.float64)
    with bf.sampling(layer, seed=5):
        drawn = layer.weights(layer.drawing_mode().key)
        y = tree_leaves(layer(*inputs))[0]
        divergence = bf.kl_divergence(layer)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view_as(y)
    found = torch.autograd.grad((y * weight).sum() + divergence / 10, list(layer.parameters()))
    state, expected_kl = {}, 0.0
    for pair in layer.pairs():
        sigma = pair.rho.exp()
        w = pair.mu + sigma * ((drawn[pair.name] - pair.mu) / sigma).detach()
        state[pair.name] = w
        q, p = distributions.Normal(pair.mu, sigma), distributions.Normal(*((-0.2, 0.4) if "bias" in pair.name else (0.1, 0.7)))
        expected_kl += (distributions.kl_divergence(q, p) if kl == "analytic" else q.log_prob(w) - p.log_prob(w)).sum()
    torch.testing.assert_close(divergence, expected_kl)
    expected = tree_leaves(layer.compute(state, *inputs))[0]     # which test_a_draw_is_torchs_module holds against torch's
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, torch.autograd.grad((expected * weight).sum() + expected_kl / 10, list(layer.parameters()))):
        torch.testing.assert_close(a, b)


@every
def test_copies_pickles_and_checkpoints(case):
    layer, inputs = case.layer(), case.inputs(4)
    other = case.layer()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(layer.state_dict())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        with bf.sampling(again, seed=2), bf.sampling(layer, seed=2):
            equal(again(*inputs), layer(*inputs), rtol=0, atol=0)
    assert case.layer(device="meta").tensors()[0].is_meta
    with torch.autocast("cpu", torch.bfloat16):
        try:
            case.ordinary()(*inputs)
        except RuntimeError as error:
            pytest.skip(f"nn.{case.name} itself does not run under autocast here: {error}"[:100])
        y = tree_leaves(layer(*inputs))[0]
        (y.float().sum() + bf.kl_divergence(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences(kind, batch_first):
    layer = getattr(bf, f"Variational{kind}")(3, 4, 2, bidirectional=True, batch_first=batch_first, init_sigma=0.2)
    rows = [torch.randn(n, 3) for n in (3, 7, 5, 2, 6, 4)]
    with bf.sampling(layer, 2, seed=1):
        output, state = layer(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output, batch_first)
    assert lengths.tolist() == [3, 7, 5, 2, 6, 4]
    for s in range(2):
        drawn = bf.draw(layer, seed=1, first_sample=s)
        expected, final = drawn(pack_sequence(rows[3 * s:3 * s + 3], enforce_sorted=False))
        expected = pad_packed_sequence(expected, batch_first, total_length=7)[0]
        at = 0 if batch_first else 1
        equal(padded.chunk(2, at)[s], expected)
        equal([each.chunk(2, 1)[s] for each in tree_leaves(state)], tree_leaves(final))


def test_dropout_between_layers_follows_the_mode():
    layer, x = bf.VariationalLSTM(3, 8, 2, dropout=0.9, batch_first=True), torch.randn(4, 5, 3)
    with bf.sampling(layer, seed=1):
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        assert torch.equal(layer(x)[0], layer(x)[0])
    assert not bf.draw(layer, seed=1).training


def test_masks_of_attention():
    layer = bf.VariationalMultiheadAttention(8, 2, batch_first=True, init_sigma=0.1)
    x, padding = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    of_heads = torch.randn(8, 5, 5)
    for masks in ({"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True, "need_weights": False},
                  {"attn_mask": of_heads, "average_attn_weights": False}, {"attn_mask": of_heads, "need_weights": False}):
        with bf.sampling(layer, 2, seed=1):
            y, attention = layer(x, x, x, **masks)
        for s in range(2):
            own = {name: value[4 * s:4 * s + 4] if name == "attn_mask" and value.dim() == 3 else
                   value[2 * s:2 * s + 2] if name == "key_padding_mask" else value for name, value in masks.items()}
            expected, weights = bf.draw(layer, 1, first_sample=s)(*[x[2 * s:2 * s + 2]] * 3, **own)
            torch.testing.assert_close(y[2 * s:2 * s + 2], expected)
            assert (attention is None) == (weights is None)
            if weights is not None:
                torch.testing.assert_close(attention[2 * s:2 * s + 2], weights)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_torchs_transformer(batch_first):
    def encoder():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
        layer.self_attn = bf.VariationalMultiheadAttention(8, 2, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model, x = encoder(), torch.randn(4, 5, 8)
    (model(x).square().mean() + bf.kl_divergence(model)).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
    found = bf.predict(model, x, n_samples=3, seed=1, vectorized=batch_first).samples
    torch.testing.assert_close(found, torch.stack([bf.draw(model, 1, first_sample=s)(x) for s in range(3)]), rtol=1e-4, atol=1e-5)


def test_a_forecaster_predicts():
    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = bf.VariationalLSTM(1, 8, batch_first=True), bf.VariationalLinear(8, 1)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model, x = Forecaster(), torch.randn(6, 10, 1)
    bf.ELBO(model, bf.Gaussian(0.1), 60)(x, torch.zeros(6, 1), 2).backward()
    torch.testing.assert_close(bf.predict(model, x, n_samples=4, seed=0).samples, bf.mc_forward(model, x, 4, seed=0))
    assert set(bf.posterior(model)) >= {"lstm.weight_ih_l0", "lstm.bias_hh_l0", "head.weight"}


@pytest.mark.parametrize("call, error, message", [
    (lambda: bf.VariationalLSTM(3, 4)(torch.zeros(5, 2, 4)), ValueError, r"input: expected 2 or 3 dimensions, the last of 3 \(input_size\)"),
    (lambda: bf.VariationalLSTM(3, 4)([1]), TypeError, "input: expected a tensor"),
    (lambda: bf.VariationalGRU(3, 4)(torch.zeros(5, 2, 3, dtype=torch.float64)), TypeError, "input: expected torch.float32"),
    (lambda: within(bf.VariationalGRU(3, 4), 2, torch.zeros(6, 3, 3)), ValueError, "dimension 1 to be the batch repeated n_samples=2"),
    (lambda: within(bf.VariationalGRU(3, 4), 2, torch.zeros(6, 3)), ValueError, "batch repeated n_samples=2"),
    (lambda: bf.VariationalRNN(3, 4, nonlinearity="sin"), ValueError, "nonlinearity: expected one of 'tanh', 'relu'"),
    (lambda: bf.VariationalLSTM(0, 4), ValueError, "input_size: expected at least 1, given 0"),
    (lambda: bf.VariationalLSTMCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4)), TypeError, r"hx: expected a tuple \(h, c\)"),
    (lambda: bf.VariationalGRUCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 5)), ValueError, r"hx: expected \[2, 4\], given"),
    (lambda: bf.VariationalRNNCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4).double()), TypeError, "hx: expected torch.float32"),
    (lambda: bf.VariationalGRU(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 3, 4)), ValueError, r"hx: expected \[1, 2, 4\], given"),
    (lambda: bf.VariationalGRU(3, 4)(torch.zeros(5, 3), torch.zeros(1, 1, 4)), ValueError, r"hx: expected \[1, 4\], given"),
    (lambda: bf.VariationalRNN(3, 4)(torch.zeros(5, 2, 3), 0.0), TypeError, r"hx: expected a tensor \[1, 2, 4\], given"),
    (lambda: bf.VariationalLSTM(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)), TypeError, r"hx: expected a tuple \(h, c\)"),
    (lambda: bf.VariationalLSTM(3, 4, 2, bidirectional=True, proj_size=2)(torch.zeros(5, 2, 3), (torch.zeros(4, 2, 4),) * 2), ValueError,
     r"hx: expected \[4, 2, 2\], given"),
    (lambda: bf.VariationalLSTM(3, 4)(torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4, device="meta"),) * 2), ValueError,
     "hx: expected to be on cpu"),
    (lambda: attend(key=torch.zeros(4, 3, 8)), ValueError, "key: expected a batch of 2 as query"),
    (lambda: attend(value=torch.zeros(3, 2, 8)), ValueError, r"value: expected length and batch of key \[4, 2, 8\]"),
    (lambda: attend(key_padding_mask=torch.zeros(4, 2)), ValueError, r"key_padding_mask: expected a tensor \[2, 4\], given"),
    (lambda: attend(attn_mask=torch.zeros(2, 5, 4)), ValueError, r"attn_mask: expected a tensor \[5, 4\] or \[4, 5, 4\], given"),
    (lambda: attend(attn_mask=0.5), ValueError, r"attn_mask: expected a tensor \[5, 4\] or \[4, 5, 4\], given"),
    (lambda: bf.VariationalMultiheadAttention(9, 2), ValueError, "embed_dim: expected a multiple of num_heads=2, given 9"),
    (lambda: bf.VariationalMultiheadAttention(8, 2)(*[torch.zeros(5, 2, 7)] * 3), ValueError, r"query: expected a tensor \[..., 8\]"),
    (lambda: within(bf.VariationalMultiheadAttention(8, 2), 2, *[torch.zeros(5, 8)] * 3), ValueError,
     "query: expected dimension 1 to be the batch repeated")])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def attend(key=torch.zeros(4, 2, 8), value=torch.zeros(4, 2, 8), **masks):
    return bf.VariationalMultiheadAttention(8, 2)(torch.zeros(5, 2, 8), key, value, **masks)


def within(layer, n_samples, *inputs):
    with bf.sampling(layer, n_samples):
        return layer(*inputs)
