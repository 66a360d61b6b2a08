"""Judges the operators of rows that are looked up by those of the whole tensor, which judging.py holds against the reference: each
look-up is a tensor of one row, with the noise that the row has in its table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from kernels import KEY, OPS, make_prior, posterior, random, raw_sample

from bnn_fast import Normal
from bnn_fast.operators import arguments as packing

ROWS = torch.tensor([4, 0, 6, 6, 6, 2, 4, 6])  # 6 in both draws, and twice in one; 1, 3 and 5 nowhere
DRAWS = torch.tensor([1, 0, 1, 1, 0, 2, -1, 2])
COUNTS = torch.tensor([3, 1, 2, 0, 5, 1, 4])


class Rows(NamedTuple):
    """A table, what is looked up in it, and the gradients of the results."""

    mu: torch.Tensor
    rho: torch.Tensor
    prior: Normal
    look_up: list[torch.Tensor]
    grad_y: torch.Tensor
    grad_kl: torch.Tensor | None
    options: dict

    def arguments(self, gradient="sparse") -> tuple:
        options = {"n_samples": 1, "stream": 0, **self.options}
        return packing.to_look_up([self.mu, self.rho], self.look_up, KEY, packing.pack_priors(self.prior), gradient=gradient, **options)

    def run(self, gradient="sparse", ops=OPS):
        """y, the KL, the gradients."""
        y, kl, kept = ops._sample_rows(*self.arguments(gradient))
        return y, kl, ops._sample_rows_backward([self.grad_y, self.grad_kl], *self.arguments(gradient), kept)

    def draws(self) -> torch.Tensor:
        rows, n_samples = self.look_up[0], self.options.get("n_samples", 1)
        return rows[1] if rows.dim() == 2 else torch.arange(len(rows)) // max(len(rows) // n_samples, 1)

    def one_by_one(self):
        """y, the KL, and what each look-up adds to the gradients, by the operators of the whole tensor."""
        rows = self.look_up[0] if self.look_up[0].dim() == 1 else self.look_up[0][0]
        found, kl_sum = [], 0.0
        options = {name: self.options[name] for name in ("scale", "kl")} | {"stream": self.options.get("stream", 0)}
        row_offset, column_offset = (self.options.get(name, 0) for name in ("row_offset", "column_offset"))
        for i, (row, draw) in enumerate(zip(rows.tolist(), self.draws().tolist())):
            at = slice(row, row + 1)
            prior = Normal(*(p[at] if isinstance(p, torch.Tensor) else p for p in (self.prior.loc, self.prior.scale)))
            weight = self.options.get("weight", 1.0) / (self.look_up[1][row].item() if len(self.look_up) > 1 else 1)
            weight = weight if draw >= 0 else 0.0
            grad_kl = None if self.grad_kl is None else (self.grad_kl.double() * weight).to(self.grad_kl.dtype)
            (w, kl), gradients = raw_sample(self.mu[at], self.rho[at], prior=prior, key=KEY + torch.tensor([0, draw]),
                                            grad_w=self.grad_y[i].view(1, 1, -1), grad_kl=grad_kl,
                                            offsets=(row_offset + row, column_offset), **options)
            kl_sum = kl_sum + weight * kl.double()
            found.append((w.view(-1), *(g.view(-1) for g in gradients)))
        return kl_sum, *map(torch.stack, zip(*found))


def make_rows(columns, dtype=torch.float32, tensors=False, look_up=None, **options) -> Rows:
    mu, rho = posterior(len(COUNTS), columns, dtype=dtype)
    rho[6, :: 3] = -torch.inf
    rho[2] = -torch.inf
    look_up = [ROWS, COUNTS] if look_up is None else look_up
    count = look_up[0].shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    options = {"scale": "softplus", "kl": "analytic", "weight": 2.5, **options}
    return Rows(mu, rho, make_prior(tensors, len(COUNTS), columns, dtype=dtype), look_up, random(count, columns, dtype=dtype, seed=5),
                torch.tensor(0.3, dtype=wide) if options["kl"] else None, options)


def check_rows(columns, exact=True, ops=OPS, **options) -> None:
    """exact: gradients have the bits of the operators that they are held against."""
    given = make_rows(columns, **options)
    y, kl, gradients = given.run(ops=ops)
    kl_sum, expected, *by_look_up = given.one_by_one()
    if exact or given.mu.dtype != torch.float64:  # whose exp and log are each machine's own
        assert y.dtype == given.mu.dtype and torch.equal(y, expected)
    torch.testing.assert_close(y, expected)
    if given.options["kl"] is None:
        assert kl.shape == (0,)
    else:
        torch.testing.assert_close(kl.double(), kl_sum, rtol=1e-6, atol=1e-6)
    rows = given.look_up[0] if given.look_up[0].dim() == 1 else given.look_up[0][0]
    for gradient, values in zip(gradients, by_look_up):
        assert gradient.shape == given.mu.shape and torch.equal(gradient._indices(), rows[None])
        if exact:
            assert torch.equal(gradient._values(), values)
        else:
            rounding = torch.finfo(values.dtype).eps if values.dtype.itemsize == 2 else 2e-6
            torch.testing.assert_close(gradient._values(), values, rtol=rounding, atol=1e-5)
        assert (values[given.rho[rows] == -torch.inf] == 0).all()
    for dense, sparse in zip(given.run("dense", ops)[2], gradients):
        rounding = torch.finfo(dense.dtype).eps
        torch.testing.assert_close(dense, sparse.to_dense(), rtol=4 * rounding, atol=8 * rounding)
