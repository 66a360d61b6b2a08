"""VariationalLinear(estimator=): what uses it, what draws weights all the same, and that neither chunks nor samples change it."""
from __future__ import annotations

import copy

import pytest
import torch
from common import gradients, key_of, needs_extension, twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast import reference

ESTIMATORS = ("local", "flipout")
both = pytest.mark.parametrize("estimator", ESTIMATORS)


def network(estimator, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return nn.Sequential(bf.VariationalLinear(3, 8, estimator=estimator, init_sigma=0.3, dtype=dtype, **options), nn.Tanh(),
                         bf.VariationalLinear(8, 2, estimator=estimator, init_sigma=0.3, dtype=dtype, **options))


def as_weight(model):
    """The same parameters under "weight"."""
    model = copy.deepcopy(model)
    for layer in model[::2]:
        layer.estimator = "weight"
    return model


@both
def test_options(estimator):
    layer = bf.VariationalLinear(3, 2, estimator=estimator)
    assert repr(layer).endswith(f", estimator={estimator!r})") and "estimator" not in repr(bf.VariationalLinear(3, 2))
    assert copy.deepcopy(layer).estimator == estimator
    other = bf.VariationalLinear(3, 2)
    other.load_state_dict(layer.state_dict())  # the parameters mean the same
    assert torch.equal(other.weight_mu, layer.weight_mu) and other.estimator == "weight"
    converted = bf.to_variational(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), options={"1": {"estimator": estimator}})
    assert [layer.estimator for layer in converted] == ["weight", estimator]
    with pytest.raises(ValueError, match="estimator: expected one of 'weight', 'local', 'flipout', given 'Local'"):
        bf.VariationalLinear(3, 2, estimator="Local")


@both
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_a_step_is_that_of_the_reference(estimator, kl, twin):  # noqa: F811
    model, x, y = network(estimator, kl=kl), torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    elbo = bf.ELBO(model, bf.Gaussian(0.3), 100, seed=5)
    elbo(x, y, n_samples=2).backward()
    found, kl_found = gradients(model), elbo.kl
    with bf.sampling(model, 2, seed=5):
        keys = [layer.drawing_mode().key for layer in model[::2]]
    out, kls = torch.cat([x, x]), []
    for layer, key in zip((model[0], model[2]), keys):
        out, value = reference.variational_linear(out, *layer.tensors(), key, kl=kl, n_samples=2, estimator=estimator)
        out, kls = out.tanh() if layer is model[0] else out, [*kls, value]
    nll = -torch.distributions.Normal(out, 0.3).log_prob(torch.cat([y, y])).sum(1).mean()
    (nll + sum(kls) / 100).backward()
    torch.testing.assert_close(kl_found, sum(kls).detach())
    torch.testing.assert_close(found, gradients(model), rtol=1e-6, atol=1e-7)  # the likelihood's noise is in float32


@both
def test_what_pins_a_network_draws_weights(estimator):
    model, x = network(estimator), torch.randn(5, 3, dtype=torch.float64)
    weight = as_weight(model)
    for context in (dict(seed=3), dict(seed=3, n_samples=5)):
        with bf.sampling(model, **context), bf.sampling(weight, **context):
            torch.testing.assert_close(model(x), weight(x))
    torch.testing.assert_close(bf.draw(model, 3)(x), bf.draw(weight, 3)(x))
    with bf.sampling(model, pinned=True):
        torch.testing.assert_close(model(x), model(x))
    bf.freeze(model)
    torch.testing.assert_close(model(x), model(x))
    torch.testing.assert_close(bf.draw(model)(x), model(x))
    assert bf.predict(model, x, n_samples=3).std.max() == 0
    bf.unfreeze(model)
    assert not torch.equal(model(x), model(x))
    joint = bf.predict(model, x, n_samples=4, seed=2, joint=True)
    torch.testing.assert_close(joint.samples, bf.predict(weight, x, n_samples=4, seed=2).samples)
    assert not torch.equal(joint.samples, bf.predict(model, x, n_samples=4, seed=2).samples)
    with bf.sampling(model, mean=True):
        torch.testing.assert_close(model(x), bf.draw(model, mean=True)(x))


@both
def test_freeze_after_a_part_of_a_prediction(estimator):
    model, x = network(estimator), torch.randn(9, 3, dtype=torch.float64)
    bf.predict(model, x, n_samples=2, batch_size=4)
    bf.freeze(model)
    assert model[0].frozen_key.shape == (2,)


@both
@pytest.mark.parametrize("shape", [(11, 3), (11, 2, 3)])
def test_chunks_change_nothing(estimator, shape):
    model, x = network(estimator), torch.randn(shape, dtype=torch.float64)
    if len(shape) == 3:  # two of a layer's rows are one of the model's
        model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3)), *model)
        folded = nn.Sequential(Fold(), *model[2:], Unfold())
        whole = bf.predict(folded, x, n_samples=7, seed=1)
        torch.testing.assert_close(bf.predict(folded, x, n_samples=7, seed=1, batch_size=4).samples, whole.samples)
    whole = bf.predict(model, x, n_samples=7, seed=1)
    for options in (dict(batch_size=4), dict(batch_size=30), dict(vectorized=False), dict(vectorized=False, batch_size=5)):
        torch.testing.assert_close(bf.predict(model, x, n_samples=7, seed=1, **options).samples, whole.samples)
    torch.testing.assert_close(bf.mc_forward(model, x, 7, seed=1), whole.samples)
    torch.testing.assert_close(bf.mc_forward(model, x, 7, seed=1, vectorized=False), whole.samples)


class Fold(nn.Module):
    def forward(self, x):
        return x.flatten(0, 1)


class Unfold(nn.Module):
    def forward(self, y):
        return y.unflatten(0, (-1, 2))


@both
def test_a_layer_called_twice_under_one_key_is_refused(estimator):
    layer = bf.VariationalLinear(4, 4, estimator=estimator)
    tied = bf.VariationalLinear(4, 4, estimator=estimator)
    for name in ("weight_mu", "weight_rho", "bias_mu", "bias_rho"):
        setattr(tied, name, getattr(layer, name))
    x = torch.randn(3, 4)
    for model in (nn.Sequential(layer, layer), nn.Sequential(layer, nn.ReLU(), tied)):
        for call in (lambda: bf.predict(model, x, n_samples=2), lambda: bf.mc_forward(model, x, 2),
                     lambda: bf.ELBO(model, bf.Gaussian(1.0), 10)(x, x)):
            with pytest.raises(RuntimeError, match=f"estimator='{estimator}' is called again under one key"):
                call()
        model(x)  # anew at every call
        assert bf.predict(model, x, n_samples=2, joint=True).samples.shape == (2, 3, 4)
        with bf.sampling(model, seed=1):
            model(x)
    model = nn.Sequential(layer)
    elbo = bf.ELBO(model, bf.Gaussian(1.0), 10, seed=1)
    torch.testing.assert_close(elbo(x, x), elbo(x, x))  # each is a call of its own


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_noise(estimator, reentrant):
    model, x = network(estimator), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (lambda: model(x), lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        with bf.inference.sampling.Draws(model, 1, 3):
            run().square().sum().backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


@needs_extension
@both
def test_autocast(estimator):
    model, x = network(estimator, torch.float32), torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bf.mc_forward(model, x, 1, seed=2)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), bf.mc_forward(model, x, 1, seed=2), atol=0.05, rtol=0.05)


@needs_extension
@both
def test_transforms(estimator):
    """vmap gives what a loop does, per-example gradients too."""
    layer, x = bf.VariationalLinear(3, 2, estimator=estimator), torch.randn(4, 5, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    key = key_of(3)

    def loss(parameters, x):
        y = bf.functional.variational_linear(x, *(parameters[n] for n in layer.names), key, estimator=estimator, kl=None)[0]
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    each = [torch.func.grad(loss)(parameters, one) for one in x]
    for name in parameters:
        torch.testing.assert_close(found[name], torch.stack([one[name] for one in each]))
    jacobian = torch.func.jacrev(lambda p: bf.functional.variational_linear(
        x[0], p, *(parameters[n] for n in layer.names[1:]), key, estimator=estimator, kl=None)[0])(parameters["weight_mu"])
    torch.testing.assert_close(jacobian.sum((0, 1)), torch.func.grad(lambda p: bf.functional.variational_linear(
        x[0], p, *(parameters[n] for n in layer.names[1:]), key, estimator=estimator, kl=None)[0].sum())(parameters["weight_mu"]))


@needs_extension
@both
def test_compile(estimator):
    model, x, y = network(estimator), torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    elbo = bf.ELBO(model, bf.Gaussian(0.3), 100, seed=5)
    elbo(x, y).backward()
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(elbo, backend="aot_eager", fullgraph=True)
    compiled(x, y).backward()
    torch.testing.assert_close(gradients(model), expected)
    whole = bf.predict(model, x, n_samples=3, seed=1)
    torch._dynamo.reset()
    found = bf.predict(torch.compile(model, backend="aot_eager"), x, n_samples=3, seed=1, batch_size=4)
    torch.testing.assert_close(found.samples, whole.samples)


@needs_extension
@both
def test_plain_gives_the_same(estimator):
    model, x = network(estimator), torch.randn(6, 3, dtype=torch.float64)
    compiled = bf.mc_forward(model, x, 2, seed=1)
    with bf.plain():
        torch.testing.assert_close(bf.mc_forward(model, x, 2, seed=1), compiled)
