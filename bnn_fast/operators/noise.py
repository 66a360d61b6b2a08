"""The noise contract in plain PyTorch: Philox words and the normals made of them, for a key.

Works on any device and under `torch.func`; the key is never read on the host.
"""
from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def standard_normal(
    key: Tensor,
    samples: int,
    rows: int,
    columns: int,
    *,
    stream: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise [samples, rows, columns] (float32 or float64) that `key` = (seed, first sample) stands for.

    One Philox counter (column / 4, row, sample, stream) makes the four normals of columns 4c to 4c + 3.
    """

    def count(n):
        return torch.arange(n, dtype=torch.int64, device=key.device)

    return standard_normal_of(key, count(samples).unsqueeze(-1), row_offset + count(rows), columns, stream=stream,
                              column_offset=column_offset, dtype=dtype)


def standard_normal_of(
    key: Tensor,
    samples: Tensor,
    rows: Tensor,
    columns: int,
    *,
    stream: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise [..., columns] of the rows and samples (int64 tensors [...] that broadcast) of these numbers."""
    first, last = column_offset // 4, (column_offset + columns + 3) // 4
    words = philox4x32(
        (
            (first + torch.arange(last - first, dtype=torch.int64, device=key.device)) & _WORD,
            (rows & _WORD).unsqueeze(-1),
            ((key[1] + samples) & _WORD).unsqueeze(-1),
            torch.full((), stream, dtype=torch.int64, device=key.device),
        ),
        (key[0] & _WORD, (key[0] >> 32) & _WORD),
    )
    normals = torch.stack(normal4(*words, dtype), dim=-1).flatten(-2)
    skip = column_offset - 4 * first
    return normals[..., skip : skip + columns]


def random_signs(key: Tensor, samples: int, rows: int, columns: int, *, stream: int, row_offset: int | Tensor = 0,
                 dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs [samples, rows, columns], 1 or -1, each from a bit: counter (column / 128, row, sample, stream) has those of 128
    columns in its four words, the lowest bit first; a set bit is -1.
    """

    def count(n):
        return torch.arange(n, dtype=torch.int64, device=key.device)

    words = philox4x32(
        (count((columns + 127) // 128), ((row_offset + count(rows)) & _WORD).unsqueeze(-1),
         ((key[1] + count(samples)) & _WORD).view(-1, 1, 1), torch.full((), stream, dtype=torch.int64, device=key.device)),
        (key[0] & _WORD, (key[0] >> 32) & _WORD),
    )
    bits = (torch.stack(words, dim=-1).unsqueeze(-1) >> count(32)) & 1
    return (1 - 2 * bits).flatten(-3)[..., :columns].to(dtype)


def first_row(key: Tensor) -> int | Tensor:
    """The row of a whole batch that the input begins at, which a key of three numbers says."""
    return key[2] if len(key) == 3 else 0


def philox4x32(counter, key, rounds: int = 10):
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    `counter` holds four and `key` two broadcastable int64 tensors of 32-bit words; returns four such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The products fill 64 bits; int64 wraps, and the masks make the bits unsigned again.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def normal4(x0, x1, x2, x3, dtype):
    """Four normals of one counter's words: Box and Muller, "A note on the generation of random normal
    deviates" (1958).

    The float32 steps are those of csrc/normal.h one by one, so the bits agree; float64 agrees to a few ulp.
    """
    normals = []
    for radius_word, angle_word in ((x0, x1), (x2, x3)):
        r = _radius64(radius_word) if dtype == torch.float64 else _radius32(radius_word)
        sine, cosine = _circle(angle_word, dtype)
        normals += [r * cosine, r * sine]
    return normals


def _float32(*values: float) -> list[float]:
    return [struct.unpack("f", struct.pack("f", v))[0] for v in values]


# The minimax coefficients of csrc/elementary.h and csrc/normal.h, highest power first.
_LOG1P = _float32(
    0.0873517096,
    -0.143077493,
    0.149179384,
    -0.165704682,
    0.199620739,
    -0.250017583,
    0.333339512,
    -0.499999911,
)
_SINE = _float32(-0.000195169341, 0.00833217520, -0.166666552)
_COSINE = _float32(2.44373332e-5, -0.00138873630, 0.0416666456)
_SQRT_HALF, _TWO_LOG_2, _TURN32 = _float32(0.707106769, 1.38629436, 2.0 * math.pi * 2.0**-32)


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c in float32, rounded once: in float64 the product is exact."""
    return (a.double() * b + c).float()


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = _fma(value, x, c)
    return value


def _radius64(x: Tensor) -> Tensor:
    return (-2.0 * ((x.double() + 0.5) * 2.0**-32).log()).sqrt()


def _radius32(x: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (x + 1/2) 2^-32. In the upper half u = 1 - v, and ln u is taken as log(1 - v)."""
    upper = x > _WORD // 2
    v = _fma(torch.where(upper, _WORD - x, x).float(), 2.0**-32, 2.0**-33)
    mantissa, exponent = torch.where(upper, 1.0 - v, v).frexp()
    small = mantissa < _SQRT_HALF
    exponent = exponent - small.to(exponent.dtype)
    f = torch.where(small, 2.0 * mantissa, mantissa) - 1.0  # u = 2^exponent (1 + f)
    f = torch.where(upper & (exponent == 0), -v, f)
    log1p = _fma(f * f, _polynomial(_LOG1P, f), f)
    # By way of float64: torch's float32 sqrt on CPU (MKL's) is not correctly rounded.
    return _fma(exponent.float(), -_TWO_LOG_2, -2.0 * log1p).double().sqrt().float()


def _circle(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sin 2 pi u and cos 2 pi u: the top two bits choose the quarter turn, the rest t in [-pi/4, pi/4]."""
    quarter = ((x + 0x20000000) >> 30) & 3
    rest = ((x + 0x20000000) & 0x3FFFFFFF) - 0x20000000
    if dtype == torch.float64:
        t = (rest.double() + 0.5) * (2.0 * math.pi * 2.0**-32)
        s, c = t.sin(), t.cos()
    else:
        t = _fma(rest.float(), _TURN32, 0.5 * _TURN32)
        z = t * t
        s = _fma(_polynomial(_SINE, z), z * t, t)
        c = _fma(_polynomial(_COSINE, z), z * z, _fma(z, -0.5, 1.0))
    odd = (quarter & 1) == 1
    sine = torch.where(odd, c, s) * (1 - (quarter & 2))
    cosine = torch.where(odd, s, c) * (1 - ((quarter + 1) & 2))
    return sine, cosine
