"""The raw operators as calls without arguments, on random inputs: what is sanitized, counted and timed."""
from __future__ import annotations

import contextlib
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

import bnn_fast  # noqa: F401, registers the operators

OPS = torch.ops.bnn_fast
SOFTPLUS, ANALYTIC, SAMPLED = 0, 1, 2
Calls = dict[str, Callable[[], object]]


def posterior(*shape: int, **factory) -> tuple[Tensor, Tensor]:
    return 0.05 * torch.randn(shape, **factory), 0.1 * torch.randn(shape, **factory) - 3


def prior(*shape: int, tensors: bool, **factory) -> tuple[Tensor | None, Tensor | None]:
    return (torch.zeros(shape, **factory), torch.ones(shape, **factory)) if tensors else (None, None)


def key(device: str) -> Tensor:
    return torch.tensor([0x123456789ABCDEF, 3], device=device)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def elementwise(rows: int, columns: int, *, dtype: torch.dtype, device: str, kl: int = ANALYTIC,
                samples: int = 1, prior_tensors: bool = False, offsets: tuple[int, int] = (0, 0),
                reduce: bool = True) -> Calls:
    """Sampling and the KL of mu, rho [rows, columns]; kl and offsets concern the sampling, reduce the KL."""
    factory = {"dtype": dtype, "device": device}
    mu, rho = posterior(rows, columns, **factory)
    arguments = (*prior(rows, columns, tensors=prior_tensors, **factory), 0.0, 1.0, SOFTPLUS)
    tail = (key(device), *arguments, kl, samples, 0, *offsets)
    grad_w = torch.randn(samples, rows, columns, **factory)
    one = torch.ones((), dtype=sum_type(dtype), device=device)
    grad = one if reduce else torch.randn(rows, columns, **factory)
    return {
        "sample_normal": lambda: OPS._sample_normal(mu, rho, *tail),
        "sample_normal_backward": lambda: OPS._sample_normal_backward(grad_w, one, mu, rho, *tail),
        "kl_normal": lambda: OPS._kl_normal(mu, rho, *arguments, reduce),
        "kl_normal_backward": lambda: OPS._kl_normal_backward(grad, mu, rho, *arguments, reduce)}


def linear(inputs: int, outputs: int, batch: int, *, dtype: torch.dtype, device: str,
           x_dtype: torch.dtype | None = None, kl: int = ANALYTIC, samples: int = 1,
           prior_tensors: bool = False, offsets: tuple[int, int] = (0, 0)) -> Calls:
    """The linear layer on x [samples * batch, inputs] of x_dtype, or else of the parameters' dtype."""
    factory = {"dtype": dtype, "device": device}
    pairs = (*posterior(outputs, inputs, **factory), *posterior(outputs, **factory))
    priors = (*prior(outputs, inputs, tensors=prior_tensors, **factory),
              *prior(outputs, tensors=prior_tensors, **factory), 0.0, 1.0, 0.0, 1.0)
    tail = (*pairs, key(device), *priors, SOFTPLUS, kl, samples, *offsets)
    x = torch.randn(samples * batch, inputs, dtype=x_dtype or dtype, device=device)
    grad_y = torch.randn(samples * batch, outputs, dtype=x.dtype, device=device)
    grad_kl = torch.ones((), dtype=sum_type(dtype), device=device)
    backward = OPS._variational_linear_backward
    return {
        "variational_linear": lambda: OPS._variational_linear(x, *tail),
        "variational_linear_backward": lambda: backward(grad_y, grad_kl, x, *tail, True)}


class Case(NamedTuple):
    """A shape to be timed. type: float32, tf32 (float32 with TF32 allowed) or bfloat16, parameters and x
    alike. batch: of one draw; 0 for the operators that have no x."""
    inputs: int
    outputs: int
    batch: int
    type: str
    samples: int = 1

    @property
    def name(self) -> str:
        batch = f", batch {self.batch}" if self.batch else ""
        draws = f", {self.samples} draws" if self.samples > 1 else ""
        return f"{self.inputs} x {self.outputs}{batch}{draws}, {self.type}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.type == "bfloat16" else torch.float32

    def calls(self, device: str) -> Calls:
        options = {"dtype": self.dtype, "device": device, "samples": self.samples}
        if not self.batch:
            return elementwise(self.outputs, self.inputs, **options)
        return linear(self.inputs, self.outputs, self.batch, **options)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.type == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


TYPES = ("float32", "tf32", "bfloat16")
ELEMENTWISE = [Case(8192, 8192, 0, type) for type in ("float32", "bfloat16")]
LAYERS = [Case(n, n, batch, type) for n in (8192, 4096, 1024) for batch in (1, 16, 64, 256, 1024, 4096)
          for type in TYPES] + [Case(4096, 4096, 16, type, samples=8) for type in TYPES]
# Between the batches above, where the operators go from one regime to the other.
SWEEP = [Case(n, n, batch, type) for n in (4096, 1024) for type in ("float32", "bfloat16")
         for batch in (2, 4, 8, 32, 128)]
