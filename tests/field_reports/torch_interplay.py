"""Where torch does something of its own with a layer: encoder layers, inference mode, 16-bit inputs, tracing."""
from __future__ import annotations

import warnings

import pytest
import torch
from common import needs_extension, network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf


def encoder_layer(variational=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    if variational:
        layer.linear1, layer.linear2 = bf.VariationalLinear(4, 8), bf.VariationalLinear(8, 4)
    return layer


def mixed_stack(enable_nested_tensor=True):
    """The first layer is an ordinary one, which decides for the stack."""
    stack = nn.TransformerEncoder(encoder_layer(False), 2, enable_nested_tensor=enable_nested_tensor)
    stack.layers[1] = encoder_layer()
    return stack


TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(5)[None] >= torch.tensor([[5], [3]])
ENCODERS = {
    "layer": (encoder_layer, {}),
    "stack": (lambda: nn.TransformerEncoder(encoder_layer(), 2), {}),
    "padded stack": (lambda: nn.TransformerEncoder(encoder_layer(), 2), dict(src_key_padding_mask=PADDING)),
    "mixed stack": (mixed_stack, {}),
    "padded mixed stack": (lambda: mixed_stack(False), dict(src_key_padding_mask=PADDING)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_transformer_encoders_in_evaluation(twin, name):
    """torch's fused path would take the weights, which there are none of, and call no layer."""
    make, options = ENCODERS[name]
    model = make()
    with bf.sampling(model, seed=1):
        training = model.train()(TOKENS, **options)
        model.eval()
        assert torch.equal(model(TOKENS, **options), training)
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS, **options), training, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(model(TOKENS, **options), training, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model(TOKENS, **options), model(TOKENS, **options))


def test_transformer_encoders_are_predicted(twin):
    model = encoder_layer()
    found = bf.predict(model, TOKENS, n_samples=3, seed=1)
    with torch.no_grad(), bf.sampling(model, seed=1, first_sample=2):
        torch.testing.assert_close(found.samples[2], model(TOKENS), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        means, drawn = bf.predict(model, TOKENS, mean=True).mean, bf.draw(model, 1).eval()
        torch.testing.assert_close(bf.draw(model, mean=True).eval()(TOKENS), means, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(drawn(TOKENS), found.mean, rtol=1.0, atol=1.0)  # torch's fast path, with a weight


@needs_extension
def test_compiled_transformer_encoders():
    torch._dynamo.reset()
    model = encoder_layer().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), bf.sampling(model, seed=1):
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_nested_tensors_are_refused_with_the_remedy():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match="given a nested one.*enable_nested_tensor=False"):
            mixed_stack().eval()(TOKENS, src_key_padding_mask=PADDING)


def test_a_weight_is_nobody_elses():
    layer = bf.VariationalLinear(3, 2)
    assert not hasattr(layer, "weight") and getattr(layer, "bias", None) is None
    with pytest.raises(AttributeError, match="VariationalLinear has no weight: it draws one at every call"):
        nn.functional.linear(torch.zeros(1, 3), layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_at_the_means(twin, dtype):
    layer, x = bf.VariationalLinear(64, 32), torch.randn(8, 64)
    with torch.no_grad():
        layer.weight_rho.fill_(-torch.inf)  # what is drawn is the means, too
        layer.bias_rho.fill_(-torch.inf)
    drawn = layer(x.to(dtype))
    with bf.sampling(layer, mean=True):
        found = layer(x.to(dtype))
        assert found.dtype == drawn.dtype == dtype
        found.float().sum().backward()
        exact = layer(x)
    assert layer.weight_mu.grad.dtype == torch.float32
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.float(), drawn.float(), rtol=0.02, atol=0.02)
    assert bf.predict(layer, x.to(dtype), mean=True).mean.dtype == torch.float32


@pytest.mark.parametrize("forward_first", [False, True])
def test_freeze_under_inference_mode_then_a_step(twin, forward_first):
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    with torch.inference_mode():
        if forward_first:
            model(x)
        bf.freeze(model)
        y = model(x)
    assert not any(layer.frozen_key.is_inference() for layer in model[::2])
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(2):
        torch.testing.assert_close(model(x), y) if step == 0 else None
        optimizer.zero_grad()
        (model(x).square().sum() + bf.kl_divergence(model)).backward()
        optimizer.step()
    if twin == "compiled":
        torch.func.grad(lambda x: model(x).sum())(x)


def test_a_seed_used_under_inference_mode_serves_in_training(twin):
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    with torch.inference_mode(), bf.sampling(model, seed=1):
        y = model(x)
    with bf.sampling(model, seed=1):
        torch.testing.assert_close(model(x), y)
        model(x).sum().backward()


def test_parameters_made_under_inference_mode(twin):
    """They have no version, and nothing that they were is taken for current."""
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.inference_mode():
        model = network()
        inside = bf.kl_divergence(model)
        assert model(x).isfinite().all()
    if twin != "compiled":
        return  # torch's own operators do not take them into a graph, and say so
    for kl in ("analytic", "sampled"):
        for layer in model[::2]:
            layer.kl = kl
        with bf.sampling(model, seed=1):
            model(x)
            with torch.inference_mode():
                model[0].weight_mu.add_(3.0)
            found = bf.kl_divergence(model)
            model(x)
            torch.testing.assert_close(found, bf.kl_divergence(model))
        with torch.inference_mode():
            model[0].weight_mu.sub_(3.0)
    for layer in model[::2]:
        layer.kl = "analytic"
    torch.testing.assert_close(bf.kl_divergence(model), inside, check_dtype=False)
    elbo = bf.ELBO(model, bf.Gaussian(), 10)
    elbo(x, torch.zeros(4, 2, dtype=torch.float64))
    assert bf.predict(model, x, n_samples=2).mean.isfinite().all()


def test_an_elbo_made_under_inference_mode_counts():
    with torch.inference_mode():
        elbo = bf.ELBO(network(), bf.Gaussian(), 10, bf.linear_warmup(3))
    assert not elbo._steps.tensor.is_inference()


@needs_extension
@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace would lose the gradients.*torch.no_grad\(\).*bnn_fast.draw"):
        torch.jit.trace(model, x)
    with torch.no_grad(), bf.sampling(model, seed=1):
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))
        model.requires_grad_(False)  # torch makes no constant of what needs a gradient
        function = torch.jit.trace(lambda x: model(x), x)
    frozen, more = torch.jit.freeze(traced.eval()), torch.randn(7, 3, dtype=torch.float64)
    for _ in range(3):
        for given in (x, more):
            torch.testing.assert_close(frozen(given), traced(given))
            torch.testing.assert_close(function(given), traced(given))
    with bf.sampling(model, mean=True):
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))
    ordinary = bf.draw(model, seed=1)
    traced = torch.jit.trace(ordinary, x)
    torch.testing.assert_close(traced(x), ordinary(x))
