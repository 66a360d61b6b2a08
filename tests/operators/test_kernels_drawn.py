"""The drawn regime in several blocks of rows, and sums over more elements than one pass can add without a care."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from judging import check_linear
from kernels import (
    DTYPES,
    KEY,
    KLS,
    OPS,
    draw_arguments,
    expected_regime,
    make_prior,
    one_thread,  # noqa: F401
    posterior,
    random,
    raw_linear,
    regime_of,
)

from bnn_fast import build_info

PROCESSOR = Path("/proc/cpuinfo")


@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize(
    "dtype, x_dtype",
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("outputs, inputs, batch, n_samples", [(300, 400, 130, 3), (100, 100, 33, 30)])
def test_drawn_in_several_blocks_of_rows(outputs, inputs, batch, n_samples, dtype, x_dtype, kl):
    bias, tensors = kl != "analytic", kl != "sampled"
    check_linear(
        random(n_samples * batch, inputs, dtype=x_dtype or dtype, seed=2),
        *posterior(outputs, inputs, dtype=dtype),
        *(posterior(outputs, dtype=dtype, seed=1) if bias else (None, None)),
        prior=make_prior(tensors, outputs, inputs, dtype=dtype),
        bias_prior=make_prior(tensors, outputs, dtype=dtype, seed=1),
        kl=kl,
        n_samples=n_samples,
        row_offset=3,
        column_offset=2,
        regime="drawn",
    )


@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs", [(21, 69), (64, 128), (300, 400)])
def test_a_backward_that_draws_once_gives_the_bits_of_one_that_draws_for_each_gradient(outputs, inputs, dtype, kl):
    """With the gradient of x the noise is what the pass for that drew; without, it is drawn for the gradient of rho."""
    x = random(100, inputs, dtype=dtype, seed=2)
    mu, rho = posterior(outputs, inputs, dtype=dtype)
    rho[::2, 1::3] = -torch.inf
    assert regime_of(x, mu, 1) == expected_regime("drawn", dtype, weights=mu.numel())
    grad_kl = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def gradients(need_grad_x):
        return raw_linear(x, mu, rho, None, None, KEY, grad_y=random(100, outputs, dtype=dtype, seed=3), grad_kl=grad_kl,
                          need_grad_x=need_grad_x, kl=kl, row_offset=3, column_offset=2)[2]

    (_, *once), (_, *twice) = gradients(True), gradients(False)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


def test_the_gemm_has_many_rows_but_where_products_here_outrun_it():
    """Those in vectors of 512 bits do on AMD's processors from Zen 5 on (family 26), where MKL has half their width."""
    fields = dict(line.split(":", 1) for line in PROCESSOR.read_text().splitlines() if ":" in line) if PROCESSOR.exists() else {}
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    wide = (build_info()["cpu_capability"] == "avx512" and fields.get("vendor_id") == "AuthenticAMD"
            and int(fields["cpu family"]) >= 26)
    for size, batch, regime in (((128, 64), 49, "fused" if wide else "drawn"), ((400, 300), 4000, "fused" if wide else "drawn"),
                                ((19, 69), 40, "drawn"), ((400, 300), 5000, "drawn"), ((400, 300), 48, "fused")):
        assert regime_of(torch.empty(batch, size[1]), torch.empty(size), 1) == regime, (size, batch)
    torch.set_num_threads(9)  # more than a layer has tasks for
    assert regime_of(torch.empty(4000, 300), torch.empty(400, 300), 1) == "drawn"
    assert regime_of(torch.empty(64, 300, dtype=torch.float64), torch.empty(400, 300, dtype=torch.float64), 1) == "drawn"
    assert regime_of(torch.empty(64, 300, dtype=torch.bfloat16), torch.empty(400, 300), 1) == "drawn"


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_the_kl_of_millions_of_weights_is_right_to_the_last_digits(kl):
    """Against the sum in float64 of the KLs of pieces of 256 columns, in which there is little to lose."""
    rows, columns, piece = 4, 4_000_000, 256
    mu = torch.zeros(rows, columns)
    rho = torch.full((rows, columns), -3.0)
    whole = OPS._sample_normal(*draw_arguments(mu, rho, kl=kl))[1]
    first = [OPS._sample_normal(*draw_arguments(mu[:, c:c + piece], rho[:, c:c + piece], kl=kl, column_offset=c))[1].double()
             for c in range(0, columns, piece)]
    assert abs(whole.double() / sum(first) - 1) < 1e-7
