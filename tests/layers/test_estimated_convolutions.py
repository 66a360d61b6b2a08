"""Convolutions with the estimators "local" and "flipout", against their formulas with the noise of the reference."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import gradients, needs_extension, twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast.operators.noise import random_signs, standard_normal

both = pytest.mark.parametrize("estimator", ["local", "flipout"])
CASES = {
    "1-d": (lambda **o: bf.VariationalConv1d(4, 6, 3, stride=2, padding=1, groups=2, **o), (9,)),
    "2-d": (lambda **o: bf.VariationalConv2d(4, 3, (3, 2), dilation=(1, 2), bias=False, **o), (6, 7)),
    "2-d, same, circular": (lambda **o: bf.VariationalConv2d(4, 6, 3, padding="same", padding_mode="circular", **o), (5, 6)),
    "3-d": (lambda **o: bf.VariationalConv3d(4, 2, 2, padding=1, **o), (3, 2, 4)),
    "transposed": (lambda **o: bf.VariationalConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1, **o), (3, 4)),
}


def layer_of(case, estimator, **options):
    torch.manual_seed(0)
    make, space = CASES[case]
    options = {"init_sigma": 0.3, "dtype": torch.float64, **options}
    return make(estimator=estimator, **options), torch.randn(5, 4, *space, dtype=options["dtype"])


def expected(layer, x, key, n_samples: int):
    """[S, B, ...] by torch's convolution, one example and draw at a time."""
    pairs = {pair.name: (pair.mu, F.softplus(pair.rho)) for pair in layer.pairs()}
    mu, sigma = pairs["weight"]
    bias_mu, bias_sigma = pairs.get("bias", (None, None))
    module = bf.draw(layer, mean=True)

    def convolve(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight} if bias is None else {"weight": weight, "bias": bias}, (x,))

    zero, dtype = None if bias_mu is None else torch.zeros_like(bias_mu), x.dtype
    noise = standard_normal(key, n_samples, mu.shape[0], mu[0].numel(), dtype=dtype).reshape(n_samples, *mu.shape)
    of_bias = None if zero is None else standard_normal(key, n_samples, 1, len(zero), stream=1, dtype=dtype)
    r, s = (random_signs(key, n_samples, len(x), n, stream=stream, dtype=dtype) for stream, n in ((4, layer.out_channels), (3, 4)))
    outputs = []
    for i in range(n_samples):
        for b in range(len(x)):
            one = x[b:b + 1]
            y = convolve(one, mu, bias_mu)
            if layer.estimator == "local":
                v = convolve(one.square(), sigma.square(), None if zero is None else bias_sigma.square())
                eps = standard_normal(key, n_samples, len(x), y.numel(), stream=2, dtype=dtype)[i, b].reshape(y.shape)
                outputs.append(y + v.sqrt() * eps)
                continue
            places = (1,) * (x.dim() - 2)
            more = convolve(one * s[i, b].reshape(1, -1, *places), sigma * noise[i], zero) * r[i, b].reshape(1, -1, *places)
            if zero is not None:
                more = more + (bias_sigma * of_bias[i, 0]).reshape(1, -1, *places)
            outputs.append(y + more)
    return torch.cat(outputs).unflatten(0, (n_samples, len(x)))


@both
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_samples", [1, 3])
def test_outputs_and_gradients(case, estimator, n_samples, twin):  # noqa: F811
    layer, x = layer_of(case, estimator)
    x.requires_grad_()
    with bf.inference.sampling.Draws(layer, n_samples, 3):
        key = layer.drawing_mode().key
    y, wanted = bf.mc_forward(layer, x, n_samples, seed=3), expected(layer, x, key, n_samples)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(bf.mc_forward(layer, x, n_samples, seed=3, vectorized=False), wanted)
    g, inputs = torch.randn_like(y), [x, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g))


@both
def test_mean_and_variance_are_those_of_weights(estimator):
    layer, x = layer_of("1-d", estimator)
    y = bf.mc_forward(layer, x, 4000, seed=1)
    module = bf.draw(layer, mean=True)
    mean, spread = module(x), torch.func.functional_call(module, {
        pair.name: F.softplus(pair.rho).square() for pair in layer.pairs()}, (x.square(),)).sqrt()
    assert ((y.mean(0) - mean) / spread).abs().max() < 5 / 4000 ** 0.5
    torch.testing.assert_close(y.std(0), spread, rtol=0.08, atol=0.0)
    apart = (y[:, 0] * y[:, 1]).mean(0) - mean[0] * mean[1]     # of two examples: what "weight" would have
    bias = 0.09 if estimator == "flipout" else 0.0              # which is drawn once for all
    assert (apart - bias).abs().max() < 0.2


@both
def test_what_pins_a_network_draws_weights(estimator):
    layer, x = layer_of("1-d", estimator)
    for n_samples in (1, 4):
        with bf.sampling(layer, n_samples, seed=3):
            y = layer(x.repeat(n_samples, 1, 1))
        torch.testing.assert_close(y[-5:], bf.draw(layer, 3, first_sample=n_samples - 1)(x))
    torch.testing.assert_close(bf.predict(layer, x, n_samples=3, seed=3, joint=True).samples[1], bf.draw(layer, 3, first_sample=1)(x))
    bf.freeze(layer)
    torch.testing.assert_close(layer(x), bf.draw(layer)(x))
    bf.unfreeze(layer)
    assert not torch.equal(layer(x), layer(x))


@both
def test_chunks_change_nothing_and_a_second_call_is_refused(estimator):
    layer, x = layer_of("2-d, same, circular", estimator)
    whole = bf.predict(layer, x, n_samples=7, seed=1).samples
    for options in (dict(batch_size=2), dict(vectorized=False, batch_size=3), dict(batch_size=20)):
        torch.testing.assert_close(bf.predict(layer, x, n_samples=7, seed=1, **options).samples, whole)
    back = bf.VariationalConv2d(6, 4, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"estimator='{estimator}' is called again under one key"):
        bf.predict(nn.Sequential(layer, back, layer), x, n_samples=2)


@both
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_elbo(estimator, kl):
    layer, x = layer_of("1-d", estimator, kl=kl)
    y = bf.mc_forward(layer, x, 2, seed=5).detach()
    elbo = bf.ELBO(layer, bf.Gaussian(), 100, seed=5)
    elbo(x, torch.zeros_like(y[0]), n_samples=2).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.estimator = "weight"
    with bf.sampling(layer, 2, seed=5), torch.no_grad():
        layer(x.repeat(2, 1, 1))
        torch.testing.assert_close(elbo.kl, bf.kl_divergence(layer))


@both
def test_pruned_weights_are_their_means_and_have_no_gradient(estimator):
    layer, x = layer_of("2-d", estimator)
    bf.prune(layer, 0.5)
    pruned = layer.weight_rho.isneginf()
    bf.mc_forward(layer, x, 2, seed=1).square().sum().backward()
    for parameter in (layer.weight_mu, layer.weight_rho):
        assert (parameter.grad[pruned] == 0.0).all() and (parameter.grad[~pruned] != 0.0).all()
    bf.prune(layer, 1.0)
    assert bf.predict(layer, x, n_samples=5).std.abs().max() == 0.0


@both
def test_one_example_without_a_batch_and_none_at_all(estimator):
    layer, x = layer_of("3-d", estimator)
    assert layer(x[0]).shape == layer(x).shape[1:] and not torch.equal(layer(x[0]), layer(x[0]))
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@both
def test_types(estimator):
    layer, x = layer_of("2-d", estimator, dtype=torch.float32)
    exact = bf.mc_forward(layer, x, 2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bf.mc_forward(layer, x, 2, seed=1)
    assert y.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    half = bf.mc_forward(layer, x.bfloat16(), 2, seed=1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)
    assert layer.to("meta")(x.to("meta")).shape == exact.shape[1:]


@needs_extension
@both
def test_compile(estimator):
    layer, x = layer_of("1-d", estimator)
    target = torch.zeros_like(layer(x)).detach()
    elbo = bf.ELBO(layer, bf.Gaussian(0.3), 100, seed=5)
    elbo(x, target, n_samples=2).backward()
    expected = gradients(layer)
    torch._dynamo.reset()
    torch.compile(elbo, backend="aot_eager", fullgraph=True)(x, target, n_samples=2).backward()
    torch.testing.assert_close(gradients(layer), expected)


@both
def test_options(estimator):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    converted = bf.to_variational(model, options={"2": {"estimator": estimator}})
    assert [layer.estimator for layer in converted[::2]] == ["weight", estimator]
    assert repr(converted[2]).endswith(f", estimator={estimator!r})") and "estimator" not in repr(converted[0])
    with pytest.raises(ValueError, match="estimator: expected one of 'weight', 'local', 'flipout', given 'both'"):
        bf.VariationalConv1d(1, 1, 1, estimator="both")
