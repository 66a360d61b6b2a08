"""The mean NLL by torch's own losses where it is the likelihood's, and by the likelihood everywhere else."""
import pytest
import torch
from torch import nn

import bnn_fast as bf
from bnn_fast.inference import mean_nll as module
from bnn_fast.inference.mean_nll import mean_nll


def case(kind: str, shape: tuple[int, ...], n_samples: int, dtype: torch.dtype):
    """(likelihood, outputs, targets) of rows of this shape."""
    torch.manual_seed(0)
    classes = 4 if kind.startswith("categorical") else 1
    outputs = 3 * torch.randn(n_samples, *shape, *([classes] if classes > 1 else []), dtype=dtype)
    if kind == "gaussian":
        return bf.Gaussian(0.3), outputs, torch.randn(shape, dtype=dtype)
    if kind == "bernoulli":
        return bf.Bernoulli(), outputs, torch.rand(shape, dtype=dtype)
    log_probs = kind == "categorical, log_probs"
    return bf.Categorical(log_probs), outputs.log_softmax(-1) if log_probs else outputs, torch.randint(classes, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "bernoulli", "categorical", "categorical, log_probs"])
def test_torch_losses_give_the_likelihood(kind, shape, n_samples, dtype):
    likelihood, outputs, targets = case(kind, shape, n_samples, dtype)
    outputs.requires_grad_()
    found, expected = module._by_torch(likelihood, outputs, targets), likelihood(outputs, targets).mean()
    assert found is not None and found.dtype == expected.dtype and found.shape == ()
    assert torch.equal(found, mean_nll(likelihood, outputs, targets))
    (gradient,), (wanted,) = torch.autograd.grad(2 * found, outputs), torch.autograd.grad(2 * expected, outputs)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


class Own(bf.Gaussian):
    def forward(self, outputs, targets, weights=None):
        return super().forward(outputs, targets, weights) + 7.0


def hooked():
    likelihood = bf.Gaussian()
    likelihood.register_forward_hook(lambda *_: None)
    return likelihood


OTHERS = {
    "learned": bf.Gaussian(learned=True), "a class of its own": Own(), "hooks": hooked(),
    "wide noise": bf.Gaussian(1e3), "narrow noise": bf.Gaussian(1e-20),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_is_the_likelihoods(name):
    outputs, targets = torch.randn(2, 5, 1), torch.randn(5, 1)
    assert module._by_torch(OTHERS[name], outputs, targets) is None
    assert torch.equal(mean_nll(OTHERS[name], outputs, targets), OTHERS[name](outputs, targets).mean())


def test_an_error_whose_square_overflows():
    outputs, targets = torch.full((1, 2, 1), 1e21), torch.zeros(2, 1)
    found = mean_nll(bf.Gaussian(1e5), outputs, targets)
    assert found.item() == pytest.approx(0.5e32, rel=1e-5)


@pytest.mark.parametrize("label", [-1, 4, -100, -2 ** 63], ids=str)  # the last: what numpy makes of nan
@pytest.mark.parametrize("log_probs", [False, True])
def test_a_label_that_is_no_class_is_named(label, log_probs):
    targets = torch.tensor([0, label, 3])
    with pytest.raises(ValueError, match="targets: expected classes 0 to 3, given"):
        mean_nll(bf.Categorical(log_probs), torch.randn(2, 3, 4), targets)


def test_what_is_left_out_counts_as_a_row():
    outputs, targets = torch.randn(2, 3, 4), torch.tensor([0, -100, 3])
    likelihood = bf.Categorical(ignore_index=-100)
    assert module._by_torch(likelihood, outputs, targets) is None
    assert torch.equal(mean_nll(likelihood, outputs, targets), likelihood(outputs, targets).sum() / 6)


@pytest.mark.parametrize("likelihood", [bf.Gaussian(), bf.Bernoulli()], ids=["gaussian", "bernoulli"])
def test_shapes_that_differ_are_refused(likelihood):
    with pytest.raises(ValueError, match="outputs: expected"):
        mean_nll(likelihood, torch.randn(2, 5, 1), torch.randn(5))
    with pytest.raises(TypeError, match="targets: expected a tensor"):
        mean_nll(likelihood, torch.randn(2, 5), [0.0] * 5)


def test_no_rows_and_low_precision():
    for outputs in (torch.randn(2, 0, 1), torch.randn(2, 5, 1, dtype=torch.bfloat16)):
        assert module._by_torch(bf.Gaussian(), outputs, torch.zeros(outputs.shape[1:])) is None


def test_hooks_of_every_module_see_the_likelihood():
    seen, likelihood = [], bf.Gaussian()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        mean_nll(likelihood, torch.randn(2, 5, 1), torch.randn(5, 1))
    finally:
        handle.remove()
    assert seen == [likelihood]
