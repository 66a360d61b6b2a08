"""What the raw operators refuse, argument by argument: they are open to everyone, and a wrong shape must not be read."""

from __future__ import annotations

import pytest
import torch
from kernels import KEY, OPS

F, D, H = torch.float32, torch.float64, torch.float16
OF_LAYER, OF_PAIR = ("weight_mu", "weight_rho", "bias_mu", "bias_rho"), ("mu", "rho")
DRAWING = dict(scale=0, kl=1, n_samples=1, stream=0, row_offset=0, column_offset=0)
LINEAR = dict(
    x=(4, 3),
    weight_mu=(5, 3),
    weight_rho=(5, 3),
    bias_mu=(5,),
    bias_rho=(5,),
    key=KEY,
    weight_loc=None,
    weight_scale=None,
    bias_loc=None,
    bias_scale=None,
    **DRAWING,
)
KL = dict(mu=(5, 3), rho=(5, 3), prior_loc=None, prior_scale=None, scale=0, reduce=1)
SAMPLE = dict(mu=(5, 3), rho=(5, 3), key=KEY, prior_loc=None, prior_scale=None, **DRAWING | dict(n_samples=2))
OPERATORS = {
    "_variational_linear": LINEAR,
    "_variational_linear_backward": dict(grad_y=(4, 5), grad_kl=()) | LINEAR | dict(need_grad_x=True),
    "_sample_normal": SAMPLE,
    "_sample_normal_backward": dict(grad_weight=(2, 5, 3), grad_kl=()) | SAMPLE,
    "_kl_normal": KL,
    "_kl_normal_backward": dict(grad_kl=()) | KL,
}


def tensor(value):
    """A tensor of a shape, or of (shape, dtype); anything else as it is."""
    if isinstance(value, tuple):
        shape, dtype = value if len(value) == 2 and isinstance(value[1], torch.dtype) else (value, F)
        return torch.ones(shape, dtype=dtype)
    return value


def packed(operator, **changes) -> dict:
    """What the operator takes, by the names in its schema (csrc/ops.cpp)."""
    given = {name: tensor(value) for name, value in (OPERATORS[operator] | changes).items()}
    posterior = [given[name] for name in (*OF_LAYER, *OF_PAIR) if given.get(name) is not None]
    prior = [value for name, value in given.items() if name.endswith(("_loc", "_scale"))][: len(posterior)]
    places = sum(1 << i for i, value in enumerate(prior) if value is not None)
    lists = dict(
        grads=[value for name, value in given.items() if name.startswith("grad_")],
        posterior=posterior,
        prior=[value for value in prior if value is not None],
        numbers=[0.0, 1.0] * (len(posterior) // 2),
        options=[given["scale"], places, *(given[name] for name in (*DRAWING, "reduce") if name in given and name != "scale")],
    )
    names = [argument.name for argument in getattr(OPS, operator).default._schema.arguments]
    return {name: lists[name] if name in lists else given[name] for name in names}


def call(operator, **changes):
    return getattr(OPS, operator)(*packed(operator, **changes).values())


NOISE = [
    (dict(row_offset=-1), "row_offset and column_offset are -1 and 0, expected no negative number"),
    (dict(column_offset=-1), "row_offset and column_offset are 0 and -1, expected no negative number"),
    (dict(row_offset=2**32 - 4), "more rows or columns than the noise counter"),
    (dict(column_offset=2**34 - 2), "more rows or columns than the noise counter"),
    (dict(key=((2,), F)), "expected an int64 tensor of shape"),
    (dict(key=((4,), torch.int64)), r"key has shape \[4\], expected an int64 tensor of shape \[2\]"),
    (dict(key=((1, 2), torch.int64)), r"key has shape \[1, 2\], expected an int64 tensor of shape \[2\]"),
    (dict(n_samples=0), "n_samples is 0, expected 1 to"),
    (dict(kl=3), "kl is 3, expected 0"),
    (dict(kl=-1), "kl is -1, expected 0"),
    (dict(stream=-1), "stream is -1, expected 0 to"),
]
SCALE = [(dict(scale=5), "scale is 5, expected 0"), (dict(scale=-1), "scale is -1, expected 0")]
POSTERIOR = [
    (dict(rho=(3, 5)), r"rho has shape \[3, 5\], expected that of mu: \[5, 3\]"),
    (dict(rho=((5, 3), D)), "rho and mu have different dtypes"),
    (dict(prior_loc=(5, 1)), r"the prior's loc has shape \[5, 1\], expected that of mu: \[5, 3\]"),
    (dict(prior_loc=((5, 3), H)), "the prior's loc and mu have different dtypes"),
    (dict(prior_scale=(3,)), r"the prior's scale has shape \[3\], expected that of mu: \[5, 3\]"),
    (dict(prior_scale=((5, 3), D)), "the prior's scale and mu have different dtypes"),
    (dict(mu=((5, 3), torch.int64), rho=((5, 3), torch.int64)), "mu has dtype number"),
    *SCALE,
]
LAYER = [
    (dict(x=(4, 5)), r"x has shape \[4, 5\], expected \[..., 3\]"),
    (dict(x=()), r"x has shape \[\], expected \[..., 3\]"),
    (dict(x=((4, 3), D)), "x and weight_mu have different dtypes"),
    (dict(x=((4, 3), torch.int64)), "x and weight_mu have different dtypes"),
    (dict(n_samples=3), r"x has shape \[4, 3\], expected its first dimension to be a multiple of n_samples = 3"),
    (dict(x=(3,), n_samples=2), "expected its first dimension to be a multiple of n_samples = 2"),
    (dict(weight_mu=(15,), weight_rho=(15,)), r"weight_mu has shape \[15\], expected \[out, in\]"),
    (dict(weight_rho=(5, 4)), r"rho has shape \[5, 4\], expected that of mu"),
    (dict(weight_loc=(5, 4)), r"the prior's loc has shape \[5, 4\]"),
    (dict(weight_scale=(5, 4)), r"the prior's scale has shape \[5, 4\]"),
    (dict(bias_rho=None), "posterior has 3 tensors, expected weight_mu and weight_rho, and then both or none of bias_mu and bias_rho"),
    (dict(bias_mu=(4,), bias_rho=(4,)), r"bias_mu has shape \[4\], expected \[5\] and weight_mu's dtype"),
    (dict(bias_mu=(5, 1), bias_rho=(5, 1)), r"bias_mu has shape \[5, 1\], expected \[5\]"),
    (dict(bias_mu=((5,), D), bias_rho=((5,), D)), "expected .* and weight_mu's dtype"),
    (dict(bias_rho=(4,)), r"rho has shape \[4\], expected that of mu: \[5\]"),
    (dict(bias_loc=(4,)), r"the prior's loc has shape \[4\]"),
    (dict(bias_scale=((5,), D)), "the prior's scale and mu have different dtypes"),
    *SCALE,
]
CASES = {
    "_variational_linear": LAYER + NOISE,
    "_variational_linear_backward": [
        *LAYER,
        *NOISE,
        (dict(x=None), "x is absent, expected it with grad_y"),
        (dict(grad_y=(4, 3)), r"grad_y has shape \[4, 3\], expected \[4, 5\]"),
        (dict(grad_y=(20,)), r"grad_y has shape \[20\], expected \[4, 5\]"),
        (dict(grad_y=((4, 5), H)), "grad_y has dtype number"),
        (dict(grad_kl=((), torch.int64)), "grad_kl has dtype number"),
    ],
    "_sample_normal": POSTERIOR + NOISE,
    "_sample_normal_backward": [
        *POSTERIOR,
        *NOISE,
        (dict(grad_weight=(5, 3)), r"grad_weight has shape \[5, 3\], expected \[2, 5, 3\]"),
        (dict(grad_weight=((2, 5, 3), D)), "grad_weight has dtype number"),
        (dict(grad_kl=(1,)), r"grad_kl has shape \[1\], expected \[\]"),
        (dict(grad_kl=((), D)), "grad_kl has dtype number"),
    ],
    "_kl_normal": POSTERIOR,
    "_kl_normal_backward": [
        *POSTERIOR,
        (dict(grad_kl=(5, 3)), r"grad_kl has shape \[5, 3\], expected \[\]"),
        (dict(grad_kl=((), D)), "grad_kl has dtype number"),
        (dict(reduce=2), "reduce is 2, expected 0 or 1"),
        (dict(grad_kl=None), "grad_kl is absent, expected a tensor"),
        (dict(reduce=0), r"grad_kl has shape \[\], expected \[5, 3\]"),
        (dict(reduce=0, grad_kl=(3, 5)), r"grad_kl has shape \[3, 5\], expected \[5, 3\]"),
        (dict(reduce=0, grad_kl=((5, 3), H)), "grad_kl has dtype number"),
    ],
}
ALL = [(operator, changes, message) for operator, cases in CASES.items() for changes, message in cases]


@pytest.mark.parametrize("operator, changes, message", ALL, ids=lambda value: str(value)[:60])
def test_is_refused(operator, changes, message):
    with pytest.raises(RuntimeError, match=message):
        call(operator, **changes)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_cases_change_is_accepted(operator):
    call(operator)


ONE = torch.ones(5, 3)
LISTS = [
    ("posterior", [ONE], "posterior has 1 tensors, expected mu and rho|expected weight_mu and weight_rho, and then both or none"),
    ("posterior", [ONE] * 3, "posterior has 3 tensors, expected mu and rho|expected weight_mu and weight_rho, and then both or none"),
    ("posterior", [ONE] * 6, "posterior has 6 tensors"),
    ("numbers", [0.0], "numbers has 1, expected [24]: a loc and a scale for each mu and rho"),
    ("numbers", [0.0, 1.0] * 3, "numbers has 6, expected [24]"),
    ("prior", [ONE], r"prior's places are 0, expected a bit below 2\^[24] for each of its 1 tensors"),
    ("options", [], "options has 0 numbers, expected [37]: scale, prior's places, (kl, n_samples, stream, row_offset, column_offset|reduce)"),
    ("options", [0] * 8, "options has 8 numbers, expected [37]"),
    ("grads", [], "grads has 0 tensors, expected grad_.*: a tensor or None of each result"),
    ("grads", [None] * 3, "grads has 3 tensors, expected grad_"),
]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name, value, message", LISTS, ids=lambda value: str(value)[:20])
def test_a_list_of_another_length_is_refused(operator, name, value, message):
    arguments = packed(operator)
    if name in arguments:
        with pytest.raises(RuntimeError, match=message):
            getattr(OPS, operator)(*(arguments | {name: value}).values())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("places", [1 << 4, 1 << 62, -1, 0, 3])
def test_places_that_the_priors_tensors_do_not_fill_are_refused(operator, places):
    arguments = packed(operator, prior_loc=(5, 3), weight_loc=(5, 3))
    arguments["options"][1] = places
    with pytest.raises(RuntimeError, match=f"prior's places are {places}, expected a bit below"):
        getattr(OPS, operator)(*arguments.values())


@pytest.mark.parametrize("n_samples, x, message", [(0, (4, 3), "n_samples"), (1, (4, 2), "x has shape"), (3, (4, 3), "multiple")])
def test_the_regime_of_what_is_refused_is_not_told(n_samples, x, message):
    with pytest.raises(RuntimeError, match=message):
        OPS._linear_regime(torch.ones(x), torch.ones(5, 3), n_samples)
