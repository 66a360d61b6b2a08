"""What is the same in all draws runs once, and nothing else does; all against a call for each draw."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnn_fast as bf


def by_single_calls(model, x, n_samples, seed, call=lambda model, x: model(x)):
    outputs = []
    with torch.no_grad():
        for s in range(n_samples):
            with bf.sampling(model, seed=seed, first_sample=s):
                outputs.append(call(model, x))
    return torch.stack(outputs)


class Counter(nn.Module):
    """A backbone that counts its calls and their rows."""

    def __init__(self, features=6):
        super().__init__()
        self.layer, self.calls, self.rows = nn.Linear(3, features), 0, 0

    def forward(self, x):
        self.calls += 1
        self.rows += len(x)
        return self.layer(x).relu()


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.fc = Counter(), bf.VariationalLinear(6, 2)

    def forward(self, x):
        return self.fc(self.backbone(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4), bf.VariationalLinear(4, 4)

    def forward(self, x):
        h = self.first(x)
        return h + self.layer(h.relu())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.a, self.b = nn.Linear(3, 4), bf.VariationalLinear(3, 4), bf.VariationalLinear(4, 2)

    def forward(self, x):
        return self.b(self.plain(x) * self.a(x).tanh())


class Mixing(nn.Module):
    """Rows of a call mix, unless it is of one draw."""

    def __init__(self):
        super().__init__()
        self.layer = bf.VariationalLinear(3, 4, init_sigma=0.5)

    def forward(self, x):
        h = self.layer(x)
        return (h - h.mean(0)).view(x.size(0), -1).mean(1)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4), bf.VariationalLinear(4, 4)

    def forward(self, x):
        h = self.layer(self.first(x))
        return h.view(x.size(0), -1).mean(1)


@pytest.fixture
def x():
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(1))


def sequential(counter):
    return nn.Sequential(nn.Identity(), nn.Sequential(counter, nn.Sequential(nn.ReLU(), bf.VariationalLinear(6, 5))), nn.Tanh(),
                         bf.VariationalLinear(5, 2))


@pytest.mark.parametrize("batch_size", [None, 3, 20])
@pytest.mark.parametrize("vectorized", [True, False, "vmap"])
def test_the_children_before_the_first_variational_one_run_once(x, vectorized, batch_size):
    model = sequential(counter := Counter())
    expected = by_single_calls(model, x, 11, seed=3)
    counter.calls = counter.rows = 0
    found = bf.predict(model, x, n_samples=11, seed=3, vectorized=vectorized, batch_size=batch_size)
    assert counter.rows == len(x) and counter.calls == (3 if batch_size == 3 else 1)
    torch.testing.assert_close(found.samples, expected)


def test_they_run_once_in_mc_forward_and_elbo_too_with_the_same_gradients(x):
    model = sequential(counter := Counter()).double()
    x = x.double().requires_grad_()
    y = bf.mc_forward(model, x, 5, seed=2)
    assert counter.calls == 1 and counter.rows == 7
    torch.testing.assert_close(y, by_single_calls(model, x, 5, seed=2))
    found = torch.autograd.grad(y.square().sum(), [x, counter.layer.weight])
    expected = [0.0, 0.0]
    for s in range(5):
        with bf.sampling(model, seed=2, first_sample=s):
            gradients = torch.autograd.grad(model(x).square().sum(), [x, counter.layer.weight])
        expected = [e + g for e, g in zip(expected, gradients)]
    torch.testing.assert_close(found, tuple(expected))
    counter.calls = 0
    loss = bf.ELBO(model, bf.Gaussian(1.0), 100, seed=2)(x, torch.zeros(7, 2, dtype=torch.float64), n_samples=5)
    assert counter.calls == 1
    nll = 0.5 * y.square().sum(-1).mean() + torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(loss, nll + bf.kl_divergence(model) / 100)


class Noisy(nn.Module):
    def forward(self, x):
        return x.add_(1.0) + torch.rand(())


def test_x_stays_as_it_is(x):
    noisy, kept = nn.Sequential(Noisy(), bf.VariationalLinear(3, 2)), x.clone()
    nn.init.constant_(noisy[1].weight_rho, -30.0)
    x = kept.clone().requires_grad_()
    bf.mc_forward(nn.Sequential(nn.ELU(inplace=True), bf.VariationalLinear(3, 2)), x, 3).sum().backward()
    x = x.detach()
    bf.mc_forward(noisy, x, 3)
    assert torch.equal(x, kept)

    model, before = nn.Sequential(nn.CELU(inplace=True), bf.VariationalLinear(3, 2)), x.clone()
    found = bf.predict(model, x, n_samples=4, seed=1)
    assert torch.equal(x, before)
    torch.testing.assert_close(found.samples, by_single_calls(model, None, 4, seed=1, call=lambda model, _: model(x.clone())))


@pytest.mark.parametrize("case", ["hook", "forward", "subclass", "no prefix", "one draw"])
def test_what_is_not_proven_runs_as_it_is(x, case):
    class Doubling(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    counter = Counter()
    model = (Doubling if case == "subclass" else nn.Sequential)(counter, bf.VariationalLinear(6, 2))
    if case == "hook":
        model.register_forward_hook(lambda module, inputs, y: 3 * y)
    elif case == "forward":
        model.forward = lambda x: 5 * model[1](counter(x))
    elif case == "no prefix":
        model = nn.Sequential(Residual(), nn.Linear(4, 2))
    S = 1 if case == "one draw" else 4
    torch.testing.assert_close(bf.predict(model, x, n_samples=S, seed=1).samples, by_single_calls(model, x, S, seed=1))


def test_dropout_that_is_always_on_is_drawn_for_each_draw():
    class Always(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    for before, training in ((Always(), False), (nn.Dropout(0.5), True)):
        model = nn.Sequential(before, bf.VariationalLinear(50, 50, bias=False)).train(training)
        nn.init.eye_(model[1].weight_mu)
        nn.init.constant_(model[1].weight_rho, -30.0)
        drawn = bf.mc_forward(model, torch.ones(3, 50), 4)
        assert not torch.equal(drawn[0] < 1, drawn[1] < 1)
        assert not torch.allclose(drawn.std(0), torch.zeros(3, 50), atol=1e-3)


def test_what_comes_before_dropout_in_training_runs_once_and_dropout_in_it_is_tried_once(x):
    model = nn.Sequential(counter := Counter(), nn.Dropout(), bf.VariationalLinear(6, 2))
    bf.mc_forward(model, x, 4)
    assert counter.calls == 1 and counter.rows == 7

    class Own(Counter):
        def forward(self, x):
            return F.dropout(super().forward(x), training=self.training)

    model = nn.Sequential(counter := Own(), bf.VariationalLinear(6, 2))
    for rows in (7 + 28, 28, 28):
        counter.rows = 0
        bf.mc_forward(model, x, 4)
        assert counter.rows == rows
    counter.rows = 0
    bf.predict(model, x, n_samples=4)
    assert counter.rows == 7


@pytest.mark.parametrize("vectorized", [True, False, "vmap"])
def test_head(x, vectorized):
    model = WithHead()
    expected = by_single_calls(model, x, 9, seed=5)
    model.backbone.calls = 0
    found = bf.predict(model, x, n_samples=9, seed=5, head="fc", vectorized=vectorized)
    assert model.backbone.calls == 1
    torch.testing.assert_close(found.samples, expected)
    assert not model.fc._forward_hooks and not model.fc._forward_pre_hooks


def test_head_with_several_inputs_that_it_changes_and_an_output_that_is_chosen(x):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = bf.VariationalLinear(6, 2)

        def forward(self, h, *, shift):
            return self.layer(h.add_(1.0)) + shift

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = Counter(), Head()

        def forward(self, x):
            h = self.backbone(x)
            return {"logits": self.head(h, shift=x[:, :1]), "features": h}

    model = Model()
    expected = by_single_calls(model, x, 6, seed=5, call=lambda model, x: model(x)["logits"])
    for batch_size in (None, 7, 5):
        found = bf.predict(model, x, n_samples=6, seed=5, head="head", output=lambda out: out["logits"], batch_size=batch_size)
        torch.testing.assert_close(found.samples, expected)
    both = bf.predict(nn.Sequential(WithHead().eval()), x, n_samples=3, seed=1, head="0.fc", output=lambda y: y[:, :1])
    assert both.samples.shape == (3, 7, 1)


def test_a_head_that_is_none_is_refused(x):
    class Softmax(WithHead):
        def forward(self, x):
            return super().forward(x).log_softmax(-1)

    class InPlace(WithHead):
        def forward(self, x):
            y = super().forward(x)
            y += x[:, :2]
            return y

    with pytest.raises(ValueError, match="head: expected a module whose output is the model's"):
        bf.predict(InPlace(), x, n_samples=3, head="fc")

    class Twice(WithHead):
        def forward(self, x):
            self.fc(self.backbone(x))
            return super().forward(x)

    with pytest.raises(ValueError, match="head: expected a module whose output is the model's"):
        bf.predict(Softmax(), x, n_samples=3, head="fc")
    with pytest.raises(ValueError, match="called 2 times"):
        bf.predict(Twice(), x, n_samples=3, head="fc")
    with pytest.raises(ValueError, match=r"children: backbone, fc.*given 'fd'"):
        bf.predict(WithHead(), x, n_samples=3, head="fd")
    with pytest.raises(TypeError, match="head: expected the name"):
        bf.predict(WithHead(), x, n_samples=3, head=3)
    with pytest.raises(ValueError, match="lacks a"):
        bf.predict(Branching(), x, n_samples=3, head="b")
    with pytest.raises(ValueError, match="torch.compile"):
        bf.predict(torch.compile(WithHead()), x, n_samples=3, head="fc")


@pytest.mark.parametrize("make", [Residual, Branching, Flat, Mixing, WithHead])
@pytest.mark.parametrize("vectorized", [True, False, "vmap"])
def test_any_model(x, make, vectorized):
    model = make()
    if make is Mixing and vectorized is True:
        with pytest.raises(ValueError, match="vectorized=False"):
            bf.predict(model, x, n_samples=8, seed=5)
        return
    expected = by_single_calls(model, x, 8, seed=2)
    torch.testing.assert_close(bf.predict(model, x, n_samples=8, seed=2, vectorized=vectorized).samples, expected)
    torch.testing.assert_close(bf.mc_forward(model, x, 8, seed=2, vectorized=vectorized).detach(), expected)
