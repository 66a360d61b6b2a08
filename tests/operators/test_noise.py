"""The noise: Philox's known answers, and which word of the counter is what."""
from __future__ import annotations

import math

import pytest
import torch
from kernels import one_thread  # noqa: F401

from bnn_fast import reference
from bnn_fast.operators.noise import philox4x32

KEY = torch.tensor([-0x123456789ABCDEF, 7])


def python_philox(counter, key):
    """Philox4x32-10 on Python integers, written from the paper's description."""
    c, k = list(counter), list(key)
    for _ in range(10):
        hi0, lo0 = divmod(c[0] * 0xD2511F53, 1 << 32)
        hi1, lo1 = divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


def python_normal(seed, sample, row, column, stream):
    """One normal of the noise contract, in Python floats."""
    seed %= 1 << 64
    x = python_philox((column // 4, row, sample, stream), (seed & 0xFFFFFFFF, seed >> 32))
    pair = column % 4 // 2 * 2
    u, v = ((word + 0.5) * 2.0**-32 for word in x[pair : pair + 2])
    return math.sqrt(-2 * math.log(u)) * (math.sin if column % 2 else math.cos)(2 * math.pi * v)


def parameters(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    rho = (torch.randn(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
    return mu.requires_grad_(), rho.requires_grad_()


def noise(key, rows, columns, n_samples=1, dtype=torch.float64, **where):
    """The noise itself: mu = 0 and sigma = 1."""
    zero = torch.zeros(rows, columns, dtype=dtype)
    return reference.sample_normal(zero, zero, key, scale="exp", kl=None, n_samples=n_samples, **where)[0]


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123s_known_answers(counter, key, answer):
    words = philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in words) == answer
    assert tuple(python_philox(counter, key)) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF, -(1 << 63), (1 << 63) - 1])
def test_noise_is_the_contracts_function_of_seed_sample_row_and_column(seed):
    first_sample, row, column, stream = 3, 2**31 + 5, 2**32 - 3, 1
    key = torch.tensor([seed, first_sample])
    for dtype, tolerance in ((torch.float64, 4e-15), (torch.float32, 5e-7)):
        drawn = noise(key, 3, 9, 2, dtype, stream=stream, row_offset=row, column_offset=column)
        for s in range(2):
            for i in range(3):
                for j in range(9):
                    expected = python_normal(seed, first_sample + s, row + i, column + j, stream)
                    assert drawn[s, i, j].item() == pytest.approx(expected, abs=tolerance)


def test_counter_words_wrap_at_32_bits():
    key = torch.tensor([5, 2**32 - 1])
    drawn = noise(key, 2, 1, 2, row_offset=2**32 - 1)
    expected = [[python_normal(5, s, row, 0, 0) for row in (2**32 - 1, 0)] for s in (2**32 - 1, 0)]
    torch.testing.assert_close(drawn[..., 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_have_the_noise_of_the_whole(dtype):
    whole = noise(KEY, 6, 23, 3, dtype)
    for row, column in ((0, 0), (0, 5), (4, 0), (1, 4), (3, 22), (5, 7)):
        shard = noise(KEY, 6 - row, 23 - column, 3, dtype, row_offset=row, column_offset=column)
        assert torch.equal(shard, whole[:, row:, column:])
    later = noise(KEY + torch.tensor([0, 1]), 6, 23, 2, dtype)
    assert torch.equal(later, whole[1:])


def test_more_dimensions_count_as_rows_and_everything_else_and_one_as_a_row():
    flat = noise(KEY, 3, 8)[0]
    zero = torch.zeros(3, 2, 4, dtype=torch.float64)
    assert torch.equal(reference.sample_normal(zero, zero, KEY, scale="exp", kl=None)[0], flat.view(3, 2, 4))
    zero = torch.zeros(8, dtype=torch.float64)
    assert torch.equal(reference.sample_normal(zero, zero, KEY, scale="exp", kl=None)[0], flat[0])
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(reference.sample_normal(zero, zero, KEY, scale="exp", kl=None)[0], flat[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_key_of_any_kind_is_never_read_on_the_host(dtype):
    mu, rho = (p.detach() for p in parameters(5, 7, dtype=dtype))
    meta_mu, meta_rho = mu.to("meta"), rho.to("meta")
    y, kl = reference.variational_linear(
        torch.empty(6, 7, dtype=dtype, device="meta"),
        meta_mu,
        meta_rho,
        meta_mu[:, 0],
        meta_rho[:, 0],
        torch.empty(2, dtype=torch.int64, device="meta"),
        n_samples=3,
    )
    assert y.shape == (6, 5) and kl.shape == ()
    keys = torch.tensor([[1, 0], [2, 5]])
    batched = torch.vmap(lambda key: reference.sample_normal(mu, rho, key)[0])(keys)
    for key, w in zip(keys, batched):
        assert torch.equal(w, reference.sample_normal(mu, rho, key)[0])
