"""The compiled noisy_linear against the reference with the same key: types, regimes, shapes, offsets, pruned weights, bits."""

from __future__ import annotations

import math

import pytest
import torch
from judging import judge
from kernels import (
    DTYPES,
    HALVES,
    KEY,
    OPS,
    draw_arguments,
    expected_regime,
    in_every_regime,
    one_thread,  # noqa: F401
    posterior,
    random,
    regime_of,
)

from bnn_fast import functional, reference

NAMES = ("y", "x", "weight_mu", "weight_sigma", "bias_mu", "bias_sigma")
SHAPES = [(1, 1), (3, 1), (1, 3), (2, 16), (64, 64), (65, 3), (3, 65), (127, 3), (3, 127), (127, 1023), (1023, 127), (1, 1023),
          (4, 256), (5, 257), (0, 5), (5, 0), (0, 0), (1, 4097)]


def normals(n: int, stream: int, offset: int = 0, dtype=torch.float64) -> torch.Tensor:
    return reference.standard_normal(KEY, 1, 1, n, stream=stream, column_offset=offset, dtype=dtype).flatten()


def factors(outputs: int, inputs: int, offsets, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """f(e_out), f(e_in)"""
    found = normals(outputs, 6, offsets[0], dtype), normals(inputs, 5, offsets[1], dtype)
    return tuple(e.sign() * e.abs().double().sqrt().to(dtype) for e in found)


def run(module, arguments, grad_y, offsets):
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in arguments]
    y = module.noisy_linear(*leaves, KEY, row_offset=offsets[0], column_offset=offsets[1])
    found = [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad_y)]
    return found


def magnitudes(x, mu, sigma, bias_mu, bias_sigma, grad_y, offsets) -> list[torch.Tensor]:
    """How large the terms are that each element of the results is the sum of."""
    of_outputs, of_inputs = (f.abs() for f in factors(*mu.shape, offsets))
    x, mu, sigma, g = (t.detach().double().abs().masked_fill(t == -math.inf, 0.0) for t in (x, mu, sigma, grad_y))
    eps = of_outputs.unsqueeze(1) * of_inputs
    w, by_w = mu + sigma * eps, g.flatten(0, -2).mT @ x.flatten(0, -2)
    found = [x @ w.mT, g @ w, by_w, by_w * eps]
    if bias_mu is not None:
        b = bias_mu.double().abs() + bias_sigma.double().abs().masked_fill(bias_sigma == -math.inf, 0.0) * of_outputs
        by_b = g.flatten(0, -2).sum(0)
        found = [found[0] + b, *found[1:], by_b, by_b * of_outputs]
    return found


def check(batch, outputs, inputs, dtype=torch.float32, x_dtype=None, bias=True, offsets=(0, 0), change=lambda *arguments: None):
    mu, sigma = posterior(outputs, inputs, dtype=dtype)
    arguments = [random(*batch, inputs, dtype=x_dtype or dtype, seed=2), mu, sigma,
                 *(posterior(outputs, dtype=dtype, seed=1) if bias else (None, None))]
    change(*arguments)
    grad_y = random(*batch, outputs, dtype=x_dtype or dtype, seed=7)
    got, plain = (run(module, arguments, grad_y, offsets) for module in (functional, reference))
    true = run(reference, [None if a is None else a.double() for a in arguments], grad_y.double(), offsets)
    what = f"{batch}, {outputs} x {inputs}, {offsets}, {dtype}"
    for name, *of in zip(NAMES, got, plain, true, magnitudes(*arguments, grad_y, offsets), strict=False):
        judge(f"{name}: {what}", *of)
    return arguments, got


@in_every_regime
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_in_every_regime(dtype, regime, inputs, batch):
    for bias, offsets in ((True, (0, 0)), (False, (5, 7)), (True, (2**32 - 19, 2**32 - 71))):
        (x, mu, *_), _ = check((batch,), 19, inputs, dtype, bias=bias, offsets=offsets)
        assert regime_of(x, mu, 1) == expected_regime(regime, dtype)


@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_awkward_shapes_of_noisy_layers(outputs, inputs):
    for batch in ((3,), (40,)) if outputs * inputs > 5000 else ((0,), (1,), (24,), (127,), (2, 3), ()):
        for offsets in ((0, 0), (3, 2)):
            if batch != () and (batch, outputs) != ((1,), 1):  # of one number alone plain PyTorch's error may be none by luck
                check(batch, outputs, inputs, offsets=offsets)
    for dtype in (torch.float64, torch.bfloat16):
        check((3,), outputs, inputs, dtype)


@in_every_regime
@pytest.mark.parametrize("x_dtype", HALVES, ids=str)
def test_half_inputs_and_float_parameters(x_dtype, regime, inputs, batch):
    check((batch,), 19, inputs, x_dtype=x_dtype)


@in_every_regime
def test_weights_without_noise(regime, inputs, batch):
    """sigma = -inf: no noise and no gradients; of either sign and 0: noise as it is."""
    masks = random(19, inputs, seed=8) > 0, random(19, seed=9) > 0

    def change(x, mu, sigma, bias_mu, bias_sigma):
        sigma[0], sigma[1] = 0.0, -1.0
        sigma[masks[0]], bias_sigma[masks[1]] = -math.inf, -math.inf

    _, (_, _, *gradients) = check((batch,), 19, inputs, change=change)
    for gradient, mask in zip(gradients, (masks[0], masks[0], masks[1], masks[1])):
        assert torch.equal(gradient == 0, mask)


def test_the_noise_is_that_of_streams_5_and_6_bit_for_bit():
    outputs, inputs = 130, 70
    zero, one = torch.zeros(outputs, inputs), torch.ones(outputs, inputs)
    of_outputs, of_inputs = factors(outputs, inputs, (0, 0), torch.float32)
    for rows in (2, 70):
        y = functional.noisy_linear(torch.eye(inputs)[:rows], zero, one, zero[:, 0].contiguous(), zero[:, 0].contiguous(), KEY)
        assert torch.equal(y, (of_outputs.unsqueeze(1) * of_inputs).T[:rows])
    y = functional.noisy_linear(torch.zeros(1, inputs), zero, zero, zero[:, 0].contiguous(), one[:, 0].contiguous(), KEY)
    assert torch.equal(y[0], of_outputs)
    drawn = functional.sample_normal(torch.zeros(inputs), torch.ones(inputs), KEY, scale="identity", kl=None, stream=5)[0]
    assert torch.equal(drawn, normals(inputs, 5, dtype=torch.float32))


def test_a_shard_has_the_noise_that_it_has_in_the_whole_bit_for_bit():
    mu, sigma, biases = *posterior(40, 70), posterior(40, seed=1)
    x = random(5, 70)
    whole = functional.noisy_linear(x, mu, sigma, *biases, KEY)
    rows = functional.noisy_linear(x, mu[9:], sigma[9:], *(b[9:] for b in biases), KEY, row_offset=9)
    torch.testing.assert_close(rows, whole[:, 9:])
    columns = [functional.noisy_linear(x[:, part], mu[:, part], sigma[:, part], *own, KEY, column_offset=part.start)
               for part, own in ((slice(0, 33), biases), (slice(33, 70), (None, None)))]
    torch.testing.assert_close(sum(columns), whole)


def test_noisy_results_do_not_depend_on_the_number_of_threads_or_on_repetition():
    for outputs, inputs, batch in ((301, 517, 8), (37, 50, 1500)):
        arguments = [random(batch, inputs, seed=2), *posterior(outputs, inputs), *posterior(outputs, seed=1)]
        if regime_of(*arguments[:2], 1) == "drawn":  # without vectors there is no narrow regime, and GEMMs may depend on threads
            continue
        grad_y = random(batch, outputs, seed=7)
        expected = run(functional, arguments, grad_y, (0, 0))
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run(functional, arguments, grad_y, (0, 0)), expected))


@pytest.mark.parametrize("module", [functional, reference])
def test_gradcheck(module):
    for batch, bias in ((2, True), (40, False)):
        biases = posterior(3, dtype=torch.float64, seed=1) if bias else ()
        arguments = [random(batch, 4, dtype=torch.float64), *posterior(3, 4, dtype=torch.float64), *biases]

        def layer(x, mu, sigma, bias_mu=None, bias_sigma=None):
            return module.noisy_linear(x, mu, sigma, bias_mu, bias_sigma, KEY)

        assert torch.autograd.gradcheck(layer, [a.requires_grad_() for a in arguments])
        if module is reference:
            assert torch.autograd.gradgradcheck(layer, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, bias):
    tensors = *posterior(5, 3, dtype=dtype), *(posterior(5, dtype=dtype, seed=1) if bias else (None, None))
    x, arguments = random(4, 2, 3, dtype=dtype), draw_arguments(*tensors, scale="identity", stream=5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS._noisy_linear.default, (x, *arguments), test_utils=tests)
    for need_x in (True, False):
        grads = [random(4, 2, 5, dtype=dtype, seed=4), None]
        torch.library.opcheck(OPS._noisy_linear_backward.default, (grads, x, *arguments, need_x), test_utils=tests)


@pytest.mark.parametrize("changed, message", [
    (dict(scale="exp"), "scale is 1, expected 4"),
    (dict(n_samples=2), "n_samples is 2 and kl is 0, expected 1 and 0"),
    (dict(kl="analytic"), "n_samples is 1 and kl is 1, expected 1 and 0"),
])
def test_the_operator_refuses_what_it_does_not_do(changed, message):
    arguments = draw_arguments(*posterior(5, 3), **{"scale": "identity", "stream": 5, **changed})
    with pytest.raises(RuntimeError, match=message):
        OPS._noisy_linear(random(4, 3), *arguments)
