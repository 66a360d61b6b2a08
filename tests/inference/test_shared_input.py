"""The input that the draws share reaches a linear layer that comes first without being copied for each."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from common import needs_extension, twin  # noqa: F401
from torch import nn

import bnn_fast as bf
from bnn_fast.layers.variational_linear import VariationalLinear


def alone():
    return bf.VariationalLinear(6, 3).double()


def first():
    return nn.Sequential(bf.VariationalLinear(6, 5), nn.Hardtanh(inplace=True), bf.VariationalLinear(5, 3)).double()  # no chain


def behind_others():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(bf.VariationalLinear(6, 5), nn.Hardtanh()), nn.Linear(5, 3)).double()


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(6, 4), bf.VariationalLinear(4, 3)

    def forward(self, x):
        return self.fc(self.body(x).relu())


@pytest.fixture
def taken(monkeypatch):
    """What is given to the linear layers: (shape, strides)."""
    inputs, forward = [], VariationalLinear.forward

    def noted(self, x):
        inputs.append((tuple(x.shape), x.stride()))
        return forward(self, x)

    monkeypatch.setattr(VariationalLinear, "forward", noted)
    return inputs


@pytest.fixture(params=[(7, 6), (7, 2, 6), (1, 6)], ids=str)
def x(request):
    return torch.randn(*request.param, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("make", [alone, first, behind_others])
def test_outputs_and_gradients_are_those_of_a_call_a_draw(make, x, taken, twin):  # noqa: F811
    model, x = make(), x.requires_grad_()
    y = bf.mc_forward(model, x, 5, seed=2)
    assert taken[0][0][:2] == (5, x.shape[0]) and taken[0][1][0] == 0
    expected = bf.mc_forward(model, x, 5, seed=2, vectorized=False)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    inputs = [x, *model.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.parametrize("make", [alone, first, behind_others])
def test_elbo(make, x, taken):
    model, target = make(), x[..., :3]
    losses = [bf.ELBO(model, bf.Gaussian(), 100, seed=2, vectorized=way)(x, target, n_samples=4) for way in (True, False)]
    assert taken[0][1][0] == 0
    torch.testing.assert_close(*losses)
    found, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(found, expected)


def test_predict(x, taken):
    for model, options in ((alone(), {}), (first(), {}), (behind_others(), {}), (Backbone().double(), {"head": "fc"})):
        taken.clear()
        found = bf.predict(model, x, n_samples=6, seed=3, **options)
        assert (6, x.shape[0]) in [shape[:2] for shape, strides in taken if strides[0] == 0]
        torch.testing.assert_close(found.samples, bf.predict(model, x, n_samples=6, seed=3, vectorized=False).samples)


def test_where_a_layer_would_see_the_difference_it_is_repeated(taken):
    x = torch.randn(7, 6)
    seen, hooked = [], bf.VariationalLinear(6, 3)
    hooked.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0].shape))
    for model in (hooked, nn.Sequential(nn.Dropout(), bf.VariationalLinear(6, 3)), bf.VariationalLinear(6, 3, estimator="flipout")):
        taken.clear()
        bf.mc_forward(model, x, 4, seed=1)
        assert taken[0][0] == (28, 6)
    assert seen == [(28, 6)]
    with pytest.raises(ValueError, match=r"last dimension of 6 \(in_features\), given \[7, 5\] for each of 4 draws"):
        bf.mc_forward(bf.VariationalLinear(6, 3), torch.randn(7, 5), 4)


def test_under_autocast(taken):
    model, x = nn.Sequential(bf.VariationalLinear(6, 5), nn.Tanh(), bf.VariationalLinear(5, 3)), torch.randn(9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bf.mc_forward(model, x, 4, seed=1)
        assert taken[0][1][0] == 0 and y.dtype == torch.bfloat16
        expected = bf.mc_forward(model, x, 4, seed=1, vectorized=False)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


MEMORY = """
import resource, torch, bnn_fast as bf
torch.set_num_threads(1)
batch, inputs, outputs, n_samples = {sizes}
layer, x = bf.VariationalLinear(inputs, outputs), torch.randn(batch, inputs)

def step(n_samples):
    layer.zero_grad()
    (bf.mc_forward(layer, x, n_samples, seed=1).sum() + bf.kl_divergence(layer)).backward()

step(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n_samples)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes")
@needs_extension
@pytest.mark.parametrize("regime, sizes", [("small", (5000, 64, 2, 100)), ("fused", (128, 4096, 8, 100)), ("drawn", (512, 2048, 2, 100))])
def test_the_shared_input_of_100_draws_is_not_copied(regime, sizes):
    """A step forward and back, whose 100 copies would take 128 MB and more, in every regime of the layer."""
    layer, x = bf.VariationalLinear(*sizes[1:3]), torch.empty(100, *sizes[:2])
    assert torch.ops.bnn_fast._linear_regime(x, layer.weight_mu, 100) == ["small", "fused", "drawn"].index(regime)
    done = subprocess.run([sys.executable, "-c", MEMORY.format(sizes=sizes)], text=True, capture_output=True, check=True)
    assert 1024 * int(done.stdout) < 0.5 * x.numel() * x.element_size()


@pytest.mark.parametrize("kind, size", [(bf.VariationalConv1d, (8,)), (bf.VariationalConv2d, (5, 6)), (bf.VariationalConvTranspose2d, (4, 3))])
def test_a_convolution_that_comes_first_reads_it_too(kind, size, monkeypatch):
    given, compute = [], kind.compute
    monkeypatch.setattr(kind, "compute", lambda self, w, x, *rest: given.append(x.data_ptr()) or compute(self, w, x, *rest))
    model = nn.Sequential(kind(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten()).double()
    x = torch.randn(7, 2, *size, dtype=torch.float64, requires_grad=True)
    y = bf.mc_forward(model, x, 5, seed=2)
    assert given == [x.data_ptr()] * 5
    expected = bf.mc_forward(model, x, 5, seed=2, vectorized=False)
    torch.testing.assert_close(y, expected)
    inputs = [x, *model.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs))
    given.clear()
    bf.predict(model, x.detach(), n_samples=5, seed=3)
    assert set(given[:5]) == {x.data_ptr()}
    with pytest.raises(ValueError, match="input: expected a tensor"), bf.sampling(model, 5):
        model[0](x.detach().expand(4, *x.shape))
