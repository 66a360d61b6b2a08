"""VariationalLinear: construction, state, copies, devices and dtypes, initialisations."""
from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from common import gradients, needs_extension, network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf

NAMESPACE = {**vars(bf), "torch": torch}


def tensor_prior(*shape):
    return bf.Normal(torch.randn(*shape), torch.rand(*shape) + 0.5)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_attributes(bias):
    layer = bf.VariationalLinear(3, 5, bias, prior=bf.Normal(0.0, 2.0), scale="exp", kl="sampled")
    names = ["weight_mu", "weight_rho"] + ["bias_mu", "bias_rho"] * bias
    assert [name for name, _ in layer.named_parameters()] == names
    assert list(layer.state_dict()) == [*names, "meaning"]
    assert layer.weight_mu.shape == layer.weight_rho.shape == (5, 3)
    assert layer.bias_mu.shape == (5,) if bias else layer.bias_mu is None and layer.bias_rho is None
    assert (layer.in_features, layer.out_features, layer.scale, layer.kl) == (3, 5, "exp", "sampled")
    assert layer.prior == layer.bias_prior == bf.Normal(0.0, 2.0)


def test_draws_in_training_and_evaluation_alike(twin):
    layer, x = bf.VariationalLinear(3, 2), torch.randn(4, 3)
    for module in (layer.train(), layer.eval()):
        assert not torch.equal(module(x), module(x))


def test_manual_seed_governs_the_draws(twin):
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_a_call_takes_nothing_from_the_generator_but_its_key(twin):
    """And sets no seed: other libraries' layers call torch.manual_seed in forward."""
    layer, x = bf.VariationalLinear(3, 2), torch.randn(4, 3)
    torch.manual_seed(0)
    layer(x)
    after = torch.rand(())
    torch.manual_seed(0)
    torch.randint(-2 ** 63, 2 ** 63 - 1, (2,))
    assert torch.equal(after, torch.rand(()))
    with bf.sampling(layer, seed=3):
        torch.manual_seed(0)
        layer(x)
        after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(()))


def test_sigma_is_read_only():
    for scale, sigma in [("softplus", nn.functional.softplus), ("exp", torch.exp),
                         ("sqrt_exp", lambda r: (r / 2).exp()), ("square", torch.square), ("identity", torch.abs)]:
        layer = bf.VariationalLinear(3, 2, scale=scale)
        layer.weight_rho.data[0].neg_()
        torch.testing.assert_close(layer.weight_sigma, sigma(layer.weight_rho))
        torch.testing.assert_close(layer.bias_sigma, sigma(layer.bias_rho))
    with pytest.raises(AttributeError):
        layer.weight_sigma = 1
    assert bf.VariationalLinear(3, 2, bias=False).bias_sigma is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_asking_for_the_weight_says_what_to_use(name):
    layer = bf.VariationalLinear(3, 2)
    with pytest.raises(AttributeError, match=f"{name}_mu.*bnn_fast.draw"):
        getattr(layer, name)
    assert not hasattr(layer, name)
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        layer.wait


@pytest.mark.parametrize("options", [
    {}, dict(bias=False), dict(prior=bf.Normal(0.5, 2.0), scale="exp", kl="sampled", init="zeros"),
    dict(bias_prior=bf.Normal(0.0, 3.0), dtype=torch.float64), dict(device="meta"),
    dict(scale="sqrt_exp", bias=False), dict(scale="square"), dict(scale="identity", init_sigma=0.1)])
def test_repr_builds_the_layer_again(options):
    layer = bf.VariationalLinear(3, 2, **options)
    again = eval(repr(layer), NAMESPACE)
    assert repr(again) == repr(layer)
    for name in ("in_features", "out_features", "scale", "kl", "init", "prior", "bias_prior"):
        assert getattr(again, name) == getattr(layer, name), name
    assert [(n, p.shape, p.dtype, p.device) for n, p in again.named_parameters()] == [
        (n, p.shape, p.dtype, p.device) for n, p in layer.named_parameters()]


def test_repr_of_tensor_priors_tells_their_shape():
    text = repr(bf.VariationalLinear(3, 2, prior=tensor_prior(2, 3), bias_prior=bf.Normal()))
    assert "prior=Normal(loc=<tensor [2, 3]>, scale=<tensor [2, 3]>)" in text
    assert "bias_prior=Normal(loc=0.0, scale=1.0)" in text


def test_tensor_priors_are_persistent_buffers(twin):
    prior, bias_prior = tensor_prior(2, 3), bf.Normal(torch.randn(2), 0.7)
    layer = bf.VariationalLinear(3, 2, prior=prior, bias_prior=bias_prior)
    buffers = set(layer.state_dict()) - {name for name, _ in layer.named_parameters()}
    assert buffers == {"prior_loc", "prior_scale", "bias_prior_loc", "meaning"}
    other = bf.VariationalLinear(3, 2, prior=tensor_prior(2, 3), bias_prior=bf.Normal(torch.randn(2), 0.7))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(bf.kl_divergence(other), bf.kl_divergence(layer))
    assert other.prior == prior and other.bias_prior == bias_prior
    layer.double()
    assert layer.prior.loc.dtype == torch.float64 and layer(torch.randn(4, 3).double()).dtype == torch.float64
    bf.kl_divergence(layer).backward()


@pytest.mark.parametrize("options, error, message", [
    (dict(scale="log"), ValueError, "scale: expected one of 'softplus', 'exp', 'sqrt_exp', 'square', 'identity', given 'log'"),
    (dict(kl=None), ValueError, "kl: expected one of 'analytic', 'sampled', given None"),
    (dict(init="he"), ValueError,
     "init: expected one of 'default', 'blundell', 'tutorial', 'zeros', 'adv_bnn', given 'he'"),
    (dict(prior=tensor_prior(2, 3)), ValueError, "bias_prior: expected a prior for the bias"),
    (dict(prior=tensor_prior(3, 2), bias_prior=bf.Normal()), ValueError,
     r"prior.loc: expected a number or a tensor \[2, 3\]"),
    (dict(prior=bf.Normal(), bias_prior=tensor_prior(3)), ValueError,
     r"bias_prior.loc: expected a number or a tensor \[2\]"),
    (dict(bias=False, bias_prior=tensor_prior(2)), ValueError,
     "bias_prior: expected numbers or None where bias=False"),
    (dict(prior=1.0), TypeError, "prior: expected a Normal, given float 1.0"),
])
def test_bad_construction(options, error, message):
    with pytest.raises(error, match=message):
        bf.VariationalLinear(3, 2, **options)


def test_bad_input_of_a_call(twin):
    layer = bf.VariationalLinear(3, 2)
    wrong_last = r"x: expected a last dimension of 3 \(in_features\), given a float32 tensor \[4, 2\]"
    with pytest.raises(ValueError, match=wrong_last):
        layer(torch.randn(4, 2))
    with pytest.raises(TypeError, match="x: expected torch.float32"):
        layer(torch.randn(4, 3).double())
    with pytest.raises(ValueError, match="x: expected to be on cpu"):
        layer(torch.randn(4, 3, device="meta"))
    not_divisible = r"n_samples=3 times, given a float32 tensor \[4, 3\]"
    with bf.sampling(layer, n_samples=3), pytest.raises(ValueError, match=not_divisible):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("rows, inputs, out", [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_nothing_in_a_dimension_is_no_error(twin, rows, inputs, out):
    layer = bf.VariationalLinear(inputs, out)
    x = torch.randn(rows, inputs, requires_grad=True)
    y = layer(x)
    assert y.shape == (rows, out)
    (y.sum() + bf.kl_divergence(layer)).backward()
    assert x.grad.shape == x.shape and all(p.grad.isfinite().all() for p in layer.parameters())


def test_check_parameters():
    model = network()
    bf.check_parameters(model)
    with torch.no_grad():
        model[2].weight_rho[0, 0] = -torch.inf  # pruned
        bf.check_parameters(model)
        model[4].bias_mu[1] = torch.nan
    with pytest.raises(ValueError, match="4.bias_mu: expected numbers, given 1 NaN among 2 elements"):
        bf.check_parameters(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(twin, dtype):
    layer = bf.VariationalLinear(3, 2).to(dtype)
    y = layer(torch.randn(4, 3, dtype=dtype))
    assert y.dtype == dtype
    (y.float().sum() + bf.kl_divergence(layer)).backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters())


def test_autocast_keeps_the_parameters_precision(twin):
    layer, x = bf.VariationalLinear(3, 2), torch.randn(4, 3)
    with bf.sampling(layer, seed=1):
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            kl = bf.kl_divergence(layer)
        (y.float().sum() + kl).backward()
    assert y.dtype == torch.bfloat16
    assert kl.dtype == layer.weight_mu.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(kl, bf.kl_divergence(copy.deepcopy(layer)))
    double = bf.VariationalLinear(3, 2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert double(x.double()).dtype == torch.float64
        with bf.sampling(layer, mean=True):
            assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["argument", "context"])
def test_meta_construction(how):
    if how == "argument":
        layer = bf.VariationalLinear(3, 2, device="meta")
    else:
        with torch.device("meta"):
            layer = bf.VariationalLinear(3, 2, prior=bf.Normal(0.0, torch.ones(2, 3)), bias_prior=bf.Normal(),
                                         init="adv_bnn")
    assert all(p.is_meta for p in layer.parameters())
    if bf.build_info()["extension"]:
        assert layer(torch.empty(4, 3, device="meta")).shape == (4, 2)
    if how == "argument":
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        bf.check_parameters(layer)
        assert (layer.weight_rho == -5).all()


@pytest.mark.parametrize("between", ["nothing", "forward"])
def test_deepcopy_and_pickle(twin, between):
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    if between == "forward":
        nll = model(x).sum()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert all(layer._state.record is None and layer._state.key is None for layer in copied[::2])
        with bf.sampling(model, seed=1), bf.sampling(copied, seed=1):
            assert torch.equal(model(x), copied(x))
        torch.testing.assert_close(bf.kl_divergence(copied), bf.kl_divergence(model))
        copied[0].weight_mu.data.zero_()
        assert model[0].weight_mu.abs().sum() > 0
    if between == "forward":
        nll.backward()


def test_torch_save_and_strict_loading(twin):
    model = network()
    bf.freeze(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = network(seed=1)
    other.load_state_dict(torch.load(buffer), strict=True)
    torch.testing.assert_close(list(other.parameters()), list(model.parameters()))


def test_reparametrized_parameters(twin):
    """torch.nn.utils.parametrize turns weight_mu into a property."""
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    layer, x = bf.VariationalLinear(3, 2, bias=False, init="zeros"), torch.randn(4, 3)
    with torch.no_grad():
        layer.weight_mu.fill_(2.0)
    nn.utils.parametrize.register_parametrization(layer, "weight_mu", Half())
    with bf.sampling(layer, mean=True):
        torch.testing.assert_close(layer(x), x @ torch.ones(2, 3).T)
    (layer(x).sum() + bf.kl_divergence(layer)).backward()
    assert layer.parametrizations.weight_mu.original.grad is not None


def test_runs_without_the_extension_and_says_so_once():
    code = """
import sys, warnings
sys.modules["bnn_fast._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bnn_fast as bf, torch
    layer = bf.VariationalLinear(3, 2)
    (layer(torch.randn(4, 3)).sum() + bf.kl_divergence(layer)).backward()
    layer(torch.randn(4, 3))
messages = [str(w.message) for w in caught if "bnn_fast" in str(w.message)]
assert len(messages) == 1 and "pip install --no-build-isolation ." in messages[0], messages
assert layer.weight_mu.grad is not None and not bf.build_info()["extension"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
