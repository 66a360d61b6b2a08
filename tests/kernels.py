"""What the tests of the compiled operators share: inputs, the raw operators, and the rule they are judged by.

Accuracy is judged as flash-attention does: against the reference in float64, a kernel may err at most twice
as much as the reference in the kernel's own types, and a little more. Errors count beside the largest
element of a result.
"""

from __future__ import annotations

import pytest
import torch

from bnn_fast import Normal, reference

OPS = torch.ops.bnn_fast
SCALES = ("softplus", "exp", "sqrt_exp")
KLS = (None, "analytic", "sampled")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
KEY = torch.tensor([0x123456789ABCDEF, 3])
FUSED, DRAWN = 5, 40  # batch sizes in the small-batch and in the large-batch regime
# (inputs, batch) that lead to each regime on the CPU
REGIMES = {"narrow": (37, DRAWN), "fused": (69, FUSED), "drawn": (69, DRAWN)}
in_every_regime = pytest.mark.parametrize("inputs, batch", REGIMES.values(), ids=REGIMES)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads gain nothing on tensors this small; waiting for each other on shared cores costs tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape, dtype=torch.float32, seed=0, mean=0.0, sd=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (mean + sd * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def posterior(*shape, dtype=torch.float32, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    return random(*shape, dtype=dtype, seed=seed), random(*shape, dtype=dtype, seed=seed + 100, mean=-1.0)


def make_prior(tensors: bool, *shape, dtype=torch.float32, seed=0) -> Normal:
    if not tensors:
        return Normal(0.25, 0.5)
    return Normal(
        random(*shape, dtype=dtype, seed=seed + 200), random(*shape, dtype=dtype, seed=seed + 300).abs() + 0.5
    )


def prior_arguments(prior: Normal) -> tuple:
    """loc tensor, scale tensor, loc number, scale number."""

    def tensor(value):
        return value if isinstance(value, torch.Tensor) else None

    def number(value):
        return 1.0 if isinstance(value, torch.Tensor) else value

    return tensor(prior.loc), tensor(prior.scale), number(prior.loc), number(prior.scale)


def cast(value, dtype):
    """A tensor or the tensors of a prior in another floating-point type; anything else as it is."""
    if isinstance(value, Normal):
        return Normal(cast(value.loc, dtype), cast(value.scale, dtype))
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def code(names, name) -> int:
    return names.index(name)


def judge(what: str, got, plain, truth) -> None:
    """The rule at the top of this file. `what` ends with the parameters' type, that of the computation."""
    assert got.shape == truth.shape and got.dtype == plain.dtype, what
    if got.numel() == 0:
        return
    got, plain, truth = got.double(), plain.double(), truth.double()
    size = truth.abs().max()
    more = (1e-13 if what.endswith("float64") else 1e-6) * (1 + size)
    error, allowed = (got - truth).abs().max(), 2 * (plain - truth).abs().max() + more
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}, largest element {size:.3g}"


def raw_linear(
    x,
    mu,
    rho,
    bias_mu,
    bias_rho,
    key,
    *,
    prior,
    bias_prior,
    scale,
    kl,
    n_samples,
    row_offset,
    column_offset,
    grad_y=None,
    grad_kl=None,
    need_grad_x=True,
    ops=OPS,
):
    """y and KL, and with a gradient given the five gradients, of the compiled operators."""
    loc, sd, loc_number, sd_number = prior_arguments(prior)
    bias_loc, bias_sd, bias_loc_number, bias_sd_number = prior_arguments(bias_prior)
    tail = (
        mu,
        rho,
        bias_mu,
        bias_rho,
        key,
        loc,
        sd,
        bias_loc,
        bias_sd,
        loc_number,
        sd_number,
        bias_loc_number,
        bias_sd_number,
        code(SCALES, scale),
        code(KLS, kl),
        n_samples,
        row_offset,
        column_offset,
    )
    y, value = ops._variational_linear(x, *tail)
    gradients = ops._variational_linear_backward(
        grad_y, grad_kl, x if grad_y is not None else None, *tail, need_grad_x
    )
    return y, value, gradients


def raw_sample(mu, rho, *, prior, scale, kl, n_samples, grad_w, grad_kl, offsets=(0, 0), ops=OPS):
    loc, sd, loc_number, sd_number = prior_arguments(prior)
    tail = (
        mu,
        rho,
        KEY,
        loc,
        sd,
        loc_number,
        sd_number,
        code(SCALES, scale),
        code(KLS, kl),
        n_samples,
        0,
        *offsets,
    )
    return ops._sample_normal(*tail), ops._sample_normal_backward(grad_w, grad_kl, *tail)


def plain_sample(mu, rho, *, prior, scale, kl, n_samples, grad_w, grad_kl, offsets=(0, 0)):
    """What raw_sample gives, of the reference, by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (mu, rho)]
    w, value = reference.sample_normal(
        *leaves,
        KEY,
        prior=prior,
        scale=scale,
        kl=kl,
        n_samples=n_samples,
        row_offset=offsets[0],
        column_offset=offsets[1],
    )
    outputs, grads = ([w], [grad_w]) if value is None else ([w, value], [grad_w, grad_kl])
    return (w.detach(), None if value is None else value.detach()), torch.autograd.grad(
        outputs, leaves, grads
    )


def check_sample(*shape, dtype, tensors=False, kl="analytic", ops=OPS, **options):
    """Judges the draws, their KL and their gradients of a tensor of this shape."""
    mu, rho = posterior(*shape, dtype=dtype)
    prior = make_prior(tensors, *shape, dtype=dtype)
    grad_kl = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad_w = random(options["n_samples"], *shape, dtype=dtype, seed=5)
    what = f"{list(shape)}, tensors {tensors}, {kl}, {options}, {dtype}"
    options["kl"] = kl
    got = raw_sample(mu, rho, prior=prior, grad_w=grad_w, grad_kl=grad_kl if kl else None, **options, ops=ops)
    plain = plain_sample(mu, rho, prior=prior, grad_w=grad_w, grad_kl=grad_kl, **options)
    true = plain_sample(
        mu.double(),
        rho.double(),
        prior=cast(prior, torch.float64),
        grad_w=grad_w.double(),
        grad_kl=grad_kl.double(),
        **options,
    )
    for name, a, b, c in zip(
        ("w", "kl", "mu", "rho"), (*got[0], *got[1]), (*plain[0], *plain[1]), (*true[0], *true[1])
    ):
        if b is None:
            assert a == 0
        else:
            judge(f"{name}: {what}", a, b, c)


def check_kl(*shape, dtype, tensors, reduction, scale, ops=OPS):
    """Judges the analytic KL of a tensor of this shape, and its gradients."""
    mu, rho = posterior(*shape, dtype=dtype)
    prior = make_prior(tensors, *shape, dtype=dtype)
    results = []
    for mu_, rho_, prior_ in ((mu, rho, prior), (mu.double(), rho.double(), cast(prior, torch.float64))):
        leaves = mu_.clone().requires_grad_(), rho_.clone().requires_grad_()
        value = reference.kl_normal(*leaves, prior=prior_, scale=scale, reduction=reduction)
        grad = random(*value.shape, dtype=value.dtype, seed=6)
        results.append((value.detach(), *torch.autograd.grad(value, leaves, grad)))
    loc, sd, loc_number, sd_number = prior_arguments(prior)
    tail = (mu, rho, loc, sd, loc_number, sd_number, code(SCALES, scale), reduction == "sum")
    value = ops._kl_normal(*tail)
    grad = random(*value.shape, dtype=value.dtype, seed=6)
    for name, a, b, c in zip(("kl", "mu", "rho"), (value, *ops._kl_normal_backward(grad, *tail)), *results):
        judge(f"{name}: {list(shape)} tensors {tensors} {reduction} {scale} {dtype}", a, b, c)


def plain_linear(x, mu, rho, bias_mu, bias_rho, key, *, grad_y, grad_kl, **options):
    """What raw_linear gives, of the reference, by autograd."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (x, mu, rho, bias_mu, bias_rho)
    ]
    y, value = reference.variational_linear(*leaves, key, **options)
    outputs, grads = [], []
    for output, grad in ((y, grad_y), (value, grad_kl)):
        if output is not None and grad is not None:
            outputs.append(output)
            grads.append(grad.to(output.dtype))
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(outputs, given, grads, materialize_grads=True))
    return y.detach(), value, [None if leaf is None else next(gradients) for leaf in leaves]


def check_linear(
    x,
    mu,
    rho,
    bias_mu=None,
    bias_rho=None,
    *,
    prior=Normal(0.25, 0.5),
    bias_prior=Normal(-0.5, 2.0),
    scale="softplus",
    kl="analytic",
    n_samples=1,
    row_offset=0,
    column_offset=0,
    ops=OPS,
):
    """Judges the operators' results and gradients on these arguments."""
    options = dict(
        prior=prior,
        bias_prior=bias_prior,
        scale=scale,
        kl=kl,
        n_samples=n_samples,
        row_offset=row_offset,
        column_offset=column_offset,
    )
    what = f"x {list(x.shape)} {x.dtype}, weight {list(mu.shape)}, bias {bias_mu is not None}, {options}, "
    what += str(mu.dtype)
    grad_y = random(*x.shape[:-1], mu.shape[0], dtype=x.dtype, seed=7)
    grad_kl = torch.tensor(0.3, dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)
    arguments = (x, mu, rho, bias_mu, bias_rho)
    y, value, gradients = raw_linear(
        *arguments, KEY, **options, grad_y=grad_y, grad_kl=grad_kl if kl else None, ops=ops
    )
    plain_y, plain_value, plain_gradients = plain_linear(
        *arguments, KEY, **options, grad_y=grad_y, grad_kl=grad_kl
    )
    wide = {name: cast(option, torch.float64) for name, option in options.items()}
    true_y, true_value, true_gradients = plain_linear(
        *(cast(a, torch.float64) for a in arguments),
        KEY,
        **wide,
        grad_y=grad_y.double(),
        grad_kl=grad_kl.double(),
    )
    judge(f"y: {what}", y, plain_y, true_y)
    if kl is None:
        assert value == 0
    else:
        judge(f"kl: {what}", value, plain_value.detach(), true_value.detach())
    for name, got, plain, true in zip(
        ("x", "weight_mu", "weight_rho", "bias_mu", "bias_rho"), gradients, plain_gradients, true_gradients
    ):
        if plain is None:
            assert got.shape == (0,)
        else:
            judge(f"gradient of {name}: {what}", got, plain, true)
