"""predict beside others: nobody notices its evaluation mode; explicit modes count."""
from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from common import network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast.inference import evaluation


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not evaluation._borrowed


def with_dropout():
    return nn.Sequential(network(), nn.Dropout(0.5), nn.BatchNorm1d(2).double(), nn.Dropout(0.5))


def in_threads(*functions):
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_two_threads_predict_from_a_model_in_training_mode(twin, x):
    model = with_dropout()
    classes = [type(m) for m in model.modules()]
    expected = bf.predict(copy.deepcopy(model).eval(), x, n_samples=20, seed=1).samples
    found = []
    barrier = threading.Barrier(2)

    def work():
        barrier.wait()
        for _ in range(8):
            found.append(bf.predict(model, x, n_samples=20, seed=1, batch_size=8).samples)

    in_threads(work, work)
    assert len(found) == 16
    for samples in found:
        torch.testing.assert_close(samples, expected)
    assert all(m.training for m in model.modules()) and [type(m) for m in model.modules()] == classes


def test_a_training_loop_beside_a_predicting_thread(twin, x):
    model = with_dropout()
    x = x.repeat(8, 1)
    stop, dropped, trained = threading.Event(), [], []
    model[3].register_forward_hook(lambda m, i, y: dropped.append((m.training, bool((y == 0).any()))))

    def train():
        for _ in range(200):
            before = len(trained)
            dropped_here = model(x)
            trained.append((all(m.training for m in model.modules()), bool((dropped_here == 0).any())))
            assert len(trained) == before + 1
        stop.set()

    def predict():
        while not stop.is_set():
            bf.predict(model, x, n_samples=2)

    in_threads(train, predict)
    assert len(trained) == 200 and all(training and drops for training, drops in trained)
    evaluated = [drops for training, drops in dropped if not training]
    assert evaluated and not any(evaluated)


def test_running_statistics_are_not_updated(x):
    model = with_dropout()
    state = copy.deepcopy(model.state_dict())
    bf.predict(model, x, n_samples=5)
    torch.testing.assert_close(model.state_dict(), state)
    model(x)
    assert model[2].num_batches_tracked == state["2.num_batches_tracked"] + 1


class Asking(nn.Module):
    """Calls what it is given in its forward, and is saved without it."""
    ask = None

    def forward(self, x):
        if Asking.ask is not None:
            Asking.ask()
        return x


def test_others_may_switch_copy_save_and_look_during_a_prediction(x, monkeypatch):
    model = nn.Sequential(Asking(), with_dropout())
    inner = model[1]
    copies = []

    def meanwhile():
        assert isinstance(inner[1], nn.Dropout) and type(inner[1]).__name__ == "Dropout" and model.training
        inner[1].eval()
        assert not inner[1].training and not inner[1].__dict__["training"]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.extend([copy.deepcopy(model), torch.load(buffer, weights_only=False)])
        assert repr(model).startswith("Sequential(")

    def ask():
        if not copies:
            in_threads(meanwhile)
            assert not any(m.training for m in model.modules())

    monkeypatch.setattr(Asking, "ask", staticmethod(ask))
    bf.predict(model, x, n_samples=2)
    assert not inner[1].training and inner[0].training and inner[3].training, "as the other thread has put it"
    assert len(copies) == 2
    for copied in copies:
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert [m.training for m in copied.modules()] == [m.training for m in model.modules()]
        copied[1][3].eval()
        assert not copied[1][3].training


def test_modules_that_cannot_be_of_another_class_are_switched_and_restored(x):
    class Merging(nn.Dropout):
        """What a low-rank adapter does: something of its own when the mode changes."""
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    class Registered(nn.Dropout):
        names = []

        def __init_subclass__(cls):
            Registered.names.append(cls)

    traced = torch.jit.script(nn.Dropout(0.5))
    model = nn.Sequential(network(), traced, Merging(0.5), Registered(0.5), nn.DataParallel(nn.Dropout(0.5)),
                          nn.Dropout(0.5))
    seen = []
    model.register_forward_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    first = bf.predict(model, x, n_samples=3, seed=1).samples
    assert seen and not any(sum(seen, [])) and all(m.training for m in model.modules())
    assert model[2].merged and not Registered.names
    assert torch.equal(first, bf.predict(model, x, n_samples=3, seed=1).samples)
    for error in (KeyboardInterrupt, RuntimeError):
        def interrupt(*_):
            raise error

        handle = model[5].register_forward_hook(interrupt)
        with pytest.raises(error):
            bf.predict(model, x, n_samples=3)
        handle.remove()
        assert all(m.training for m in model.modules()) and not evaluation._borrowed


@pytest.mark.parametrize("how", ["whole", "in place", "within"])
def test_compiled_models_predict_without_dropout_and_train_with_it(x, how):
    torch._dynamo.reset()
    inner = nn.Sequential(network(), nn.Dropout(0.5))
    plain = copy.deepcopy(inner)
    if how == "whole":
        model = torch.compile(inner, backend="aot_eager", fullgraph=True)
    elif how == "in place":
        inner.compile(backend="aot_eager", fullgraph=True)
        model = inner
    else:
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = inner  # a wrapper's name, which does not count

            @torch.compile(backend="aot_eager", fullgraph=True)
            def forward(self, x):
                return self.module(x)

        model = Model()
    big = x.repeat(10, 1)
    for _ in range(2):
        assert (model(big) == 0).any()
        first = bf.predict(model, big, n_samples=2, seed=1).samples
        assert not (first == 0).any()
        torch.testing.assert_close(first, bf.predict(copy.deepcopy(plain).eval(), big, n_samples=2, seed=1).samples)
    assert all(m.training for m in model.modules())
    torch._dynamo.reset()


def of(prediction):
    return prediction.samples


def test_predict_at_the_means(twin, x):
    model = network()
    with bf.sampling(model, mean=True):
        expected = model(x).detach()
        within = bf.predict(model, x, n_samples=7)
        with pytest.raises(ValueError, match="seed: expected None within sampling"):
            bf.predict(model, x, seed=1)
        assert torch.equal(bf.mc_forward(model, x, 2), expected.expand(2, 4, 2))
        torch.testing.assert_close(bf.draw(model)(x), expected)
    for found in (within, *(bf.predict(model, x, n_samples=7, mean=True, batch_size=size) for size in (None, 3))):
        torch.testing.assert_close(of(found), expected.expand(7, 4, 2))
        assert found.n_samples == 7 and (found.std == 0).all()
        torch.testing.assert_close(found.mean, expected)
    noisy = bf.predict(model, x, bf.Gaussian(0.5), mean=True)
    torch.testing.assert_close(noisy.std, torch.full_like(expected, 0.5))
    assert (noisy.epistemic == 0).all() and torch.equal(noisy.quantile([0.2, 0.8])[0] < expected, torch.ones(4, 2).bool())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    bf.predict(model, x, n_samples=1000, mean=True)
    assert len(calls) == 1
    torch.testing.assert_close(bf.draw(model, mean=True)(x), expected)
    with pytest.raises(ValueError, match="mean: expected neither n_samples nor seed"):
        bf.predict(model, x, seed=1, mean=True)


def test_predict_takes_the_seed_of_a_context(twin, x):
    model = network()
    expected = of(bf.predict(model, x, n_samples=6, seed=4))
    with bf.sampling(model, seed=4):
        torch.testing.assert_close(of(bf.predict(model, x, n_samples=6)), expected)
        torch.testing.assert_close(bf.mc_forward(model, x, 6), expected)
        assert not torch.allclose(of(bf.predict(model, x, n_samples=6, seed=5)), expected)
        torch.testing.assert_close(bf.draw(model, first_sample=2)(x), expected[2])
        torch.testing.assert_close(of(bf.predict(model[0], x, n_samples=6))[0], model[0](x).detach())
    with bf.sampling(model, seed=4, first_sample=2):
        torch.testing.assert_close(of(bf.predict(model, x, n_samples=4)), expected[2:])
    with bf.sampling(model, pinned=True):
        network_of_the_block = model(x)
        found = of(bf.predict(model, x, n_samples=3))
        torch.testing.assert_close(found[0], network_of_the_block)
        assert not torch.allclose(found[0], found[1])
    with bf.sampling(model):
        assert not torch.allclose(of(bf.predict(model, x, n_samples=3)), of(bf.predict(model, x, n_samples=3)))


def test_predict_after_freeze_has_one_network(twin, x):
    model = network()
    bf.freeze(model)
    y = model(x)
    found = bf.predict(model, x, n_samples=5)
    torch.testing.assert_close(of(found), y.expand(5, 4, 2))
    assert (found.std == 0).all()
    torch.testing.assert_close(bf.draw(model)(x), y)
    torch.testing.assert_close(of(bf.predict(model, x, n_samples=5, seed=1))[3], bf.draw(model, 1, first_sample=3)(x))
    bf.unfreeze(model)
    bf.freeze(model[0])  # only some of the layers: that one is the same in all draws
    first = []
    model[0].register_forward_hook(lambda m, i, y: first.append(y))
    found = bf.predict(model, x, n_samples=5)
    assert (found.std > 0).all()
    torch.testing.assert_close(first[0].unflatten(0, (5, 4)), first[0][:4].expand(5, 4, 5))


@pytest.mark.parametrize("k", [0, 3])
def test_draw_k_is_draw_k_of_predict(twin, x, k):
    model = network()
    found = of(bf.predict(model, x, n_samples=4, seed=9))
    torch.testing.assert_close(bf.draw(model, 9, first_sample=k)(x), found[k])
    with bf.sampling(model, seed=9, first_sample=k):
        torch.testing.assert_close(model(x), found[k])
    assert not torch.allclose(bf.draw(model)(x), bf.draw(model)(x)), "without a seed it is another one each time"
