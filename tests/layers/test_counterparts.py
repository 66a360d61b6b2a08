"""Counterparts of torch's modules: their draws, samples, KL and gradients against those modules."""
from __future__ import annotations

import copy

import pytest
import torch
from common import twin  # noqa: F401
from torch import distributions, nn

import bnn_fast as bf

from .counterparts import CASES, PLAIN

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
plain = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)


def layer_of(case, **options) -> bf.VariationalLayer:
    torch.manual_seed(0)
    layer = case.make(**{"init_sigma": 0.2, **options})
    with torch.no_grad():
        for pair in layer.pairs():
            pair.mu.add_(torch.randn_like(pair.mu), alpha=0.1)   # no gain of 1, no bias of 0
    return layer


def repeated(inputs, n_samples: int) -> list:
    return [x.repeat(n_samples, *[1] * (x.dim() - 1)) for x in inputs]


@every
def test_a_draw_is_torchs_module(case):
    layer, inputs = layer_of(case), case.inputs()
    with bf.sampling(layer, seed=3):
        module = case.module(layer, layer.weights(layer.drawing_mode().key))
        drawn = bf.draw(layer, seed=3)
        expected, state = module(*inputs), module.state_dict()
        y = layer(*inputs)
    assert type(drawn) is type(module) and repr(drawn) == repr(module) and drawn.training
    assert torch.equal(y, expected) and torch.equal(drawn(*inputs), expected)
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, state[name.removeprefix("module.")])
    layer.eval(), module.eval()
    with bf.sampling(layer, seed=3):
        assert torch.equal(layer(*inputs), module(*inputs))
    assert not bf.draw(layer, 3).training
    assert not torch.equal(layer(*inputs), layer(*inputs))


@every
def test_means(case):
    layer, inputs = layer_of(case), case.inputs()
    module = case.module(layer, {pair.name: pair.mu for pair in layer.pairs()})
    with bf.sampling(layer, mean=True):
        assert torch.equal(layer(*inputs), module(*inputs))
    assert torch.equal(bf.draw(layer, mean=True).eval()(*inputs), module.eval()(*inputs))


@every
@pytest.mark.parametrize("training", [True, False])
def test_samples_are_draws(case, training):
    layer, inputs, n = layer_of(case).train(training), case.inputs(), 3
    inputs = [torch.cat([x, 2 * x, x - 1]) for x in inputs]   # another batch for each
    before = copy.deepcopy(dict(layer.named_buffers()))
    with bf.sampling(layer, n, seed=1):
        many = layer(*inputs).unflatten(0, (n, -1))
    after = copy.deepcopy(dict(layer.named_buffers()))
    for name, buffer in layer.named_buffers():
        buffer.copy_(before[name])
    for s in range(n):
        with bf.sampling(layer, seed=1, first_sample=s):
            one = layer(*(x.chunk(n)[s] for x in inputs))
        torch.testing.assert_close(many[s], one)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, after[name], rtol=0, atol=0)


@every
def test_predictions(case):
    layer, inputs = layer_of(case), case.inputs()
    model = nn.Sequential(layer) if len(inputs) == 1 else Joined(layer, inputs[1])
    with torch.no_grad():
        layer(*inputs)     # running statistics
    assert layer.training
    many = bf.predict(model, inputs[0], n_samples=4, seed=1)
    model.eval()
    expected = torch.stack([bf.draw(model, 1, first_sample=s)(inputs[0]) for s in range(4)])
    torch.testing.assert_close(many.samples, expected)
    torch.testing.assert_close(bf.mc_forward(model, inputs[0], 4, seed=1), expected)


class Joined(nn.Module):
    def __init__(self, layer, other):
        super().__init__()
        self.layer, self.other = layer, other

    def forward(self, x):
        return self.layer(x, self.other.repeat(len(x) // len(self.other), *[1] * (self.other.dim() - 1)))


@every
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_kl_and_gradients_against_autograd(case, kl):
    prior = bf.Normal(0.1, 0.7)
    layer = layer_of(case, kl=kl, prior=prior, bias_prior=bf.Normal(-0.2, 0.4), scale="exp", dtype=torch.float64)
    inputs = [x.requires_grad_() for x in case.inputs(dtype=torch.float64)]
    module = case.module(layer, {pair.name: pair.mu for pair in layer.pairs()})
    with bf.sampling(layer, seed=5):
        drawn = layer.weights(layer.drawing_mode().key)
        y = layer(*inputs)
        divergence = bf.kl_divergence(layer)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view_as(y)
    tensors = [*layer.parameters(), *inputs]
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad((y * weight).sum() + divergence / 10, tensors)

    state, expected_kl = {}, 0.0
    for pair in layer.pairs():
        sigma = pair.rho.exp()
        noise = ((drawn[pair.name] - pair.mu) / sigma).detach()
        w = pair.mu + sigma * noise
        state.update(dict.fromkeys(getattr(layer, "_places", {pair.name: [pair.name]})[pair.name], w))
        q, p = distributions.Normal(pair.mu, sigma), distributions.Normal(*((-0.2, 0.4) if "bias" in pair.name else (0.1, 0.7)))
        expected_kl += (distributions.kl_divergence(q, p) if kl == "analytic" else q.log_prob(w) - p.log_prob(w)).sum()
    expected = torch.func.functional_call(module, state, tuple(inputs), tie_weights=False)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(divergence, expected_kl)
    for name, a, b in zip(names + ["input"] * 2, found, torch.autograd.grad((expected * weight).sum() + expected_kl / 10, tensors)):
        torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")


@every
def test_gradcheck(case, twin):
    n_samples = 2
    layer = layer_of(case, dtype=torch.float64).eval()
    inputs = [x.requires_grad_() for x in repeated(case.inputs(batch=2, dtype=torch.float64), n_samples)]
    names, parameters = zip(*layer.named_parameters())

    def outputs(*values):
        with bf.sampling(layer, n_samples, seed=1):
            return torch.func.functional_call(layer, dict(zip(names, values)), tuple(values[len(names):]))

    assert torch.autograd.gradcheck(outputs, (*parameters, *inputs), fast_mode=True)


@pytest.mark.parametrize("name", ["Conv2d", "Conv1d circular", "ConvTranspose1d", "Bilinear", "LayerNorm", "GroupNorm", "BatchNorm2d",
                                  "Variational, tied"])
def test_compiled_whole(name):
    case = CASES[name]
    torch._dynamo.reset()
    layer, inputs = layer_of(case), repeated(case.inputs(), 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with bf.sampling(layer, 2, seed=5):
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    torch.manual_seed(1)
    (compiled(*inputs).square().mean() + bf.kl_divergence(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every
def test_autocast(case):
    layer, inputs = layer_of(case), case.inputs()
    module = case.module(layer, {pair.name: pair.mu for pair in layer.pairs()})
    for given in ([x.bfloat16() for x in inputs], inputs):
        with torch.autocast("cpu", torch.bfloat16), bf.sampling(layer, mean=True):
            # torch's Bilinear, which autocast has no word for on the CPU, takes one dtype alone
            y, expected = layer(*given), module(*(x.float() if isinstance(module, nn.Bilinear) else x for x in given))
        assert y.dtype == expected.dtype and torch.equal(y, expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*inputs)
        (y.float().square().mean() + bf.kl_divergence(layer)).backward()
    assert y.dtype == expected.dtype and all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for name, case in CASES.items() if not name.startswith("Variational")],
                         ids=[name for name in CASES if not name.startswith("Variational")])
def test_inputs_of_16_bits_beside_parameters_of_32(case, dtype):
    layer, inputs = layer_of(case).eval(), case.inputs()
    with bf.sampling(layer, seed=1):
        y, expected = layer(*(x.to(dtype) for x in inputs)), layer(*inputs)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@every
def test_on_a_gpu(case):
    layer, inputs = layer_of(case).eval(), repeated(case.inputs(), 2)
    with bf.sampling(layer, 2, seed=1):
        expected = layer(*inputs)
    layer.cuda()
    with bf.sampling(layer, 2, seed=1):
        y = layer(*(x.cuda() for x in inputs))
    torch.testing.assert_close(y.cpu(), expected, rtol=0.01, atol=0.01)     # TensorFloat-32
    (y.square().sum() + bf.kl_divergence(layer)).backward()
    assert all(p.grad.is_cuda and p.grad.isfinite().all() for p in layer.parameters())
    assert next(bf.draw(layer, seed=1).parameters()).is_cuda


@plain
def test_without_weights(case):
    layer, inputs, module = case.make(), case.inputs(), case.ordinary()
    assert torch.equal(layer(*inputs), module(*inputs)) and torch.equal(layer.eval()(*inputs), module.eval()(*inputs))
    drawn = bf.draw(layer.train(), seed=0)
    assert type(drawn) is type(module) and drawn.training and not list(layer.parameters())
    assert torch.equal(drawn.eval()(*inputs), module(*inputs))
    model = nn.Sequential(layer, nn.Flatten(), bf.VariationalLinear(inputs[0][0].numel(), 2))
    with bf.sampling(model, 2, seed=1):
        model(repeated(inputs, 2)[0])
    bf.freeze(model), bf.unfreeze(model)
    model.eval()
    torch.testing.assert_close(bf.predict(model, inputs[0], n_samples=3, seed=1).samples,
                               bf.mc_forward(model, inputs[0], 3, seed=1))
    assert bf.kl_divergence(model) > 0 and layer.posterior() == {}
    with pytest.warns(UserWarning, match="expected variational layers"):
        assert bf.kl_divergence(nn.Sequential(layer)) == 0
