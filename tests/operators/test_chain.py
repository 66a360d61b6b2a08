"""The chain of narrow layers as one operator, against the reference of its layers one by one, in float64, and finite differences."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import chains
import pytest
import torch
from chains import NUMBERS, in_dtype, links_of, plain
from common import needs_extension, needs_nodes
from kernels import KLS, OPS, one_thread, random  # noqa: F401

from bnn_fast import checks, functional
from bnn_fast.operators import arguments as packing
from bnn_fast.operators import autograd, raw

pytestmark = needs_extension
# sizes, rows, samples, shared, which layers are not drawn, which have no bias: widths that fill tiles and that do not, strips of 4, 2
# and 1 vectors, ragged ones, several tasks
SHAPES = {
    "regression": ((13, 50, 1), 32, 1, False, (), ()),
    "narrow": ((1, 20, 20, 1), 37, 3, False, (), ()),
    "shared": ((5, 7, 33, 2), 70, 2, True, (1,), (0, 2)),
    "wide": ((128, 128, 10), 300, 1, False, (0,), ()),
    "wider": ((9, 200, 3), 90, 2, True, (), ()),
    "one row": ((3, 4, 2), 1, 2, False, (), ()),
    "tasks": ((2, 8, 1), 1100, 1, False, (), (1,)),
}


def compiled(x, links, kl, samples, shared, scale="softplus"):
    return autograd.CHAIN.apply(x, *packing.to_chain(links, scale, kl, samples, shared))


def compare(shape, activation="relu", kl="analytic", dtype=torch.float32, **options):
    results = lambda x, links, *of: chains.all_of(compiled, x, links, dtype, *of)  # noqa: E731
    chains.compare(results, SHAPES[shape], activation, kl, dtype, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kl", KLS)
def test_against_the_reference(shape, kl):
    compare(shape, kl=kl)


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations(activation, dtype):
    compare("narrow", activation, dtype=dtype)


def test_tensors_of_priors_and_an_activation_at_the_end():
    compare("shared", "tanh", tensors=True, last=True)


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_over_the_whole_range(activation, dtype):
    """Through an identity as weight."""
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-200.0, -90.0, -1e-6, -1e-30, 0.0, 1e-30, 1e-6, 90.0, 200.0, 1e30])])
    z = z.to(dtype).unsqueeze(1).requires_grad_()
    numbers = (*map(float, NUMBERS.get(activation, ())), 0.0, 0.0)[:2]
    one = packing.Link([torch.ones(1, 1, dtype=dtype)], None, None, (checks.ACTIVATIONS[activation], *numbers))
    y, _ = compiled(z, [one], None, 1, False)
    slope, = torch.autograd.grad(y.sum(), z)
    wide = z.detach().double().requires_grad_()
    truth, _ = plain(wide, [one._replace(tensors=[torch.ones(1, 1, dtype=torch.float64)])], None, 1, False)
    slope_truth, = torch.autograd.grad(truth.sum(), wide)
    eps = torch.finfo(dtype).eps
    assert ((y - truth).abs() <= 8 * eps * (truth.abs() + z.abs().clamp(max=4) + 1e-3)).all()
    times = 16 if dtype == torch.float32 else 64  # in float64 the truth errs as much
    assert ((slope - slope_truth).abs() <= times * eps * (1 + slope_truth.abs())).all()


def test_an_activation_keeps_what_is_no_number():
    nan = torch.full((1, 1), torch.nan)
    for activation, code in checks.ACTIVATIONS.items():
        link = packing.Link([torch.ones(1, 1)], None, None, (code, 1.0, 20.0))
        assert compiled(nan, [link], None, 1, False)[0].isnan().all(), activation


def test_weights_are_those_of_the_layers_bit_for_bit():
    """kept holds them, as sample_normal draws them."""
    links = links_of((5, 7, 3))
    arguments = packing.to_chain(links, "softplus", None, 4, False)
    kept = OPS._variational_chain(torch.zeros(4, 5), *arguments)[2]
    drawn = [functional.sample_normal(*link.tensors[2 * i:2 * i + 2], link.key, n_samples=4, stream=i, kl=None)[0].flatten()
             for link in links for i in range(2)]
    assert torch.equal(kept, torch.cat(drawn))


def test_many_samples_are_drawn_in_groups():
    """More weights than are kept: y, and gradients without what a forward kept, are those of a smaller chain's."""
    links = links_of((64, 64, 3), without_bias=(0, 1))
    samples = 300  # of 4,288 weights
    x = random(2, 64)
    y, kl, kept = OPS._variational_chain(x, *packing.to_chain(links, "softplus", "sampled", samples, True))
    assert kept.numel() == 0 and samples * 4288 > packing.KEPT
    some = [link._replace(key=link.key + torch.tensor([0, 256])) for link in links]
    part, _, kept = OPS._variational_chain(x, *packing.to_chain(some, "softplus", None, 44, True))
    assert kept.numel() == 44 * 4288 and torch.equal(y[2 * 256:], part)
    _, value = plain(x.double(), in_dtype(links, torch.float64), "sampled", samples, True)
    assert abs(kl / value - 1) < 1e-5


@pytest.mark.parametrize("shape", ["narrow", "tasks"])
def test_gradients_do_not_depend_on_what_is_kept(shape):
    sizes, rows, samples, shared, fixed, without = SHAPES[shape]
    arguments = packing.to_chain(links_of(sizes, fixed, without), "softplus", "analytic", samples, shared)
    x = random(samples * rows, sizes[0])
    y, _, kept = OPS._variational_chain(x, *arguments)
    grads = [random(*y.shape, seed=4), torch.ones(())]
    with_kept, without_kept = (OPS._variational_chain_backward(grads, x, *arguments, True, k) for k in (kept, None))
    assert all(map(torch.equal, with_kept, without_kept))


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "softplus"])
def test_gradcheck(kl, activation):
    links = in_dtype(links_of((2, 3, 2), (), (1,), activation, torch.float64), torch.float64)
    x = random(6, 2, dtype=torch.float64).requires_grad_()

    def run(x, *tensors):
        given = iter(tensors)
        again = [link._replace(tensors=[next(given) for _ in link.tensors]) for link in links]
        return compiled(x, again, kl, 2, False)

    assert torch.autograd.gradcheck(run, (x, *(t for link in links for t in link.tensors)))


@pytest.mark.parametrize("samples, shared", [(1, False), (3, True), (2, False)])
def test_opcheck(samples, shared):
    links = links_of((3, 5, 2), (1,), tensors=True)
    arguments = packing.to_chain(links, "softplus", "analytic", samples, shared)
    x = random(6, 3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(raw.variational_chain, (x, *arguments), test_utils=tests)
    y, kl, kept = raw.variational_chain(x, *arguments)
    for grads in ([torch.ones_like(y), kl], [None, kl]):
        torch.library.opcheck(raw.variational_chain_backward, (grads, x, *arguments, True, kept), test_utils=tests)


@needs_nodes
def test_kl_alone_and_nll_alone():
    links = in_dtype(links_of((3, 4, 2)), torch.float32)
    tensors = [t for link in links for t in link.tensors]
    x = random(5, 3)
    arguments = packing.to_chain(links, "softplus", "analytic", 1, False)
    y, call = autograd.draw(autograd.CHAIN, x, arguments)
    apart = [torch.autograd.grad(autograd.read([call]), tensors), torch.autograd.grad(y.sum(), tensors, retain_graph=True)]
    both = torch.autograd.grad(y.sum() + autograd.read([call]), tensors)
    for kl, nll, total in zip(*apart, both):
        torch.testing.assert_close(kl + nll, total)


def test_an_empty_batch():
    links = in_dtype(links_of((3, 4, 2), (1,)), torch.float32)
    x = torch.zeros(0, 3, requires_grad=True)
    y, kl = compiled(x, links, "analytic", 1, False)
    assert y.shape == (0, 2)
    found = torch.autograd.grad(y.sum() + kl, [x, *(t for link in links for t in link.tensors)])
    assert found[0].shape == x.shape and (found[-2] == 0).all() and found[1].any()


def test_overflow_is_no_nan():
    """Rows behind the batch's end, which a strip has, do not reach the sums: 0 times an infinite activation would be NaN."""
    weight = torch.full((4, 3), 1e38)
    links = [packing.Link([weight.requires_grad_(), torch.full((4,), 1e38)], None, None, (1, 0.0, 0.0)),
             packing.Link([torch.full((2, 4), 3e38).requires_grad_()], None, None)]
    x = torch.zeros(3, 3)
    y, _ = compiled(x, links, None, 1, False)
    assert y.isinf().all()
    small = [links[0]._replace(tensors=[weight.detach().requires_grad_(), torch.full((4,), 3.0)]), links[1]]
    grad, = torch.autograd.grad((compiled(x, small, None, 1, False)[0] * 1e-38).sum(), small[1].tensors)
    assert grad.isfinite().all()


def test_results_do_not_depend_on_threads():
    sizes, rows, *_ = SHAPES["tasks"]
    arguments = packing.to_chain(links_of(sizes), "softplus", "analytic", 3, False)
    x = random(3 * rows, sizes[0])

    def results():
        y, kl, kept = OPS._variational_chain(x, *arguments)
        return [y, kl, *OPS._variational_chain_backward([y, kl], x, *arguments, True, kept)]

    one = results()
    torch.set_num_threads(3)
    assert all(map(torch.equal, one, results()))


@pytest.mark.parametrize("change, message", [
    (lambda a: a[4].__setitem__(4, 2), r"shared is 2, expected 0 or 1"),
    (lambda a: a[4].__setitem__(5, 4), r"layer 0 is of kind 4"),
    (lambda a: a[4].__setitem__(6, 10), r"layer 0 has activation 10, expected 0 to 9"),
    (lambda a: a[4].pop(), r"options has 8 numbers, expected scale"),
    (lambda a: a[1].pop(), r"keys has 1"),
    (lambda a: a[3].pop(), r"numbers.*expected 2?"),
    (lambda a: a[0].pop(), r"parameters has 7 tensors"),
    (lambda a: a[0].__setitem__(0, torch.ones(4, 3).double()), r"dtype"),
    (lambda a: (a[0].__setitem__(4, torch.ones(2, 5)), a[0].__setitem__(5, torch.ones(2, 5))), r"layer 1 has 5 inputs, expected 4"),
])
def test_refused(change, message):
    arguments = [list(a) for a in packing.to_chain(links_of((3, 4, 2)), "softplus", None, 1, False)]
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS._variational_chain(torch.ones(2, 3), *arguments)


def test_other_inputs_are_refused():
    links = links_of((3, 4, 2))
    arguments = packing.to_chain(links, "softplus", None, 2, False)
    for x, message in ((torch.ones(2, 4), r"x has shape \[2, 4\], expected \[..., 3\]"), (torch.ones(3, 3), "multiple of n_samples = 2"),
                       (torch.ones(2, 3).double(), "another dtype or device")):
        with pytest.raises(RuntimeError, match=message):
            OPS._variational_chain(x, *arguments)
    half = [link._replace(tensors=[t.half() for t in link.tensors]) for link in links]
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        OPS._variational_chain(torch.ones(2, 3).half(), *packing.to_chain(half, "softplus", None, 1, False))
    with pytest.raises(RuntimeError, match="layer 0 has 1025 inputs and 2 outputs, expected at most 1024"):
        OPS._variational_chain(torch.ones(2, 1025), *packing.to_chain(links_of((1025, 2)), "softplus", None, 1, False))


@pytest.mark.parametrize("instruction_set", ["generic", "avx2", "avx2x16"])
def test_on_other_instruction_sets(instruction_set):
    here = Path(__file__)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here), "-k",
                           "reference or activations or kept or threads or whole_range"],
                          env={**os.environ, "BNN_FAST_CPU": instruction_set}, capture_output=True, text=True)
    if "that this processor supports" in done.stdout + done.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert done.returncode == 0, done.stdout[-3000:]
