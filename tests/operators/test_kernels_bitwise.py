"""Results do not depend on threads or repetition, and are right with every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from glob import glob

import pytest
import torch
from kernels import (  # noqa: F401
    KEY,
    OPS,
    expected_regime,
    kl_arguments,
    make_prior,
    one_thread,
    posterior,
    random,
    raw_linear,
    raw_sample,
    regime_of,
)

from bnn_fast import Normal, build_info


# outputs, inputs, batch
SHAPES = {"small": (37, 50, 1500), "fused": (301, 517, 8), "drawn": (301, 517, 130)}


def everything(regime: str) -> list[torch.Tensor]:
    """What must be bitwise repeatable: a layer's results, in the drawn regime its KL alone; noise and sigma."""
    results = []
    outputs, inputs, batch = SHAPES[regime]
    regime = expected_regime(regime, torch.float32, weights=outputs * inputs)
    mu, rho = posterior(outputs, inputs)
    for n_samples, kl in ((1, "analytic"), (2, "sampled")):
        x = random(n_samples * batch, inputs)
        assert regime_of(x, mu, n_samples) == regime
        y, value, gradients = raw_linear(
            x,
            mu,
            rho,
            *posterior(outputs, seed=1),
            KEY,
            prior=Normal(),
            bias_prior=Normal(),
            scale="softplus",
            kl=kl,
            n_samples=n_samples,
            row_offset=0,
            column_offset=1,
            grad_y=random(x.shape[0], outputs),
            grad_kl=torch.tensor(1.0),
        )
        results += [value] if regime == "drawn" else [y, value, *gradients]
        (w, value), gradients = raw_sample(
            mu,
            rho,
            prior=Normal(),
            scale="softplus",
            kl=kl,
            n_samples=n_samples,
            grad_w=random(n_samples, outputs, inputs),
            grad_kl=torch.tensor(1.0),
        )
        results += [w, value, *gradients]
    return [*results, OPS._kl_normal(*kl_arguments(mu, rho))]


@pytest.mark.parametrize("regime", SHAPES)
def test_results_do_not_depend_on_the_number_of_threads_or_on_repetition(regime):
    if expected_regime(regime, torch.float32) != regime:
        pytest.skip("without vectors there are no kernels for small layers")
    expected = everything(regime)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for got, first in zip(everything(regime), expected, strict=True):
            assert torch.equal(got, first), threads


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("offset", (0, 5, 8))
@pytest.mark.parametrize("columns", (1, 3, 4, 20, 63, 64, 65, 127, 128, 129))
def test_short_rows_have_the_bits_that_each_has_alone_bit_for_bit(columns, offset, dtype):
    rows, n_samples = 11, 2
    mu, rho = posterior(rows, columns, dtype=dtype)
    rho[3, 0] = -torch.inf
    grad_w = random(n_samples, rows, columns, dtype=dtype)
    prior = make_prior(True, rows, columns, dtype=dtype)

    def results(of: slice):
        here = Normal(prior.loc[of], prior.scale[of])
        (w, _), gradients = raw_sample(
            mu[of],
            rho[of],
            prior=here,
            scale="softplus",
            kl="sampled",
            n_samples=n_samples,
            grad_w=grad_w[:, of].contiguous(),
            grad_kl=torch.tensor(0.5, dtype=torch.promote_types(dtype, torch.float32)),
            offsets=(of.start, offset),
        )
        elements = OPS._kl_normal(*kl_arguments(mu[of], rho[of], prior=here, reduce=False))
        return [*w.unbind(), *gradients, elements]

    for row in range(rows):
        for together, alone in zip(results(slice(0, rows)), results(slice(row, row + 1)), strict=True):
            assert torch.equal(together[row : row + 1], alone), row


CHOSEN = build_info()["cpu_capability"]
OTHERS = {"generic": [], "avx2": ["generic", "avx2x16"], "avx512": ["generic", "avx2", "avx2x16"]}.get(
    CHOSEN, []
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_instruction_sets_pass_these_tests(name):
    files = glob(f"{os.path.dirname(__file__)}/test_kernels_*.py")
    chosen = "awkward or narrow_shapes or beyond_its_rows or (options and softplus-sampled-torch.float32)"
    chosen += " or bit_for_bit or threads or sigma_is or overflow or small_elements"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", chosen], text=True, capture_output=True,
                          env={**os.environ, "BNN_FAST_CPU": name})
    assert done.returncode == 0, done.stdout
