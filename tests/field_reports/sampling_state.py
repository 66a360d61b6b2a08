"""Contexts that overlap, recomputation in the backward pass, and names that wrappers add."""
from __future__ import annotations

import asyncio
import copy
import threading

import pytest
import torch
from common import gradients, needs_extension, network, twin  # noqa: F401
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.distributed.fsdp import _common_utils as fsdp
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import bnn_fast as bf
from bnn_fast.inference.seeds import WRAPPERS
from bnn_fast.layers import base, modes


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def under(model, x, **options):
    with bf.sampling(model, **options):
        return model(x)


def draws_anew(model, x):
    """Nothing is left of any context, for eager code and for compiled."""
    assert all(layer._state.mode is modes.ORDINARY for _, layer in base.named_layers(model))
    return not torch.equal(model(x), model(x)) and not modes.stack()


def test_tasks_that_overlap(twin, x):
    model = network()
    expected = {seed: under(model, x, seed=seed) for seed in range(3)}

    async def task(seed, before, after):
        await asyncio.sleep(before)
        with bf.sampling(model, seed=seed):
            await asyncio.sleep(0.01)
            found = [model(x)]
            await asyncio.sleep(after)
            found.append(model(x))
        assert not torch.equal(model(x), model(x))
        return found

    async def main():
        outside = []
        found = await asyncio.gather(task(0, 0, 0.01), task(1, 0.005, 0.03), task(2, 0.01, 0.0))
        outside += [model(x), model(x)]
        assert not torch.equal(*outside)
        return found

    for seed, found in enumerate(asyncio.run(main())):
        assert all(torch.equal(y, expected[seed]) for y in found)
    assert draws_anew(model, x)


def test_a_task_takes_a_context_along_until_it_ends(x):
    """One started within it and still there afterwards is not pinned for good."""
    model = network()
    expected = under(model, x, seed=1)

    async def child(left):
        assert torch.equal(model(x), expected)
        await left.wait()
        assert not torch.equal(model(x), model(x))

    async def main():
        left = asyncio.Event()
        with bf.sampling(model, seed=1):
            started = asyncio.create_task(child(left))
            await asyncio.sleep(0)
            assert torch.equal(await asyncio.to_thread(model, x), expected)
        left.set()
        await started

    asyncio.run(main())
    assert draws_anew(model, x)


def test_generators_that_overlap_say_so(twin, x):
    model = network()
    expected = under(model, x, seed=2)

    def steps(seed):
        with bf.sampling(model, seed=seed):
            yield model(x)
            yield model(x)

    first, second = steps(1), steps(2)
    next(first), next(second)
    with pytest.raises(RuntimeError, match="sampling: left before a context that was entered after it"):
        next(first), next(first)
    assert torch.equal(model(x), expected), "its own entry is gone, the other's is there"
    assert torch.equal(next(second), expected)
    assert next(second, None) is None
    assert draws_anew(model, x)
    for generator in (steps(1), steps(2)):  # abandoned in either order, and without a word over another error
        next(generator)
    del generator
    assert draws_anew(model, x)


def test_contexts_left_in_another_thread(x):
    model = network()
    context = bf.sampling(model, seed=1)
    context.__enter__()
    errors = []

    def leave():
        try:
            context.__exit__(None, None, None)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "thread or task" in errors[0]
    assert not torch.equal(model(x), model(x))
    with bf.sampling(model, seed=1):
        pass
    assert draws_anew(model, x)


def test_an_error_within_is_not_hidden_by_the_order(x):
    model = network()
    a, b = bf.sampling(model, seed=1), bf.sampling(model, seed=2)
    a.__enter__(), b.__enter__()
    assert a.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is None
    b.__exit__(None, None, None)
    assert draws_anew(model, x)


def test_a_context_does_not_reach_copies_nor_pickles(x):
    model = network()
    with bf.sampling(model, seed=1):
        copied = copy.deepcopy(model)
        assert not torch.equal(copied(x), copied(x))


@pytest.mark.parametrize("n_samples", [1, 3])
def test_pinned_holds_one_fresh_draw_for_the_block(twin, n_samples):
    cell = bf.VariationalLinear(3, 3, bias=False, init="zeros", dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    context = bf.sampling(cell, n_samples=n_samples, pinned=True)
    seen = []
    for _ in range(2):
        with context:
            w = cell(eye.repeat(n_samples, 1)).reshape(n_samples, 3, 3)
            again = cell(cell(eye.repeat(n_samples, 1))).reshape(n_samples, 3, 3)
        torch.testing.assert_close(again, w @ w)
        seen += list(w)
    for i, a in enumerate(seen):
        assert not any(torch.equal(a, b) for b in seen[:i])
    torch.manual_seed(0)
    with bf.sampling(cell, pinned=True):
        w = cell(eye)
    torch.manual_seed(0)
    with bf.sampling(cell, pinned=True):
        assert torch.equal(w, cell(eye))
    assert draws_anew(cell, eye)


class Module(nn.Module):
    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def test_names_of_torchs_wrappers_do_not_count(x):
    assert set(WRAPPERS) >= {wrappers._CHECKPOINT_WRAPPED_MODULE, fsdp.FSDP_WRAPPED_MODULE}
    model = network()
    expected = under(model, x, seed=1)
    for wrapped in (nn.DataParallel(model), AveragedModel(model), torch.compile(model, backend="eager"),
                    wrappers.checkpoint_wrapper(model), wrappers.offload_wrapper(model),
                    Module(fsdp.FSDP_WRAPPED_MODULE, model)):
        names = [name.split(".") for name, _ in base.named_layers(wrapped)]
        assert all(set(name[:-1]) <= set(WRAPPERS) and len(name) > 1 for name in names)
        inner = wrapped.module if isinstance(wrapped, AveragedModel) else model
        with bf.sampling(wrapped, seed=1):
            assert torch.equal(inner(x), expected), type(wrapped)


def test_checkpointing_applied_to_the_layers_does_not_change_the_draw(twin, x):
    model = network()
    with bf.sampling(model, seed=1):
        expected = model(x)
        expected.square().sum().backward()
    expected_gradients = gradients(model)
    wrappers.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, bf.VariationalLinear))
    assert type(model[0]) is wrappers.CheckpointWrapper
    with bf.sampling(model, seed=1):
        y = model(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    torch.testing.assert_close(gradients(model), expected_gradients)


REENTRANT = pytest.mark.parametrize("reentrant", [True, False])
HOW = pytest.mark.parametrize("options", [{"seed": 3}, {"seed": 3, "n_samples": 2}, {"mean": True}, {"pinned": True}],
                              ids=str)


@REENTRANT
@HOW
def test_checkpoint_and_backward_in_another_thread_after_leaving(twin, x, reentrant, options):
    """That thread has no memory of the layer's latest call: the layer's own, which all threads share, counts."""
    model = network()
    x.requires_grad_()
    torch.manual_seed(0)
    with bf.sampling(model, **options):
        model(x).square().sum().backward()
    expected = gradients(model)
    torch.manual_seed(0)
    with bf.sampling(model, **options):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(gradients(model), expected)


@REENTRANT
@HOW
def test_a_prediction_between_checkpoint_and_backward(twin, x, reentrant, options):
    model = network()
    x.requires_grad_()
    torch.manual_seed(0)
    with bf.sampling(model, **options):
        model(x).square().sum().backward()
    expected = gradients(model)
    torch.manual_seed(0)
    with bf.sampling(model, **options):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    bf.predict(model, x, n_samples=3)
    loss.backward()
    torch.testing.assert_close(gradients(model), expected)


def test_several_checkpoints_in_different_modes_before_one_backward(twin, x):
    model = network()
    x.requires_grad_()

    def both(x):  # contexts within the function are entered again when it is repeated
        return under(model, x, seed=7) + under(model, x, mean=True)

    def losses(run):
        total = sum(under(lambda_module(run, model), x, seed=seed).square().sum() for seed in range(3))
        return total + run(both, x).square().sum()

    losses(lambda f, x: f(x)).backward()
    expected = gradients(model)
    loss = losses(lambda f, x: checkpoint(f, x, use_reentrant=False))
    under(model, x, mean=True)
    loss.backward()
    torch.testing.assert_close(gradients(model), expected)


def lambda_module(run, model):
    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, x):
            return run(self.module, x)

    return Run()


def test_reentrant_checkpointing_of_a_function_that_enters_contexts(twin, x):
    model = network()
    x.requires_grad_()

    def both(x):
        return under(model, x, seed=7) + under(model, x, mean=True)

    both(x).square().sum().backward()
    expected = gradients(model)
    checkpoint(both, x, use_reentrant=True).square().sum().backward()
    torch.testing.assert_close(gradients(model), expected)
