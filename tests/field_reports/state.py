"""Numbers that were wrong without an error: a KL that outlived its parameters, layers taken for one another."""
from __future__ import annotations

import threading

import pytest
import torch
from common import gradients, needs_extension, network, twin  # noqa: F401
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import bnn_fast as bf
from bnn_fast.layers import steps


def exact(model):
    """The analytic KL in plain PyTorch, from the parameters as they are."""
    total = 0.0
    for layer in (m for m in model.modules() if isinstance(m, bf.VariationalLinear)):
        for pair in layer.pairs():
            q = torch.distributions.Normal(pair.mu, layer.weight_sigma if pair.name == "weight" else layer.bias_sigma)
            p = torch.distributions.Normal(torch.as_tensor(pair.prior.loc).to(pair.mu),
                                           torch.as_tensor(pair.prior.scale).to(pair.mu))
            total = total + torch.distributions.kl_divergence(q, p).sum()
    return total


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def fused(model, lr=0.1):
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def test_a_fused_optimizers_step_makes_the_kl_anew(twin, x):
    """Its kernels do not raise _version."""
    model = network()
    optimizer = fused(model)
    (model(x).square().sum() + bf.kl_divergence(model)).backward()
    model(x)  # a KL that nobody has read
    optimizer.step()
    torch.testing.assert_close(bf.kl_divergence(model), exact(model))


def test_a_loop_on_the_kl_alone(twin, x):
    model = network()
    optimizer = fused(model, 0.02)
    model(x)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        kl = bf.kl_divergence(model)
        torch.testing.assert_close(kl, exact(model))
        kl.backward()
        optimizer.step()
        values.append(kl.item())
    assert all(later < earlier for earlier, later in zip(values, values[1:])), values


def test_an_optimizer_that_nothing_tells_of(twin, x):
    """Writes through .data, as those of libraries with kernels of their own do: the generation of steps tells."""
    class Silent(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.5)

    model = network()
    optimizer = Silent(model.parameters())
    model(x)
    before = steps.current
    optimizer.step()
    assert steps.current is not before
    torch.testing.assert_close(bf.kl_divergence(model), exact(model))


@pytest.mark.parametrize("compiled_with", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1, fused=True)],
                         ids=["sgd", "fused"])
def test_a_compiled_optimizers_step(x, make, compiled_with):
    torch._dynamo.reset()
    model = network()
    optimizer = make(model.parameters())
    backend = CompileCounterWithBackend(compiled_with)
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(4):
        (model(x).square().sum() + bf.kl_divergence(model)).backward()
        model(x)
        before = [p.detach().clone() for p in model.parameters()]
        step()
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        torch.testing.assert_close(bf.kl_divergence(model), exact(model))
    assert backend.frame_count <= 1, "the hook is traced and must not compile anew at every step"
    torch._dynamo.reset()


def test_an_averaging_library(twin, x):
    """Writes through .data cannot be seen: they reach the first read after a call at most, never a second one."""
    model = network()
    (model(x).sum() + bf.kl_divergence(model)).backward()
    averaged = AveragedModel(model)
    for p, q in zip(averaged.parameters(), model.parameters()):
        p.data.copy_(q.data * 1.5)
    for p, q in zip(model.parameters(), averaged.parameters()):
        p.data.copy_(q.data)
    torch.testing.assert_close(bf.kl_divergence(model), exact(model))  # read already, and so computed
    model(x)
    for p in model.parameters():
        p.data.copy_(p.data * 1.5)
    bf.kl_divergence(model)
    torch.testing.assert_close(bf.kl_divergence(model), exact(model))
    model(x)
    for p in model.parameters():
        p.data.copy_(p.data * 1.5)
    with torch.no_grad():  # always computed
        torch.testing.assert_close(bf.kl_divergence(model), exact(model))


@pytest.mark.parametrize("change", ["scaled", "replaced", "data", "scale", "kl"])
def test_another_prior_or_option(twin, x, change):
    prior = bf.Normal(torch.zeros(2, 3), torch.full((2, 3), 0.5))
    layer = bf.VariationalLinear(3, 2, prior=prior, bias_prior=bf.Normal(), dtype=torch.float64,
                                 kl="sampled" if change == "kl" else "analytic")
    layer(x)
    if change == "scaled":
        layer.prior_scale.mul_(3)
    elif change == "replaced":
        layer.prior_loc = torch.ones_like(layer.prior_loc)
    elif change == "data":
        layer.prior_scale.data = layer.prior_scale * 3
    elif change == "scale":
        layer.scale = "exp"
    else:
        layer.kl = "analytic"
    torch.testing.assert_close(bf.kl_divergence(layer), exact(layer))


@needs_extension
def test_a_fused_step_between_forward_and_backward_raises(x):
    model, other = network(), network(seed=1)
    y, z = model(x).square().sum(), other(x).square().sum()
    kl = bf.kl_divergence(model)
    (model(x).square().sum() + bf.kl_divergence(model)).backward()
    fused(model).step()
    for loss in (y, kl):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    z.backward()  # whose parameters that optimizer does not have


@needs_extension
@pytest.mark.parametrize("what", ["prior_scale", "bias_prior_loc", "frozen_key"])
def test_another_prior_or_key_between_forward_and_backward_raises(x, what):
    tensors = [bf.Normal(torch.zeros(shape), torch.ones(shape)) for shape in ((2, 3), (2,))]
    layer = bf.VariationalLinear(3, 2, prior=tensors[0], bias_prior=tensors[1], dtype=torch.float64)
    bf.freeze(layer)
    y, kl = layer(x).sum(), bf.kl_divergence(layer)
    getattr(layer, what).mul_(3)
    for loss in (y, kl):
        with pytest.raises(RuntimeError, match="needed for the gradient, has been modified by an inplace operation"):
            loss.backward()


def test_a_fused_step_of_parameters_without_gradients_changes_nothing(twin, x):
    """Two optimizers by turns: a step raises the version of what it wrote, no other's."""
    model = network()
    frozen = [p for p in model[0].parameters()]
    optimizer = fused(model)
    model[2:](torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    versions = [p._version for p in frozen]
    loss = model[0](x).square().sum()
    optimizer.step()
    assert [p._version for p in frozen] == versions
    loss.backward()


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_every_read_of_a_sampled_kl_is_at_the_recorded_draw(twin, x, kl):
    model = network(kl=kl)
    model(x)
    first = bf.kl_divergence(model)
    for _ in range(2):
        again = bf.kl_divergence(model)
        torch.testing.assert_close(again, first)
    with torch.no_grad():
        torch.testing.assert_close(bf.kl_divergence(model), first)
    first.backward()
    expected = gradients(model)
    again.backward()
    torch.testing.assert_close(gradients(model), expected)


class ELBOWithAnUnusedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = network(), bf.VariationalLinear(3, 2, dtype=torch.float64)

    def forward(self, x):
        return self.used(x)


def test_elbo_takes_the_kl_of_its_own_forward_and_of_no_earlier_one(twin, x):
    model = ELBOWithAnUnusedHead()
    model.unused(x)
    for p in model.unused.parameters():
        p.data.copy_(p.data + 1)
    elbo = bf.ELBO(model, bf.Gaussian(), 100)
    y = torch.zeros(4, 2, dtype=torch.float64)
    model.used[4].register_forward_hook(lambda *_: [bf.kl_divergence(model.used[4])] and None)  # takes that layer's
    elbo(x, y).backward()
    torch.testing.assert_close(elbo.kl, exact(model).detach())
    found = gradients(model.unused)
    exact(model.unused).backward()
    torch.testing.assert_close(found, [g / 100 for g in gradients(model.unused)])


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_reparametrized_layers_are_not_taken_for_one(twin, kl):
    """Their tensors are temporaries, which may all have one id()."""
    torch.manual_seed(0)
    model = nn.Sequential(*[bf.VariationalLinear(8, 8, bias=False, kl=kl) for _ in range(4)])
    for layer in model:
        parametrize.register_parametrization(layer, "weight_mu", Twice())
        parametrize.register_parametrization(layer, "weight_rho", Twice())
    if kl == "analytic":
        torch.testing.assert_close(bf.kl_divergence(model), exact(model))
        torch.testing.assert_close(bf.kl_divergence(model), sum(bf.kl_divergence(layer) for layer in model))
    with bf.sampling(model, seed=1):
        noise = [(layer(torch.eye(8)).T - layer.weight_mu) / layer.weight_sigma for layer in model]
        y = model(torch.eye(8))
        value = bf.kl_divergence(model)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(noise[i], noise[j])
    torch.testing.assert_close(bf.kl_divergence(model), value)  # the sampled one at the recorded key
    y.square().sum().backward()
    value.backward()  # apart: the parametrization is walked twice
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_reparametrized_layers_that_share_their_parameters(twin):
    a, b = bf.VariationalLinear(4, 4, bias=False), bf.VariationalLinear(4, 4, bias=False)
    b.weight_mu, b.weight_rho = a.weight_mu, a.weight_rho
    twice = Twice()
    for layer in (a, b):
        parametrize.register_parametrization(layer, "weight_mu", twice)
    b.parametrizations.weight_mu.original = a.parametrizations.weight_mu.original
    model = nn.Sequential(a, b)
    torch.testing.assert_close(bf.kl_divergence(model), bf.kl_divergence(a))
    with bf.sampling(model, seed=1):
        assert torch.equal(a(torch.eye(4)), b(torch.eye(4)))


@needs_extension
def test_a_backward_that_a_hook_aborts_leaves_no_gradient_behind(twin, x):
    """The KL's node has left its gradient to the draw's by then."""
    if twin == "plain":
        pytest.skip("no nodes of our own")
    layer = bf.VariationalLinear(3, 2, dtype=torch.float64)
    with bf.sampling(layer, seed=1):
        layer(x).square().sum().backward()
        expected = gradients(layer)
        y = layer(x)
        nll, kl = y.square().sum(), bf.kl_divergence(layer)

        def abort(grad):
            raise KeyError("aborted")

        handle = y.register_hook(abort)
        with pytest.raises(KeyError, match="aborted"):
            (nll + kl).backward(retain_graph=True)
        handle.remove()
        layer.zero_grad()
        nll.backward()
    torch.testing.assert_close(gradients(layer), expected)


def test_a_step_counts_for_all_threads():
    before = steps.current
    seen = []
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    thread = threading.Thread(target=lambda: (torch.optim.SGD([p], 0.1).step(), seen.append(steps.current)))
    thread.start()
    thread.join()
    assert seen[0] is steps.current is not before
