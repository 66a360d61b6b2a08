"""Rows that are looked up: bits of the whole draw, KL and gradients, on every instruction set; what is refused; repeatability."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import needs_extension
from kernels import DTYPES, KEY, KLS, OPS, SCALES, draw_arguments, one_thread, posterior, random  # noqa: F401
from row_judging import COUNTS, DRAWS, ROWS, check_rows, make_rows

from bnn_fast import Normal
from bnn_fast.operators import autograd, raw
from bnn_fast.operators import arguments as packing

pytestmark = needs_extension
TESTS = ("test_schema", "test_faketensor")
# Up to 128 columns a span has several rows (csrc/cpu/span.h), unless there is a KL; 64 are in place with every vector type, 300
# take two spans, and 4100 two tasks.
COLUMNS = (1, 6, 64, 65, 300, 4100)


def arguments(mu, rho, rows, *, key=KEY, scale="softplus", kl=None, n_samples=1, gradient="sparse", stream=0, prior=Normal(), counts=(),
              **options) -> tuple:
    return packing.to_look_up([mu, rho], [rows, *counts], key, packing.pack_priors(prior), scale, kl, n_samples, stream, gradient,
                              **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_are_those_of_the_whole_draw_bit_for_bit(columns, dtype):
    mu, rho = posterior(30, columns, dtype=dtype)
    rho[:, ::5] = -torch.inf
    for scale, key in itertools.product(SCALES, (KEY, torch.tensor([-1, 2**32 - 2]))):
        place = dict(stream=3, row_offset=2**32 - 40, column_offset=6)
        whole, _ = OPS._sample_normal(*draw_arguments(mu, rho, key=key, scale=scale, n_samples=3, **place))
        rows = torch.randint(30, (60,), generator=torch.Generator().manual_seed(1))
        rows[:20:4], draws = 7, torch.arange(60) // 20
        found, kl, _ = OPS._sample_rows(*arguments(mu, rho, rows, key=key, scale=scale, n_samples=3, **place))
        assert torch.equal(found.view(torch.uint8), whole[draws, rows].contiguous().view(torch.uint8)) and kl.shape == (0,)
        draws = draws.flip(0) % 2 + torch.arange(60) % 2  # in no order
        found = OPS._sample_rows(*arguments(mu, rho, torch.stack((rows, draws)), key=key, scale=scale, n_samples=3, **place))[0]
        assert torch.equal(found.view(torch.uint8), whole[draws, rows].contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_their_kl_and_gradients_bit_for_bit(columns, kl, dtype):
    for i, scale in enumerate(SCALES):
        check_rows(columns, dtype=dtype, kl=kl, scale=scale, tensors=(False, True, "loc", "scale")[i % 4],
                   look_up=([ROWS, COUNTS], [torch.stack((ROWS, DRAWS)), COUNTS], [ROWS])[i % 3], n_samples=1 + i % 2, stream=i,
                   row_offset=5 * i, column_offset=3 * i)


def test_a_row_that_was_never_counted_has_an_infinite_kl_unless_it_is_pruned():
    given = make_rows(6, look_up=[torch.tensor([0, 2]), torch.zeros(7, dtype=torch.int64)])
    assert given.run()[1] == torch.inf
    pruned = given._replace(look_up=[torch.tensor([2, 2]), given.look_up[1]])
    y, kl, gradients = pruned.run()
    assert kl == 0 and torch.equal(y, pruned.mu[[2, 2]]) and all((g._values() == 0).all() for g in gradients)
    nothing = given._replace(grad_kl=torch.tensor(0.0)).run()[2]  # a KL of weight 0, as at the start of a warm-up
    assert all(g._values().isfinite().all() for g in nothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_that_is_kept_is_that_which_is_drawn_again_bit_for_bit(dtype):
    for columns, kl in itertools.product((6, 64, 130), KLS):
        given = make_rows(columns, dtype=dtype, kl=kl)
        kept = OPS._sample_rows(*given.arguments())[2]
        assert kept.shape == given.grad_y.shape and kept.dtype == torch.promote_types(dtype, torch.float32)
        found = [OPS._sample_rows_backward([given.grad_y, given.grad_kl], *given.arguments(), noise) for noise in (kept, None, kept[:0, 0])]
        for others in found[1:]:
            for a, b in zip(found[0], others):
                assert torch.equal(a._values(), b._values())
    much = make_rows(64, look_up=[torch.zeros(packing.KEPT // 64 + 1, dtype=torch.int64)], kl=None)
    assert raw.sample_rows(*much.arguments())[2].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_frequency(dtype):
    rows = torch.tensor([3, 3, 0, 3])
    given = make_rows(5, dtype=dtype, kl=None, look_up=[rows])
    for gradient, sparse in zip(given.run("by frequency")[2], given.run()[2]):
        expected = sparse.to_dense().double() / rows.bincount(minlength=7).clamp(min=1)[:, None]
        torch.testing.assert_close(gradient.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_results_do_not_depend_on_the_number_of_threads():
    rows = torch.randint(7, (3000,), generator=torch.Generator().manual_seed(2))
    given = make_rows(130, look_up=[rows, COUNTS + 1], kl="sampled", n_samples=3)

    def everything():
        found = [given.run(gradient) for gradient in ("sparse", "dense")]
        return [t.to_dense() for y, kl, gradients in found for t in (y, kl, *gradients)]

    expected = everything()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(2):
            for got, first in zip(everything(), expected, strict=True):
                assert torch.equal(got, first), threads


@pytest.mark.parametrize("gradient", packing.GRADIENTS)
@pytest.mark.parametrize("count, table, columns", [(0, 4, 3), (0, 0, 3), (3, 4, 0), (0, 4, 0)])
def test_empty_shapes_give_empty_results(count, table, columns, gradient):
    mu, rho = posterior(table, columns)
    for kl in ("analytic", "sampled"):
        given = arguments(mu, rho, torch.zeros(count, dtype=torch.int64), kl=kl, gradient=gradient)
        y, value, kept = OPS._sample_rows(*given)
        assert y.shape == (count, columns) and value == 0
        for g in OPS._sample_rows_backward([y, torch.tensor(1.0)], *given, kept):
            assert g.shape == (table, columns) and not g.to_dense().any()


def test_what_is_refused():
    mu, rho = posterior(4, 3)
    good = dict(kl="analytic", counts=[torch.ones(4, dtype=torch.int64)])
    for rows, changed, message in (
            (torch.tensor([0, 4]), {}, "rows has row number 4, expected 0 to 3"),
            (torch.tensor([-1]), {}, "rows has row number -1, expected 0 to 3"),
            (torch.tensor([0], dtype=torch.int32), {}, "rows has dtype number 3, expected int64"),
            (torch.zeros(3, 2, dtype=torch.int64), {}, r"rows has shape \[3, 2\], expected \[T\], or \[2, T\]"),
            (torch.tensor([0, 1, 2]), {"n_samples": 2}, r"rows has shape \[3\], expected equal parts of the 2 draws"),
            (torch.tensor([0]), {"counts": [torch.ones(3, dtype=torch.int64)]}, r"counts has shape \[3\], expected one for each .*\[4\]"),
            (torch.tensor([0]), {"counts": [torch.ones(4)]}, "counts has dtype number 6, expected int64"),
            (torch.tensor([0]), {"counts": [torch.ones(4, dtype=torch.int64)] * 2}, "look_up has 3 tensors, expected rows, and maybe counts"),
            (torch.tensor([0]), {"row_offset": -1}, "row_offset and column_offset are -1"),
            (torch.tensor([0]), {"n_samples": 0}, "n_samples is 0")):
        given = arguments(mu, rho, rows, **{**good, **changed})
        for call in (lambda: OPS._sample_rows(*given), lambda: OPS._sample_rows_backward([None, None], *given, None)):
            with pytest.raises(RuntimeError, match=message):
                call()
    given = arguments(mu, rho, torch.tensor([0]), **good)
    for grads, kept, message in (([torch.ones(2, 3), None], None, r"grad_y has shape \[2, 3\], expected \[1, 3\]"),
                                 ([None, torch.ones(1)], None, r"grad_kl has shape \[1\], expected \[\]"),
                                 ([None, None], torch.ones(2, 3), r"kept has shape \[2, 3\], expected \[1, 3\]"),
                                 ([None], None, "grads has 1 tensors")):
        with pytest.raises(RuntimeError, match=message):
            OPS._sample_rows_backward(grads, *given, kept)
    with pytest.raises(RuntimeError, match=r"mu has shape \[3\], expected \[table's rows, columns\]"):
        OPS._sample_rows(*arguments(*posterior(3), torch.tensor([0])))
    *others, options = given
    for wrong, message in ((options[:-1], "options has 7 numbers, expected 8"), ([*options[:-1], 3], "gradient is 3, expected 0")):
        with pytest.raises(RuntimeError, match=message):
            OPS._sample_rows(*others, wrong)
    with pytest.raises(ValueError, match="counts: expected to be on cpu as mu is"):
        OPS._sample_rows(*arguments(mu, rho, torch.tensor([0]), kl="analytic", counts=[good["counts"][0].to("meta")]))


@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("gradient", packing.GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, gradient, kl):
    given = make_rows(5, dtype=dtype, kl=kl, look_up=[torch.stack((ROWS, DRAWS)), COUNTS])
    torch.library.opcheck(raw.sample_rows, given.arguments(gradient), test_utils=TESTS)
    for grads in ([given.grad_y, given.grad_kl], [given.grad_y, None], [None, given.grad_kl]):
        for kept in (raw.sample_rows(*given.arguments(gradient))[2], None):
            torch.library.opcheck(raw.sample_rows_backward, (grads, *given.arguments(gradient), kept), test_utils=TESTS)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("scale", SCALES)
def test_gradcheck(scale, kl):
    mu, rho = posterior(5, 3, dtype=torch.float64)
    rows, counts = torch.tensor([[4, 1, 1, 0], [0, 1, 0, -1]]), torch.tensor([1, 2, 1, 1, 3])

    def run(mu, rho):
        return autograd.ROWS.apply(*arguments(mu, rho, rows, kl=kl, scale=scale, gradient="dense", counts=[counts], weight=1.5, n_samples=2,
                                              prior=Normal(0.2, 0.7)))

    assert torch.autograd.gradcheck(run, (mu.requires_grad_(), rho.requires_grad_()))
