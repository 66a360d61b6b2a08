"""Likelihoods: which dimension has the classes, no NaN where there is no error, what a likelihood of one's own gives."""
from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bnn_fast as bf


class Given(nn.Module):
    """A model of these outputs [B, ...], whatever x; one variational layer, so that it is one of ours."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.outputs = bf.VariationalLinear(1, 1), outputs

    def forward(self, x):
        return self.outputs.repeat(len(x) // len(self.outputs), *[1] * (self.outputs.dim() - 1))


def image(classes=3, batch=2, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, classes, size, size, generator=generator, dtype=torch.float64),
            torch.randint(classes, (batch, size, size), generator=generator))


@pytest.mark.parametrize("class_dim", [1, -3])
@pytest.mark.parametrize("log_probs", [False, True])
def test_classes_in_dimension_one(class_dim, log_probs):
    """C = H = W, where the shapes do not tell."""
    logits, targets = image()
    given = logits.log_softmax(1) if log_probs else logits
    found = bf.Categorical(log_probs, class_dim=class_dim)(given[None], targets)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(found, expected[None])
    assert not torch.allclose(found, bf.Categorical(log_probs)(given[None], targets)), "the last dimension is another"


def test_classes_in_dimension_one_all_the_way():
    logits, targets = image()
    likelihood = bf.Categorical(class_dim=1)
    elbo = bf.ELBO(Given(logits), likelihood, 10)
    elbo(torch.zeros(2, 1), targets, 3)
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum") / 2
    torch.testing.assert_close(elbo.nll, expected)
    found = bf.predict(elbo.model, torch.zeros(2, 1), likelihood, n_samples=4)
    probs = logits.softmax(1).movedim(1, -1)
    torch.testing.assert_close(found.probs, probs)
    torch.testing.assert_close(found.samples, probs.expand(4, *probs.shape))
    torch.testing.assert_close(found.entropy, torch.special.entr(probs).sum(-1))
    assert found.quantile([0.1, 0.9]).shape == (2, *probs.shape) and found.cdf(probs + 1e-9).eq(1.0).all()
    torch.testing.assert_close(bf.metrics.nll(found, targets), expected)
    hits = (logits.argmax(1) == targets).double().mean()
    torch.testing.assert_close(found.selective_accuracy(targets, 1.0), hits)
    one_hot = nn.functional.one_hot(targets, 3).movedim(-1, 1)
    torch.testing.assert_close(bf.metrics.brier_score(found, targets), (logits.softmax(1) - one_hot).square().sum(1).mean())


@pytest.mark.parametrize("class_dim, error, message", [
    (0, ValueError, "class_dim: expected a dimension of the outputs behind the batch"),
    (True, TypeError, "class_dim: expected an integer, given bool True"), (1.0, TypeError, "class_dim: expected an integer")])
def test_bad_class_dim(class_dim, error, message):
    with pytest.raises(error, match=message):
        bf.Categorical(class_dim=class_dim)


def test_class_dim_that_the_outputs_do_not_have():
    logits, targets = image()
    for class_dim in (4, -4, -5):
        with pytest.raises(ValueError, match=r"class_dim: expected a dimension of the outputs \[2, 3, 3, 3\]"):
            bf.Categorical(class_dim=class_dim)(logits[None], targets)
    with pytest.raises(ValueError, match="classes in another dimension need class_dim"):
        bf.Categorical()(torch.zeros(1, 2, 3, 5, 6), torch.zeros(2, 5, 6, dtype=torch.int64))
    assert repr(bf.Categorical(class_dim=1)) == "Categorical(log_probs=False, class_dim=1)"


@pytest.mark.parametrize("label", [-1, 4, -100])
def test_labels_out_of_range_are_the_targets_fault(label):
    with pytest.raises(ValueError, match=rf"targets: expected classes 0 to 3, given {min(label, 0)} to {max(label, 0)}"):
        bf.Categorical()(torch.zeros(2, 3, 4), torch.tensor([0, label, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_variance", [-200.0, -400.0, -2000.0, 200.0])
def test_no_nan_at_zero_error(dtype, log_variance):
    """1 / scale overflows, and 0 times infinity is no number."""
    outputs = torch.tensor([[[0.0, log_variance]]], dtype=dtype, requires_grad=True)
    nll = bf.HeteroscedasticGaussian()(outputs, torch.zeros(1, 1, dtype=dtype))
    assert nll.item() == pytest.approx(0.5 * log_variance + 0.5 * math.log(2 * math.pi))
    nll.sum().backward()
    assert outputs.grad.flatten().tolist() == [0.0, 0.5]
    found = bf.predict(Given(outputs[0]), torch.zeros(1, 1), bf.HeteroscedasticGaussian(), n_samples=2)
    assert found.log_prob(torch.zeros(1, 1, dtype=dtype)).item() == pytest.approx(-nll.item())


@pytest.mark.parametrize("dtype, log_variance, error", [
    (torch.float32, -200.0, 1.0), (torch.float32, -2000.0, -1.0), (torch.float64, -2000.0, 1e-30)])
def test_overflow_is_infinite(dtype, log_variance, error):
    outputs = torch.tensor([[[error, log_variance]]], dtype=dtype, requires_grad=True)
    nll = bf.HeteroscedasticGaussian()(outputs, torch.zeros(1, 1, dtype=dtype))
    nll.sum().backward()
    assert nll.item() == math.inf and outputs.grad.flatten().tolist() == [math.copysign(math.inf, error), -math.inf]
    found = bf.predict(Given(outputs[0].double()), torch.zeros(1, 1), bf.HeteroscedasticGaussian(), n_samples=2)
    assert not found.log_prob(torch.zeros(1, 1)).isnan().any()


def test_a_small_error_that_only_the_two_halves_can_divide():
    """e^-lv overflows in float32, error^2 e^-lv does not."""
    outputs = torch.tensor([[[1e-30, -200.0]]])
    nll = bf.HeteroscedasticGaussian()(outputs, torch.zeros(1, 1))
    exact = 0.5 * 1e-60 * math.exp(200.0) - 100.0
    assert nll.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-40, 1e-300, 5e-324, 1e300])
def test_gaussian_of_any_scale(scale):
    likelihood, outputs = bf.Gaussian(scale, learned=True), torch.zeros(1, 1, 1, requires_grad=True)
    nll = likelihood(outputs, torch.zeros(1, 1))
    nll.sum().backward()
    assert nll.item() == pytest.approx(math.log(scale) + 0.5 * math.log(2 * math.pi))
    assert outputs.grad.item() == 0.0 and likelihood.log_scale.grad.item() == 1.0
    error = likelihood(outputs, torch.ones(1, 1)).item()
    assert error == math.inf if scale < 1 else error == nll.item()


def test_a_likelihood_of_ones_own_gives_draws_and_rows():
    def broadcast(outputs, y):
        return (outputs - y).square()

    model, x = bf.VariationalLinear(3, 1), torch.randn(6, 3)
    elbo = bf.ELBO(model, broadcast, 10)
    with pytest.raises(ValueError, match=r"likelihood: expected it to give the NLL \[1, 6\] of each draw and row, for "
                                         r"outputs \[1, 6, 1\], given a float32 tensor \[1, 6, 6\]"):
        elbo(x, torch.zeros(6))
    with pytest.raises(ValueError, match="likelihood: expected it to give the NLL"):
        bf.ELBO(model, lambda outputs, y: broadcast(outputs, y).mean(), 10)(x, torch.zeros(6, 1))
    rows = bf.ELBO(model, lambda outputs, y: broadcast(outputs, y).sum(-1), 10)
    rows(x, torch.zeros(6, 1), 2).backward()
