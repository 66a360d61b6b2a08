"""vectorized=False, for models whose dimension 0 is not a batch, and ELBO with a seed."""
from __future__ import annotations

import pytest
import torch
from common import gradients, network, twin  # noqa: F401
from torch import nn

import bnn_fast as bf

GRAPH = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2]), torch.tensor([1, 2, 3, 4, 5, 0, 3, 5])


class Graph(nn.Module):
    """Messages between six nodes, by their numbers: several draws stacked along dimension 0 are not seen."""

    def __init__(self, kl="analytic"):
        super().__init__()
        self.layer = bf.VariationalLinear(3, 2, kl=kl, dtype=torch.float64)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.layer(x)
        src, dst = GRAPH
        return torch.zeros_like(h).index_add(0, dst, h[src])


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.rnn = bf.VariationalLinear(3, 4), nn.GRU(4, 2)

    def forward(self, x):
        return self.rnn(self.layer(x))[0]


class Pooled(nn.Module):
    """One row of outputs for all of x."""

    def __init__(self):
        super().__init__()
        self.layer = bf.VariationalLinear(3, 2)

    def forward(self, x):
        return self.layer(x).mean(0, keepdim=True)


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def one_by_one(model, x, n_samples, seed):
    found = []
    for s in range(n_samples):
        with bf.sampling(model, seed=seed, first_sample=s), torch.no_grad():
            found.append(model(x))
    return torch.stack(found)


@pytest.mark.parametrize("model", [Graph, TimeFirst, Pooled])
def test_one_call_a_draw(twin, x, model):
    model = model()
    x = x.to(next(model.parameters())).reshape(3, 2, 3) if isinstance(model, TimeFirst) else x.to(next(model.parameters()))
    expected = one_by_one(model, x, 5, seed=3)
    found = bf.predict(model, x, n_samples=5, seed=3, vectorized=False)
    torch.testing.assert_close(found.samples, expected)
    torch.testing.assert_close(found.mean, expected.mean(0))
    torch.testing.assert_close(found.std, expected.std(0))
    torch.testing.assert_close(bf.mc_forward(model, x, 5, seed=3, vectorized=False), expected)
    many = x.repeat_interleave(7000, -2) if isinstance(model, TimeFirst) else None
    if many is not None:
        assert bf.predict(model, many, n_samples=1, vectorized=False).mean.shape == (3, 14000, 2)


def test_rows_are_split_only_where_batch_size_says_so(x):
    model = network()
    sizes = []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    large = x.repeat(4000, 1)
    bf.predict(model, large, n_samples=2, vectorized=False)
    assert sizes == [24000, 24000]
    torch.testing.assert_close(bf.predict(model, x, n_samples=4, seed=1, vectorized=False, batch_size=4).samples,
                               bf.predict(model, x, n_samples=4, seed=1).samples)


def test_outputs_that_cannot_be_put_together(x):
    with pytest.raises(ValueError, match=r"model: expected outputs with 4 rows in dimension 0, given .*\[1, 2\]"):
        bf.predict(Pooled().double(), x, n_samples=2, vectorized=False, batch_size=4)

    class Scalar(Graph):
        def forward(self, x):
            return super().forward(x).sum()

    with pytest.raises(ValueError, match="model: expected outputs with any number of rows in dimension 0, given"):
        bf.predict(Scalar(), x, n_samples=2, vectorized=False)


@pytest.mark.parametrize("model", [Graph, TimeFirst])
def test_rows_of_different_draws_that_mix_are_refused(twin, x, model):
    model = model()
    x = x.to(next(model.parameters()))
    x = x.reshape(3, 2, 3) if isinstance(model, TimeFirst) else x
    with pytest.raises(ValueError, match="rows of different draws mix.*vectorized=False"):
        bf.predict(model, x, n_samples=10)
    bf.predict(model, x, n_samples=1)


def test_models_that_draw_otherwise_too_are_not_refused(x):
    class Always(nn.Module):
        def forward(self, h):
            return nn.functional.dropout(h, 0.5, training=True)

    bf.predict(nn.Sequential(network(), Always()), x, n_samples=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_mixing(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(12) for m in (bf.VariationalLinear(32, 32, dtype=dtype), nn.Tanh())])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    for rows in (1, 3, 50):
        bf.predict(model, torch.randn(rows, 32, dtype=dtype), n_samples=7)


def test_the_check_costs_one_call():
    model, x = nn.Sequential(bf.VariationalLinear(3, 2)), torch.randn(5, 3)
    sizes = []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    bf.predict(model, x, n_samples=10)
    assert sizes == [50, 5]
    sizes.clear()
    bf.predict(model, x, n_samples=10, batch_size=5)
    assert sizes == [5] * 10


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_elbo_one_call_a_draw(twin, x, kl, n_samples):
    model = Graph(kl)
    y = torch.randn(6, 2, dtype=torch.float64)
    elbo = bf.ELBO(model, bf.Gaussian(0.5).double(), 100, seed=4, vectorized=False)
    loss = elbo(x, y, n_samples)
    loss.backward()
    found = gradients(model)
    total = 0.0
    for s in range(n_samples):
        with bf.sampling(model, seed=4, first_sample=s):
            total = total + elbo.likelihood(model(x)[None], y).mean() + bf.kl_divergence(model) / 100
    (total / n_samples).backward()
    torch.testing.assert_close(loss, total / n_samples)
    torch.testing.assert_close(found, gradients(model))


def test_elbo_one_call_a_draw_is_the_same_as_all_in_one(twin, x):
    model = network(kl="sampled")
    y = torch.randn(6, 2, dtype=torch.float64)
    losses, found = [], []
    for vectorized in (True, False):
        elbo = bf.ELBO(model, bf.Gaussian(), 10, seed=1, vectorized=vectorized)
        losses.append(elbo(x, y, 4))
        losses[-1].backward()
        found.append(gradients(model))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("vectorized", [True, False])
def test_elbo_with_a_seed_is_a_function(twin, x, vectorized):
    model = network()
    y = torch.randn(6, 2, dtype=torch.float64)
    elbo = bf.ELBO(model, bf.Gaussian(), 10, seed=1, vectorized=vectorized)
    first = elbo(x, y, 2)
    assert torch.equal(first, elbo(x, y, 2))
    elbo.seed = 2
    assert not torch.equal(first, elbo(x, y, 2))
    elbo.seed = None
    assert not torch.equal(elbo(x, y, 2), elbo(x, y, 2))
    with bf.sampling(model, seed=1):
        torch.testing.assert_close(elbo(x, y, 2), first)
    for seed in (1.0, "1", True):
        with pytest.raises(TypeError, match="seed: expected an integer or None"):
            bf.ELBO(model, bf.Gaussian(), 10, seed=seed)
    with pytest.raises(ValueError, match="n_samples: expected at least 1"):
        elbo(x, y, 0)


def test_l_bfgs_with_a_line_search(twin, x):
    torch.manual_seed(0)
    model = nn.Sequential(bf.VariationalLinear(3, 8, dtype=torch.float64), nn.Tanh(),
                          bf.VariationalLinear(8, 1, dtype=torch.float64))
    y = x.sum(1, keepdim=True).sin()
    elbo = bf.ELBO(model, bf.Gaussian(0.1).double(), 1000, seed=0)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=10)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = elbo(x, y, 3)
        loss.backward()
        return loss

    for _ in range(5):
        losses.append(optimizer.step(closure).item())
    assert all(b <= a for a, b in zip(losses, losses[1:])) and losses[-1] < 0.5 * losses[0]


def test_a_compiled_elbo_with_a_seed(x):
    torch._dynamo.reset()
    model = network()
    y = torch.randn(6, 2, dtype=torch.float64)
    for vectorized in (True, False):
        elbo = bf.ELBO(model, bf.Gaussian().double(), 10, seed=1, vectorized=vectorized)
        compiled = torch.compile(elbo, backend="aot_eager", fullgraph=True)
        loss = compiled(x, y, 2)
        loss.backward()
        found = gradients(model)
        expected = elbo(x, y, 2)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, gradients(model))
    torch._dynamo.reset()
