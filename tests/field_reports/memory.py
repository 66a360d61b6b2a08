"""Nothing is read or written beyond a tensor's end, and no operator takes what it cannot compute with."""
from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import pytest
import torch
from common import needs_extension
from kernels import KEY, OPS, draw_arguments, kl_arguments, posterior, random

import bnn_fast as bf
from bnn_fast import functional

pytestmark = needs_extension

# batch, in, out, samples: around whole blocks of 64 rows; rows shorter than a vector of 8 or 16 lanes, and not.
NARROW = [(batch, inputs, outputs, samples)
          for batch in (1, 2, 9, 63, 64, 65, 66, 129)
          for inputs, outputs in ((8, 1), (3, 5), (40, 3), (1, 20), (20, 1), (7, 17))
          for samples in (1, 3)]
OTHERS = [(5, 69, 3, 1), (5, 69, 9, 2), (40, 69, 7, 1), (130, 3, 65, 1), (3, 5, 0, 1), (0, 5, 3, 1), (3, 0, 4, 1)]


@pytest.mark.parametrize("cases", [NARROW, OTHERS], ids=["narrow", "others"])
def test_no_kernel_touches_what_lies_beyond_its_tensors(cases):
    program = pathlib.Path(__file__).parents[1] / "guard_pages.py"
    done = subprocess.run([sys.executable, program, *(",".join(map(str, case)) for case in cases)], text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (
        f"exit status {done.returncode} at batch,in,out,samples {done.stdout.splitlines()[-1:]}\n{done.stderr[-2000:]}")


PAIR, LAYER = ("mu", "rho"), ("weight_mu", "weight_rho", "bias_mu", "bias_rho")


def sample_arguments(**changed) -> tuple:
    given = dict(zip(PAIR, posterior(4, 3))) | changed
    return draw_arguments(*[given.pop(name) for name in PAIR], kl="analytic", **given)


def layer_arguments(**changed) -> tuple:
    given = dict(zip(LAYER, (*posterior(4, 3), *posterior(4, seed=1)))) | changed
    return draw_arguments(*[given.pop(name) for name in LAYER], kl="analytic", **given)


@pytest.mark.parametrize("name", ["row_offset", "column_offset"])
@pytest.mark.parametrize("value", [2 ** 63 - 1, 2 ** 62, 2 ** 34, -1])
def test_offsets_beyond_the_counter_are_refused(name, value):
    with pytest.raises(RuntimeError, match="offset"):
        OPS._sample_normal(*sample_arguments(**{name: value}))
    with pytest.raises(RuntimeError, match="offset"):
        OPS._variational_linear(random(2, 3), *layer_arguments(**{name: value}))
    mu, rho = posterior(4, 3)
    with pytest.raises(ValueError, match=f"{name}: expected 0 to .*, given {value}"):
        functional.sample_normal(mu, rho, KEY, **{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected 0 to .*, given {value}"):
        functional.variational_linear(random(2, 3), mu, rho, None, None, KEY, **{name: value})


def test_the_last_row_and_column_of_the_counter_are_drawn():
    mu, rho = posterior(4, 3)
    last = dict(row_offset=2 ** 32 - 4, column_offset=2 ** 34 - 3)
    w, _ = functional.sample_normal(mu, rho, KEY, **last)
    torch.testing.assert_close(w, bf.reference.sample_normal(mu, rho, KEY, **last)[0])
    for name in last:
        with pytest.raises(ValueError, match=name):
            functional.sample_normal(mu, rho, KEY, **{name: last[name] + 1})


@pytest.mark.parametrize("stream", [-1, 2 ** 32, 2 ** 40])
def test_a_stream_beyond_its_word_is_refused(stream):
    with pytest.raises(RuntimeError, match=rf"stream is {stream}, expected 0 to 2\^32 - 1"):
        OPS._sample_normal(*sample_arguments(stream=stream))
    with pytest.raises(ValueError, match=f"stream: expected 0 to 4294967295, given {stream}"):
        functional.sample_normal(*posterior(4, 3), KEY, stream=stream)


@pytest.mark.parametrize("value", [True, torch.tensor(1), 1.0, "1"])
def test_an_offset_is_an_integer(value):
    for name in ("row_offset", "column_offset", "stream"):
        with pytest.raises(TypeError, match=f"{name}: expected an integer"):
            functional.sample_normal(*posterior(4, 3), KEY, **{name: value})


def test_more_samples_than_the_counter_has_are_refused_at_once():
    begin = time.monotonic()
    for n_samples in (2 ** 40, 2 ** 62):
        for call in (lambda: OPS._sample_normal_backward([None, None], *sample_arguments(n_samples=n_samples)),
                     lambda: OPS._sample_normal(*sample_arguments(n_samples=n_samples)),
                     lambda: OPS._variational_linear(random(0, 3), *layer_arguments(n_samples=n_samples)),
                     lambda: OPS._variational_linear_backward([None, torch.tensor(1.0)], None,
                                                              *layer_arguments(n_samples=n_samples), False)):
            with pytest.raises(RuntimeError, match=f"n_samples is {n_samples}"):
                call()
        with pytest.raises(ValueError, match="n_samples"):
            functional.sample_normal(*posterior(4, 3), KEY, n_samples=n_samples)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("grad, message", [(torch.ones(2), r"shape \[2\], expected \[\]"),
                                           (torch.ones((), dtype=torch.float64), "dtype"),
                                           (torch.ones((), dtype=torch.int64), "dtype"),
                                           (torch.ones(0), r"shape \[0\]")])
def test_a_kl_gradient_that_does_not_fit_is_refused(grad, message):
    with pytest.raises(RuntimeError, match=f"grad_kl has .*{message}"):
        OPS._variational_linear_backward([None, grad], None, *layer_arguments(), False)
    with pytest.raises(RuntimeError, match=f"grad_kl has .*{message}"):
        OPS._sample_normal_backward([None, grad], *sample_arguments())


@pytest.mark.parametrize("name", ["x", *LAYER, "key"])
def test_a_tensor_without_data_among_others_is_refused(name):
    given = dict(zip(("x", *LAYER, "key"), (random(2, 3), *posterior(4, 3), *posterior(4, seed=1), KEY)))
    given[name] = given[name].to("meta")
    x, arguments = given.pop("x"), layer_arguments(**given)
    with pytest.raises(ValueError, match="expected to be on (cpu|meta)"):
        OPS._variational_linear(x, *arguments)
    with pytest.raises(ValueError, match="expected to be on (cpu|meta)"):
        OPS._variational_linear_backward([random(2, 4), None], x, *arguments, True)
    mu, rho = posterior(4, 3)
    for name, elsewhere in (("rho", rho.to("meta")), ("key", KEY.to("meta"))):
        arguments = sample_arguments(**{name: elsewhere})
        with pytest.raises(ValueError, match=f"{name}: expected to be on cpu as mu is"):
            OPS._sample_normal(*arguments)
        with pytest.raises(ValueError, match=f"{name}: expected to be on cpu as mu is"):
            OPS._sample_normal_backward([None, None], *arguments)
    with pytest.raises(ValueError, match="rho: expected to be on cpu as mu is"):
        OPS._kl_normal(*kl_arguments(mu, rho.to("meta")))
    with pytest.raises(ValueError, match=r"prior\[1\]: expected to be on cpu as mu is"):
        OPS._kl_normal(*kl_arguments(mu, rho, prior=bf.Normal(mu, torch.ones(4, 3, device="meta"))))


@pytest.mark.parametrize("missing", ["weight_rho", "bias_mu"])
def test_a_layer_that_was_loaded_by_half_says_what_is_missing(missing):
    """load_state_dict(assign=True, strict=False) leaves the rest on the meta device."""
    whole = bf.VariationalLinear(3, 4)
    with torch.device("meta"):
        layer = bf.VariationalLinear(3, 4)
    state = {name: t for name, t in whole.state_dict().items() if name != missing}
    layer.load_state_dict(state, assign=True, strict=False)
    for call in (lambda: layer(random(2, 3)), lambda: bf.kl_divergence(layer), lambda: bf.predict(layer, random(2, 3))):
        with pytest.raises((ValueError, RuntimeError), match="mu|rho"):
            call()


@pytest.mark.parametrize("name", ["x", *LAYER, "key"])
def test_a_storage_that_was_made_smaller_is_refused(name):
    given = dict(zip(("x", *LAYER, "key"), (random(2, 3), *posterior(4, 3), *posterior(4, seed=1), KEY.clone())))
    given[name].untyped_storage().resize_(4 if name == "weight_mu" else 0)
    x, arguments = given.pop("x"), layer_arguments(**given)
    with pytest.raises(RuntimeError, match="storage of . bytes, expected at least"):
        OPS._variational_linear(x, *arguments)
    with pytest.raises(RuntimeError, match="storage of . bytes, expected at least"):
        OPS._variational_linear_backward([random(2, 4), None], x, *arguments, True)
    gone = random(2, 4)
    gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="grad_y has .* storage of 0 bytes"):
        OPS._variational_linear_backward([gone, None], random(2, 3), *layer_arguments(), True)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 1, 65])
def test_empty_shapes_give_empty_results(shape, batch):
    weight = posterior(*shape)
    arguments = layer_arguments(weight_mu=weight[0], weight_rho=weight[1], bias_mu=None, bias_rho=None)
    x = random(batch, shape[1])
    y, kl = OPS._variational_linear(x, *arguments)
    assert y.shape == (batch, shape[0]) and kl == 0
    gradients = OPS._variational_linear_backward([torch.ones_like(y), None], x, *arguments, True)
    assert gradients[0].shape == x.shape and not gradients[0].any()
