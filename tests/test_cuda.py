"""What needs a GPU: bits, torch's current stream and device, CUDA graphs, no synchronisation, layers on CUDA tensors.

tests/ptx asks the same kernels for their results, on a GPU too where there is one.
"""

from __future__ import annotations

import pytest
import torch
from kernels import KLS, OPS, SCALES, draw_arguments

import bnn_fast as bf
from bnn_fast.operators import raw as ops


def test_a_build_without_cuda_kernels_runs_cuda_tensors_on_the_twin_and_says_so(monkeypatch):
    without = {**bf.build_info(), "cuda_architectures": []}
    monkeypatch.setattr(ops, "build_info", lambda: without)
    ops._has_cuda_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="BNN_FAST_CUDA=1"):
            assert not ops.compiled_for(torch.device("cuda"))
        assert ops.compiled_for(torch.device("cpu")) == ops.compiled_for(torch.device("meta")) == ops.HAS_EXTENSION
    finally:
        ops._has_cuda_kernels.cache_clear()


def inputs(rows: int = 33, columns: int = 1023):
    generator = torch.Generator().manual_seed(0)
    mu, rho = torch.randn(2, rows, columns, generator=generator).unbind()
    rho[0, 0] = -torch.inf
    return mu, rho, torch.tensor([-123456789123456789, 7])


def on_both(tensors):
    return tensors, [t.cuda() for t in tensors]


def sample(mu, rho, key, **options):
    return OPS._sample_normal(*draw_arguments(mu, rho, key=key, prior=bf.Normal(0.1, 0.7), **options))


@pytest.mark.cuda
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("scale", SCALES)
def test_sample_normal_has_the_bits_of_the_cpu(scale, kl):
    options = dict(scale=scale, kl=kl, n_samples=3, stream=1, row_offset=5, column_offset=6)
    (weight, value), (on_gpu, value_on_gpu) = (sample(*tensors, **options) for tensors in on_both(inputs()))
    assert torch.equal(on_gpu.cpu().view(torch.int32), weight.view(torch.int32))
    assert value_on_gpu.item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.cuda
def test_many_weights_have_the_bits_of_the_cpu():
    (weight, _), (on_gpu, _) = (sample(*tensors) for tensors in on_both(inputs(4096, 8192)))
    assert torch.equal(on_gpu.cpu().view(torch.int32), weight.view(torch.int32))


@pytest.mark.cuda
def test_beyond_two_to_the_31_elements():
    rows, columns = 2**16 + 4, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    mu, rho = (torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x, grad_y = (torch.randn(2, n, dtype=torch.bfloat16, device="cuda") for n in (columns, rows))
    key = torch.tensor([1, 2], device="cuda")

    def step(first):
        """The weights, outputs and gradients of the rows from `first` on."""
        parameters = [t[first:].detach().requires_grad_() for t in (mu, rho)]
        w, _ = bf.functional.sample_normal(*parameters, key, kl=None, row_offset=first)
        last = w[-4:].detach().clone()
        del w
        y, _ = bf.functional.variational_linear(x, *parameters, None, None, key, kl=None, row_offset=first)
        gradients = torch.autograd.grad(y, parameters, grad_y[:, first:])
        return last, y[:, -4:].detach(), *(g[-4:].clone() for g in gradients)

    for whole, part in zip(step(0), step(rows - 4)):
        torch.testing.assert_close(whole, part)


@pytest.mark.cuda
def test_kernels_run_on_the_current_stream():
    mu, rho, key = (t.cuda() for t in inputs(2048, 4096))
    expected, _ = sample(mu * 2, rho, key, kl="analytic")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        doubled = mu * 2  # on the default stream the kernel would read this before it is written
        weight, _ = sample(doubled, rho, key, kl="analytic")
    stream.synchronize()
    assert torch.equal(weight, expected)


@pytest.mark.cuda
def test_a_cuda_graph_draws_afresh_at_every_replay():
    layer = bf.VariationalLinear(64, 32, device="cuda")
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        first = y.clone()
        graph.replay()
    assert not torch.equal(first, y)


def captured(step):
    """(graph, what step gives in it), after a few calls that may allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


IN_EVERY_REGIME = [pytest.param(*sizes, "weight", id=name) for name, sizes in (
    ("small", (32, 100)), ("fused", (256, 8)), ("drawn", (256, 100)))] + [
    pytest.param(256, batch, estimator, id=f"{estimator}, batch {batch}") for estimator in ("local", "flipout") for batch in (8, 100)]


@pytest.mark.cuda
@pytest.mark.parametrize("features, batch, estimator", IN_EVERY_REGIME)
def test_a_training_step_in_a_cuda_graph_draws_afresh_and_learns(features, batch, estimator):
    torch.manual_seed(0)
    layer = bf.VariationalLinear(features, features, estimator=estimator, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, capturable=True)
    x, target = torch.randn(2, batch, features, device="cuda").unbind()
    losses = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = (layer(x) - target).square().mean() + 1e-6 * bf.kl_divergence(layer)
        loss.backward()
        optimizer.step()
        return loss

    graph, loss = captured(step)
    for _ in range(100):
        graph.replay()
        losses.append(loss.item())
    assert len(set(losses)) == len(losses)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.cuda
@pytest.mark.parametrize("features, batch, estimator", IN_EVERY_REGIME)
def test_a_step_never_waits_for_the_device(features, batch, estimator):
    layer = bf.VariationalLinear(features, features, estimator=estimator, device="cuda")
    x = torch.randn(batch, features, device="cuda", requires_grad=True)
    (layer(x).square().mean() + bf.kl_divergence(layer)).backward()  # what is loaded at first may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        (layer(x).square().mean() + bf.kl_divergence(layer)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tutorial_network(layer=bf.VariationalLinear):
    sizes = (1, 20, 20, 20, 20, 1)
    return torch.nn.Sequential(*[part for pair in zip(sizes, sizes[1:]) for part in (layer(*pair), torch.nn.ReLU())][:-1]).cuda()


def kernels_of_a_step(model) -> list[str]:
    elbo = bf.ELBO(model, bf.Gaussian(1.0).cuda(), 100)
    x, y = torch.randn(8, 1, device="cuda"), torch.randn(8, 1, device="cuda")
    elbo(x, y).backward()
    for parameter in elbo.parameters():
        parameter.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        elbo(x, y).backward()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.cuda
def test_launches_of_a_training_step():
    """tests/inference/test_launches.py counts the same without a GPU: of layers one by one at most two each way, of a chain three in all,
    beside loss and optimizer.
    """
    beside = len(kernels_of_a_step(tutorial_network(torch.nn.Linear))) - 5 - 9 - 5  # addmm, mm and the biases' sums
    one_by_one = tutorial_network()
    for layer in one_by_one:
        layer.register_forward_hook(lambda *_: None)  # no chain
    assert len(kernels_of_a_step(one_by_one)) - beside <= 2 * 2 * 5
    activations = 4 + 4
    found = kernels_of_a_step(tutorial_network())
    assert sum("chain" in name for name in found) == 4
    assert len(found) - (beside - activations) <= 3 + 3


@pytest.mark.cuda
def test_a_chain_is_that_of_the_cpu():
    torch.manual_seed(0)
    model, x = tutorial_network(), torch.linspace(-1, 1, 700).unsqueeze(1)
    with bf.sampling(model, seed=3, n_samples=5):
        on_gpu = bf.fuse(model)(x.cuda().repeat(5, 1))
    on_cpu = bf.fuse(model.cpu())
    with bf.sampling(on_cpu, seed=3, n_samples=5):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu(x.repeat(5, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_in_a_cuda_graph_draws_afresh(dtype):
    model, x = bf.fuse(tutorial_network().to(dtype)), torch.randn(128, 1, device="cuda", dtype=dtype)

    def step():
        y = model(x)
        (y.float().square().mean() + 1e-6 * bf.kl_divergence(model)).backward()
        return y

    graph, y = captured(step)
    found = []
    for _ in range(3):
        graph.replay()
        found.append(y.clone())
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_tensors_device():
    layer = bf.VariationalLinear(256, 256, device="cuda:1")
    with torch.cuda.device(0):
        y = layer(torch.randn(8, 256, device="cuda:1"))
        y.square().mean().backward()
    assert y.device.index == layer.weight_mu.grad.device.index == 1 and layer.weight_mu.grad.isfinite().all()


@pytest.mark.cuda
def test_a_layer_draws_on_cuda_what_it_draws_on_the_cpu():
    layer = bf.VariationalLinear(127, 33)
    on_cpu = bf.draw(layer, seed=3)
    on_gpu = bf.draw(layer.cuda(), seed=3)
    torch.testing.assert_close(on_gpu.weight.cpu(), on_cpu.weight, rtol=1e-6, atol=1e-7)
    layer(torch.randn(5, 127, device="cuda")).sum().backward()
    assert layer.weight_rho.grad.isfinite().all() and bf.kl_divergence(layer).item() > 0


@pytest.mark.cuda
@pytest.mark.parametrize("factorised", [True, False])
def test_a_noisy_layer_is_that_of_the_cpu(factorised):
    layer, x = bf.NoisyLinear(40, 30, factorised=factorised), torch.randn(8, 40)
    expected = layer(x)
    right = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    layer.cuda()
    found = layer(x.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
    for gradient, of_cpu in zip(gradients, right):
        torch.testing.assert_close(gradient.cpu(), of_cpu, rtol=1e-3, atol=1e-3)
    layer.reset_noise()
    assert layer.noise_key.is_cuda and not torch.equal(layer(x.cuda()), found)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator, number", [("local", 1), ("flipout", 2)])
def test_estimators_are_those_of_the_cpu(estimator, number, dtype, rows):
    generator = torch.Generator().manual_seed(1)
    x, grad_y, mu, rho, bias_mu, bias_rho = (torch.randn(*shape, generator=generator).to(dtype) for shape in (
        (rows, 200), (rows, 72), (72, 200), (72, 200), (72,), (72,)))
    rho[0, 0] = -torch.inf
    grad_kl = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32))

    def step(x, grad_y, grad_kl, key, *parameters):
        arguments = draw_arguments(*parameters, key=key, prior=bf.Normal(0.1, 0.7), kl="analytic")
        arguments = *arguments[:-1], [*arguments[-1], number]
        y, kl, kept = OPS._estimated_linear(x, *arguments)
        return y, kl, *OPS._estimated_linear_backward([grad_y, grad_kl], x, *arguments, True, kept)

    given = x, grad_y, grad_kl, torch.tensor([-123456789123456789, 7, 11]), mu, rho, bias_mu, bias_rho
    expected, found = (step(*tensors) for tensors in on_both(given))
    for a, b in zip(found, expected, strict=True):
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4 + torch.finfo(a.dtype).eps
        assert (a.cpu() - b).abs().max() <= tolerance * b.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(step(*on_both(given)[1]), found))  # the same bits again
