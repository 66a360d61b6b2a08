"""What the tests of the compiled operators share: inputs, the raw operators, and the regimes they run in."""

from __future__ import annotations

import pytest
import torch

from bnn_fast import Normal, build_info, checks
from bnn_fast.operators import arguments as packing

OPS = torch.ops.bnn_fast
SCALES = tuple(checks.SCALES)
KLS = (None, "analytic", "sampled")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
KEY = torch.tensor([0x123456789ABCDEF, 3])
FUSED, DRAWN = 5, 40  # batch sizes in the small-batch and in the large-batch regime
REGIME_NAMES = ("small", "fused", "drawn")  # by the numbers of _linear_regime
# (inputs, batch) that lead to each regime on the CPU, with some twenty outputs
REGIMES = {"small": (37, DRAWN), "fused": (69, FUSED), "drawn": (69, DRAWN)}
in_every_regime = pytest.mark.parametrize(
    "regime, inputs, batch", [(name, *sizes) for name, sizes in REGIMES.items()], ids=REGIMES
)


def regime_of(x: torch.Tensor, weight_mu: torch.Tensor, n_samples: int, ops=OPS) -> str:
    """The regime that the operators run in on these arguments, as they say themselves."""
    return REGIME_NAMES[ops._linear_regime(x, weight_mu, n_samples)]


def outruns_gemm() -> bool:
    """Whether the processor is one on which fused products outrun torch's GEMM."""
    return regime_of(torch.empty(1024, 256), torch.empty(256, 256), 1) == "fused"


def expected_regime(regime: str, dtype: torch.dtype, ops=OPS, weights: int = 0) -> str:
    """On the CPU only float32 has kernels for small layers, and only with vectors; others are drawn. On some processors float32
    layers that are not small are fused in the place of drawn.
    """
    if regime == "drawn" and ops is OPS and dtype == torch.float32 and weights >= 1 << 13 and outruns_gemm():
        return "fused"
    without = dtype != torch.float32 or build_info()["cpu_capability"] == "generic"
    return "drawn" if regime == "small" and ops is OPS and without else regime


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


def make_prior(tensors: bool | str, *shape, dtype=torch.float32, seed=0) -> Normal:
    """Of numbers, of tensors, or with a tensor for its "loc" or "scale" alone."""
    loc, scale = (tensors is True or tensors == name for name in ("loc", "scale"))
    return Normal(
        random(*shape, dtype=dtype, seed=seed + 200) if loc else 0.25,
        random(*shape, dtype=dtype, seed=seed + 300).abs() + 0.5 if scale else 0.5,
    )


def cast(value, dtype):
    """A tensor or the tensors of a prior in another floating-point type; anything else as it is."""
    if isinstance(value, Normal):
        return Normal(cast(value.loc, dtype), cast(value.scale, dtype))
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def draw_arguments(
    *posterior,
    key=KEY,
    prior=Normal(),
    bias_prior=None,
    scale="softplus",
    kl=None,
    n_samples=1,
    stream=0,
    row_offset=0,
    column_offset=0,
) -> tuple:
    """What the operators that draw take behind x. A bias that is None is left out."""
    tensors = [t for t in posterior if t is not None]
    priors = packing.pack_priors(*(prior, bias_prior or prior)[: len(tensors) // 2])
    return packing.to_draw(tensors, key, priors, scale, kl, n_samples, stream, row_offset, column_offset)


def kl_arguments(mu, rho, *, prior=Normal(), scale="softplus", reduce=True) -> tuple:
    """What the KL without a draw takes."""
    return packing.to_compare([mu, rho], packing.pack_priors(prior), scale, reduce)


def raw_linear(
    x,
    mu,
    rho,
    bias_mu,
    bias_rho,
    key,
    *,
    grad_y=None,
    grad_kl=None,
    need_grad_x=True,
    ops=OPS,
    **options,
):
    """y, the KL and the gradients, of the compiled operators; without a bias those of x and the weight."""
    arguments = draw_arguments(mu, rho, bias_mu, bias_rho, key=key, **options)
    y, value = ops._variational_linear(x, *arguments)
    gradients = ops._variational_linear_backward(
        [grad_y, grad_kl], x if grad_y is not None else None, *arguments, need_grad_x
    )
    return y, value, gradients


def raw_sample(mu, rho, *, grad_w, grad_kl, offsets=(0, 0), ops=OPS, **options):
    arguments = draw_arguments(mu, rho, row_offset=offsets[0], column_offset=offsets[1], **options)
    return ops._sample_normal(*arguments), ops._sample_normal_backward([grad_w, grad_kl], *arguments)
