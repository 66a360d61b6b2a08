"""Runs layers whose tensors all lie beside unreadable pages; a program of its own, as it dies where one is touched.

    python guard_pages.py BATCH,IN,OUT,SAMPLES ...     prints each case before it runs it
"""
from __future__ import annotations

import sys

import torch
from guarded import guarded
from judging import plain_linear
from kernels import KEY, posterior, random, raw_linear

from bnn_fast import Normal, functional, reference  # noqa: E402

OPTIONS = dict(prior=Normal(), bias_prior=Normal(), scale="softplus", kl="analytic", row_offset=0, column_offset=0)


def run(batch: int, inputs: int, outputs: int, n_samples: int, at: str) -> None:
    tensors = (random(n_samples * batch, inputs, seed=2), *posterior(outputs, inputs), *posterior(outputs, seed=1), KEY)
    grad_y = random(n_samples * batch, outputs, seed=7)
    beside = [guarded(t, at) for t in tensors]
    grads = {"grad_y": guarded(grad_y, at), "grad_kl": guarded(torch.tensor(0.3), at)}
    y, kl, gradients = raw_linear(*beside, **OPTIONS, n_samples=n_samples, **grads)
    expected = plain_linear(*tensors, **OPTIONS, n_samples=n_samples, grad_y=grad_y, grad_kl=torch.tensor(0.3))
    for got, right in zip((y, kl, *gradients), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(got, right.detach(), rtol=1e-4, atol=1e-4)
    leaves = [t.requires_grad_() for t in beside[:-1]]
    leaves_too = [t.requires_grad_() for t in tensors[:-1]]
    noisy, expected = functional.noisy_linear(*leaves, beside[-1]), reference.noisy_linear(*leaves_too, KEY)
    for got, right in zip((noisy, *torch.autograd.grad(noisy, leaves, grads["grad_y"])),
                          (expected, *torch.autograd.grad(expected, leaves_too, grad_y)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        for at in ("end", "begin"):
            print(case, at, flush=True)
            run(*map(int, case.split(",")), at)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
