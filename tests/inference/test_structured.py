"""Several inputs and outputs: tuples, dictionaries, dataclasses, loaders; targets with weights."""
from __future__ import annotations

import dataclasses
from collections import UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnn_fast as bf

Pair = namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass
class Batch:
    a: torch.Tensor
    b: torch.Tensor
    name: str = "batch"


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    hidden: dict
    note: str = "note"
    made: list = dataclasses.field(init=False, default_factory=list)


class Two(nn.Module):
    """Of two inputs, however they are given."""

    def __init__(self, way="two", out="tensor"):
        super().__init__()
        self.left, self.right, self.way, self.out = bf.VariationalLinear(3, 4), nn.Linear(2, 4), way, out

    def forward(self, *inputs, scale=1.0, **keywords):
        if self.way == "two":
            a, b = inputs if inputs else (keywords["a"], keywords["b"])
        elif self.way == "dict":
            a, b = inputs[0]["a"], inputs[0]["b"][0]
        elif self.way == "object":
            a, b = inputs[0].a, inputs[0].b
        else:
            a, b = inputs[0]
        h = self.left(a)
        y = h.tanh() * self.right(b) * scale
        return {"tensor": y, "tuple": (y, h), "dict": {"y": y, "none": None, "n": 3}, "dataclass": Output(y, {"h": [h]})}[self.out]


@pytest.fixture
def ab():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 3, generator=generator), torch.randn(7, 2, generator=generator)


def expected(model, a, b, n_samples, seed, scale=1.0):
    outputs = []
    with torch.no_grad():
        for s in range(n_samples):
            with bf.sampling(model, seed=seed, first_sample=s):
                outputs.append(model.left(a).tanh() * model.right(b) * scale)
    return torch.stack(outputs)


INPUTS = {
    "tuple": ("two", lambda a, b: (a, b), 1.0), "dictionary": ("two", lambda a, b: {"a": a, "b": b, "scale": 2.0}, 2.0),
    "0-d tensor": ("two", lambda a, b: {"a": a, "b": b, "scale": torch.tensor(3.0)}, 3.0),
    "mapping": ("two", lambda a, b: UserDict(a=a, b=b), 1.0), "one dictionary": ("dict", lambda a, b: ({"a": a, "b": [b, None]},), 1.0),
    "one tuple": ("pair", lambda a, b: ((a, b),), 1.0), "list": ("pair", lambda a, b: [a, b], 1.0),
    "named tuple": ("object", lambda a, b: Pair(a, b), 1.0), "dataclass": ("object", lambda a, b: Batch(a, b), 1.0),
}


@pytest.mark.parametrize("vectorized", [True, False, "vmap"])
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(ab, case, vectorized):
    way, make, scale = INPUTS[case]
    model = Two(way)
    wanted = expected(model, *ab, 5, 3, scale)
    torch.testing.assert_close(bf.mc_forward(model, make(*ab), 5, seed=3, vectorized=vectorized).detach(), wanted)
    for batch_size in (None, 3):
        found = bf.predict(model, make(*ab), n_samples=5, seed=3, vectorized=vectorized, batch_size=batch_size)
        torch.testing.assert_close(found.samples, wanted)
    elbo, given = bf.ELBO(model, bf.Gaussian(1.0), 50, seed=3, vectorized=vectorized), make(*ab)
    elbo(given, torch.zeros(7, 4), n_samples=5)
    assert not isinstance(given, Batch) or given.a is ab[0]  # what was given is as it was
    torch.testing.assert_close(elbo.nll, bf.Gaussian(1.0)(wanted, torch.zeros(7, 4)).mean())


@pytest.mark.parametrize("vectorized", [True, False, "vmap"])
def test_outputs(ab, vectorized):
    model = Two()
    wanted = expected(model, *ab, 5, 3)
    for out, choose in (("tuple", lambda o: o[0]), ("dict", lambda o: o["y"]), ("dataclass", lambda o: o.logits)):
        model.out = out
        every = bf.mc_forward(model, ab, 5, seed=3, vectorized=vectorized)
        torch.testing.assert_close(choose(every).detach(), wanted)
        torch.testing.assert_close(bf.mc_forward(model, ab, 5, seed=3, vectorized=vectorized, output=choose).detach(), wanted)
        found = bf.predict(model, ab, n_samples=5, seed=3, vectorized=vectorized, output=choose)
        torch.testing.assert_close(found.samples, wanted)
        with pytest.raises(TypeError, match="output= chooses one"):
            bf.predict(model, ab, n_samples=5, vectorized=vectorized)
        gaussian, zero = bf.Gaussian(1.0), torch.zeros(7, 4)
        chosen = bf.ELBO(model, gaussian, 50, seed=3, vectorized=vectorized, output=choose)
        own = bf.ELBO(model, lambda o, y: gaussian(choose(o), y), 50, seed=3, vectorized=vectorized)  # noqa: B023
        torch.testing.assert_close(chosen(ab, zero, n_samples=5), own(ab, zero, n_samples=5))
    assert isinstance(every, Output) and every.note == "note" and every.hidden["h"][0].shape == (5, 7, 4)


def test_inputs_that_do_not_do(ab):
    a, b = ab
    with pytest.raises(ValueError, match="x: expected tensors with one size of dimension 0, the batch, given 7, 6"):
        bf.predict(Two(), (a, b[1:]), n_samples=3)
    assert bf.predict(Two(), (a, b[:1]), n_samples=3, vectorized=False).samples.shape == (3, 7, 4)
    with pytest.raises(TypeError, match="x: expected a tensor"):
        bf.mc_forward(Two(), (1.0, "a"), 3)
    for no_tensor in (a.numpy(), "a", 3):
        with pytest.raises(TypeError, match=r"x: expected a tensor \[B, ...\], given"):
            bf.predict(Two(), no_tensor, n_samples=3)
    with pytest.raises(TypeError, match="whose rows are not known"):
        bf.mc_forward(Two(), (a, object()), 3)
    with pytest.raises(ValueError, match=r"given a float32 tensor \[\] on cpu in dict of 2; output= chooses"):
        bf.mc_forward(Sums(), a, 3)
    with pytest.raises(TypeError, match="output: expected a function"):
        bf.predict(Two(), ab, output="logits")


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = bf.VariationalLinear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        return {"y": y, "loss": y.sum()}


def test_loaders_and_other_iterables():
    model, x, y = nn.Sequential(bf.VariationalLinear(3, 2)), torch.randn(10, 3), torch.arange(10) % 2
    whole = bf.predict(model, x, bf.Categorical(), n_samples=6, seed=1)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for batches in (loader, DataLoader(TensorDataset(x), batch_size=3), iter(x.split(3)), (batch for batch, _ in loader)):
        found = bf.predict(model, batches, bf.Categorical(), n_samples=6, seed=1)
        assert type(found) is bf.ClassPrediction and len(found) == 10
        torch.testing.assert_close(found.samples, whole.samples)
        torch.testing.assert_close(found.mutual_information, whole.mutual_information)
    assert bf.predict(model, loader, n_samples=6, progress=None).samples.shape == (6, 10, 2)
    same = bf.predict(model, iter([x, x]), n_samples=4)  # without a seed, too, the draws are those of one call
    assert torch.equal(same.samples[:, :10], same.samples[:, 10:])
    two = Two()
    a, b = torch.randn(5, 3), torch.randn(5, 2)
    of_pairs = bf.predict(two, (((p, q), 0) for p, q in zip(a.split(2), b.split(2))), n_samples=3, seed=1)
    torch.testing.assert_close(of_pairs.samples, expected(two, a, b, 3, 1))
    with pytest.raises(ValueError, match="at least one batch"):
        bf.predict(model, iter([]), n_samples=3)
    with pytest.raises(ValueError, match="an input or .input, targets."):
        bf.predict(model, iter([(x, x, y)]), n_samples=3)


def test_draws_of_a_loader_are_kept_up_to_the_limit_over_all_batches(monkeypatch):
    import sys
    monkeypatch.setattr(sys.modules["bnn_fast.inference.blocks"], "KEPT_BYTES", 4 * 6 * 2 * 8)
    model = nn.Sequential(bf.VariationalLinear(3, 2))
    x = torch.randn(9, 3)
    assert bf.predict(model, iter(x[:8].split(4)), n_samples=6, seed=1).samples.shape == (6, 8, 2)
    found = bf.predict(model, iter(x.split(4)), n_samples=6, seed=1)
    with pytest.raises(RuntimeError, match="were not kept"):
        _ = found.samples
    torch.testing.assert_close(found.mean, bf.mc_forward(model, x, 6, seed=1).mean(0).detach())


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_soft_labels_and_ignored_targets_are_those_of_torch(class_dim):
    logits, labels = torch.randn(2, 3, 5, 4).double(), torch.randint(4, (3, 5))
    labels[0, 1] = labels[2] = -100
    outputs = logits.movedim(-1, 2) if class_dim == 1 else logits
    found = bf.Categorical(class_dim=class_dim, ignore_index=-100)(outputs, labels)
    wanted = [F.cross_entropy(one.movedim(-1, 1), labels, reduction="none").sum(1) for one in logits]
    torch.testing.assert_close(found, torch.stack(wanted))
    assert (found[:, 2] == 0).all()
    soft = torch.rand(3, 5, 4).double().softmax(-1)
    given = soft.movedim(-1, 1) if class_dim == 1 else soft
    wanted = [F.cross_entropy(one.movedim(-1, 1), soft.movedim(-1, 1), reduction="none").sum(1) for one in logits]
    torch.testing.assert_close(bf.Categorical(class_dim=class_dim)(outputs, given), torch.stack(wanted))
    one_hot = F.one_hot(torch.tensor([0, 1, 2]), 3).double()
    log_probs = torch.where(one_hot == 1, 0.0, -torch.inf)[None]
    assert torch.equal(bf.Categorical(log_probs=True)(log_probs, one_hot), torch.zeros(1, 3).double())
    with pytest.raises(TypeError, match=r"targets: expected integer classes, or probabilities"):
        bf.Categorical()(torch.randn(2, 3, 4), torch.rand(3, 5))
    assert "ignore_index=-100" in repr(bf.Categorical(ignore_index=-100))


LIKELIHOODS = [(bf.Gaussian(0.5), 2, torch.randn(6, 2)), (bf.HeteroscedasticGaussian(), 4, torch.randn(6, 2)),
               (bf.Bernoulli(), 2, torch.tensor([0.0, 1.0]).repeat(6, 1))]


@pytest.mark.parametrize("likelihood, width, y", LIKELIHOODS)
def test_weights_leave_out_what_they_mask(likelihood, width, y):
    torch.manual_seed(0)
    model, x = nn.Sequential(bf.VariationalLinear(3, width)), torch.randn(6, 3)
    elbo, mask = bf.ELBO(model, likelihood, 100, seed=1), torch.tensor([1.0, 0, 1, 1, 0, 1])
    keep, padded = mask.bool(), torch.where(mask[:, None] == 1, y, torch.nan)
    found = elbo(x, padded, n_samples=3, weights=mask)
    gradients = torch.autograd.grad(found, list(model.parameters()))
    wanted = elbo(x[keep], y[keep], n_samples=3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, list(model.parameters())))
    torch.testing.assert_close(elbo(x, y, n_samples=3, weights=2 * torch.ones(6)), elbo(x, y, n_samples=3))
    # of elements: the sum of what both leave out of the other is the whole
    left = torch.tensor([1.0, 0.0]).repeat(6, 1)
    parts = []
    for weights in (left, 1 - left):
        elbo(x, torch.where(weights == 1, y, torch.nan), n_samples=3, weights=weights)
        parts.append(elbo.nll)
    elbo(x, y, n_samples=3)
    torch.testing.assert_close(sum(parts), elbo.nll)


def test_weights_and_own_likelihoods_are_checked():
    model, x, y = nn.Sequential(bf.VariationalLinear(3, 2)), torch.randn(6, 3), torch.randn(6, 2)
    elbo = bf.ELBO(model, bf.Gaussian(), 100)
    for weights in (torch.ones(5), torch.ones(6, 3), torch.ones(())):
        with pytest.raises(ValueError, match="weights: expected a tensor"):
            elbo(x, y, weights=weights)
    for weights in (torch.tensor([1.0, -1, 1, 1, 1, 1]), torch.full((6,), torch.nan)):
        with pytest.raises(ValueError, match="weights: expected no negative"):
            elbo(x, y, weights=weights)
    holes, mask = torch.cat([x[:5], torch.full((1, 3), torch.nan)]), torch.tensor([1.0, 1, 1, 1, 1, 0])
    assert elbo(holes, y, weights=mask).isfinite()
    with pytest.raises(TypeError, match=r"weights: expected a real tensor \[6\]"):
        elbo(x, y, weights=[1.0] * 6)
    for wrong in (lambda o, y: o.mean(), lambda o, y: o.mean(0), lambda o, y: (o - y).square(), lambda o, y: None):
        with pytest.raises(ValueError, match=r"likelihood: expected it to give the NLL \[3, 6\]"):
            bf.ELBO(model, wrong, 100)(x, y, n_samples=3)
    assert elbo(x, y * torch.nan, weights=torch.zeros(6)).isfinite()  # no row at all


def test_gradients_for_an_acquisition_function():
    """mc_forward keeps the graph, predict does not: upper confidence bound and expected improvement by x, against differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), bf.VariationalLinear(8, 1)).double()
    x = torch.randn(3, 2).double().requires_grad_()

    def upper(x):
        draws = bf.mc_forward(model, x, 20, seed=3)
        return (draws.mean(0) + 2 * draws.std(0)).sum()

    def improvement(x):
        return (bf.mc_forward(model, x, 20, seed=3, vectorized="vmap") - 0.1).relu().mean(0).sum()

    assert torch.autograd.gradcheck(upper, x) and torch.autograd.gradcheck(improvement, x)
    found = bf.predict(model, x, n_samples=20, seed=3)
    assert not found.mean.requires_grad and not found.std.requires_grad
    torch.testing.assert_close((found.mean + 2 * found.std).sum(), upper(x).detach())


def test_readmes_backbone_inputs_and_loader(tmp_path, monkeypatch):
    from test_recipes import run_readme
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(12, 3, 16, 16), torch.randn(12, 4), torch.arange(12) % 10)
    image, context, labels = data.tensors
    made = run_readme("A backbone, several inputs, a DataLoader", image=image, context=context, labels=labels,
                      loader=DataLoader(data, batch_size=5))
    assert len(made["found"]) == len(made["whole"]) == 12
    torch.testing.assert_close(made["whole"].probs, made["same"].probs)
    assert all(p.grad is not None for p in made["model"].parameters())


class Convolution(nn.Module):
    def __init__(self, attribute: bool):
        super().__init__()
        self.first, self.layer, self.attribute = nn.Conv1d(3, 4, 1), bf.VariationalLinear(4, 2), attribute

    def forward(self, x):
        return self.layer(self.first(x.clone() if self.attribute else x).mean(-1))


@pytest.mark.parametrize("options", [{}, {"vectorized": False}, {"batch_size": 2}])
@pytest.mark.parametrize("model", [Convolution(False), Convolution(True), nn.Sequential(nn.Conv1d(3, 4, 1), bf.VariationalConv1d(4, 2, 1))])
def test_batches_that_are_no_iterator_are_refused_by_name(model, options):
    a, b = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    for x, taken in (([a, b], r"model\(x\)"), ((a, b), r"model\(\*x\)"), ([(a, 0), (b, 1)], r"model\(x\)")):
        words = rf"one batch, as {taken} takes it, given a {type(x).__name__} of 2, "
        if isinstance(model, nn.Sequential) and isinstance(x, tuple):  # which is told without a call of it
            words = "the one input that an nn.Sequential has, .*given tuple of 2, "
        with pytest.raises(TypeError, match=rf"^x: expected {words}.*iter\(x\)$"):
            bf.predict(model, x, n_samples=3, **options)
    for x in ([a, b[:4]], (a, b[:4])):
        with pytest.raises((TypeError, ValueError), match=r"^x: expected .* given .*iter\(x\)$"):
            bf.predict(model, x, n_samples=3, **options)
    found = bf.predict(model, iter([a, b[:4]]), n_samples=3, seed=1)
    torch.testing.assert_close(found.mean, bf.predict(model, torch.cat([a, b[:4]]), n_samples=3, seed=1).mean)
