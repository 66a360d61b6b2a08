"""torch.compile(fullgraph=True): one compilation for each mode, the gradients of eager, fresh draws.

With the compiled operators; the reference, of which torch.compile traces every line, is slow to compile and
has one test.
"""
from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from common import gradients, needs_extension, network
from torch._dynamo.testing import CompileCounterWithBackend

import bnn_fast as bf
from bnn_fast.operators import raw as ops

MODES = {
    "plain": lambda model, seed: contextlib.nullcontext(),
    "sampling": lambda model, seed: bf.sampling(model, seed=seed),
    "samples": lambda model, seed: bf.sampling(model, n_samples=2, seed=seed),
    "anew": lambda model, seed: bf.sampling(model, n_samples=2),
    "mean": lambda model, seed: bf.sampling(model, mean=True),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def training_step(model):
    return lambda x: model(x).square().mean() + bf.kl_divergence(model) / 10


@needs_extension
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_compiles_once(x, kl, mode):
    model = network(kl=kl)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step(model), backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(5):
        with MODES[mode](model, seed):
            torch.manual_seed(seed)
            loss = compiled(x)
            loss.backward()
            found = gradients(model)
            if mode in ("sampling", "samples") or (mode == "mean" and kl == "analytic"):
                expected_loss = training_step(model)(x)
                torch.testing.assert_close(loss, expected_loss)
                expected_loss.backward()
                torch.testing.assert_close(found, gradients(model))
        for p, g in zip(model.parameters(), found):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()
    assert backend.frame_count == 1


@needs_extension
def test_draws_are_fresh_and_governed_by_manual_seed(x):
    model = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(0)
    assert torch.equal(first, compiled(x)) and not torch.equal(first, second)


@needs_extension
def test_all_modes_together_take_one_compilation_each(x):
    model = network()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step(model), backend=backend, fullgraph=True)
    for seed in range(3):
        for mode in ("plain", "sampling", "mean"):
            with MODES[mode](model, seed):
                compiled(x).backward()
    assert backend.frame_count == 3


@needs_extension
def test_elbo_compiles_once_with_fresh_draws(x):
    model = network()
    elbo = bf.ELBO(model, bf.Gaussian(0.5, learned=True), n_data=100)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(elbo, backend=backend, fullgraph=True)
    y = torch.zeros(6, 2, dtype=torch.float64)
    losses = []
    for _ in range(4):
        loss = compiled(x, y, 2)
        loss.backward()
        losses.append(loss.item())
    assert backend.frame_count == 1 and len(set(losses)) == 4
    torch.testing.assert_close(elbo.kl, bf.kl_divergence(model).detach())


@needs_extension
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_kl_read_outside_of_the_region(x, kl):
    """What the region computed cannot be told to be current there, so it is computed again: never stale."""
    model = network(kl=kl)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        with bf.sampling(model, seed=seed):
            y = compiled(x)
            value = bf.kl_divergence(model)
            y.square().sum().backward()
            value.backward()
            found = gradients(model)
            (model(x).square().sum() + bf.kl_divergence(model)).backward()
            torch.testing.assert_close(value, bf.kl_divergence(model))
            torch.testing.assert_close(found, gradients(model))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)


@needs_extension
def test_the_draw_of_a_region_is_known_outside(x):
    """Its sampled KL and the noise that freeze keeps are those of the region's latest call."""
    model = network(kl="sampled")
    model(x)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    expected = bf.kl_divergence(model)
    torch.testing.assert_close(bf.kl_divergence(model), expected)
    bf.freeze(model)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(bf.kl_divergence(model), expected)


@needs_extension
def test_kl_compiled_alone(x):
    model = network()
    compiled = torch.compile(bf.kl_divergence, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model(x)
        torch.testing.assert_close(compiled(model), bf.kl_divergence(model))
        with torch.no_grad():
            model[0].weight_mu.add_(1)
            torch.testing.assert_close(compiled(model), bf.kl_divergence(model))


@needs_extension
def test_without_gradients(x):
    model = network()
    compiled = torch.compile(lambda x: (model(x), bf.kl_divergence(model)), backend="aot_eager",
                             fullgraph=True)
    with bf.sampling(model, seed=1):
        training = compiled(x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
            y, kl = compiled(x)
            torch.testing.assert_close((y, kl), (model(x), bf.kl_divergence(model)))
        assert kl != training[1]
        model.requires_grad_(False)
        torch.testing.assert_close(compiled(x), (y, kl))


@needs_extension
@pytest.mark.parametrize("first", ["training step", "forward"])
def test_a_region_does_not_take_another_regions_kl(x, first):
    model = network()
    run = torch.compile(training_step(model) if first == "training step" else model, backend="aot_eager",
                        fullgraph=True)
    evaluate = torch.compile(lambda x: (model(x), bf.kl_divergence(model)), backend="aot_eager",
                             fullgraph=True)
    read = torch.compile(bf.kl_divergence, backend="aot_eager", fullgraph=True)
    with bf.sampling(model, seed=1):
        run(x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
            torch.testing.assert_close(evaluate(x)[1], bf.kl_divergence(model))
        if first == "training step":
            run(x)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1)
            torch.testing.assert_close(read(model), bf.kl_divergence(model))


@needs_extension
def test_functional_and_frozen_noise(x):
    model = network()
    bf.freeze(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@needs_extension
def test_sampling_entered_within_the_region(x):
    model = network()

    def f(x):
        with bf.sampling(model, n_samples=2):
            return model(x), bf.mc_forward(model, x, 3)

    y, samples = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert y.shape == (6, 2) and samples.shape == (3, 6, 2)
    assert not torch.equal(model(x), model(x)), "left again"


def test_reference_compiles(x, monkeypatch):
    monkeypatch.setattr(ops, "HAS_EXTENSION", False)
    layer = bf.VariationalLinear(3, 2, dtype=torch.float64)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step(layer), backend=backend, fullgraph=True)
    for seed in range(2):
        with bf.sampling(layer, seed=seed):
            loss, expected = compiled(x), training_step(layer)(x)
            torch.testing.assert_close(loss, expected)
    assert backend.frame_count == 1


@needs_extension
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(x):
    layer = bf.VariationalLinear(3, 2, dtype=torch.float64)
    compiled = torch.compile(training_step(layer), fullgraph=True)
    with bf.sampling(layer, seed=1):
        loss, expected = compiled(x), training_step(layer)(x)
        loss.backward()
        found = gradients(layer)
        expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(layer))
