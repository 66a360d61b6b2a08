"""The raw operators as calls without arguments, on random inputs: what is sanitized, counted and timed."""
from __future__ import annotations

import contextlib
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

from bnn_fast import Normal, checks
from bnn_fast.operators import arguments as packing

OPS = torch.ops.bnn_fast
Calls = dict[str, Callable[[], object]]


def posterior(*shape: int, **factory) -> tuple[Tensor, Tensor]:
    return 0.05 * torch.randn(shape, **factory), 0.1 * torch.randn(shape, **factory) - 3


def prior(*shape: int, tensors: bool, **factory) -> Normal:
    return Normal(torch.zeros(shape, **factory), torch.ones(shape, **factory)) if tensors else Normal()


def key(device: str) -> Tensor:
    return torch.tensor([0x123456789ABCDEF, 3], device=device)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def elementwise(rows: int, columns: int, *, dtype: torch.dtype, device: str, kl: str = "analytic",
                samples: int = 1, prior_tensors: bool = False, offsets: tuple[int, int] = (0, 0),
                reduce: bool = True) -> Calls:
    """Sampling and the KL of mu, rho [rows, columns]; kl and offsets concern the sampling, reduce the KL."""
    factory = {"dtype": dtype, "device": device}
    mu, rho = posterior(rows, columns, **factory)
    of_prior = packing.pack_priors(prior(rows, columns, tensors=prior_tensors, **factory))
    to_draw = packing.to_draw([mu, rho], key(device), of_prior, "softplus", kl, samples, 0, *offsets)
    to_compare = packing.to_compare([mu, rho], of_prior, "softplus", reduce)
    grad_w = torch.randn(samples, rows, columns, **factory)
    one = torch.ones((), dtype=sum_type(dtype), device=device)
    grad = one if reduce else torch.randn(rows, columns, **factory)
    return {
        "sample_normal": lambda: OPS._sample_normal(*to_draw),
        "sample_normal_backward": lambda: OPS._sample_normal_backward([grad_w, one], *to_draw),
        "kl_normal": lambda: OPS._kl_normal(*to_compare),
        "kl_normal_backward": lambda: OPS._kl_normal_backward([grad], *to_compare)}


def look_up(table: int, columns: int, count: int, *, dtype: torch.dtype, device: str, kl: str = "analytic", samples: int = 1,
            prior_tensors: bool = False, offsets: tuple[int, int] = (0, 0)) -> Calls:
    """So many rows of a table [table, columns] for each draw, with the gradient of the whole table."""
    factory = {"dtype": dtype, "device": device}
    of_prior = packing.pack_priors(prior(table, columns, tensors=prior_tensors, **factory))
    rows = [torch.randint(table, (samples * count,), device=device), torch.ones(table, dtype=torch.int64, device=device)]
    arguments = packing.to_look_up([*posterior(table, columns, **factory)], rows, key(device), of_prior, "softplus", kl, samples, 0, "dense", 1.0,
                                   *offsets)
    grad_y = torch.randn(samples * count, columns, **factory)
    one = torch.ones((), dtype=sum_type(dtype), device=device)
    return {
        "sample_rows": lambda: OPS._sample_rows(*arguments),
        "sample_rows_backward": lambda: OPS._sample_rows_backward([grad_y, one], *arguments, None)}


def linear(inputs: int, outputs: int, batch: int, *, dtype: torch.dtype, device: str,
           x_dtype: torch.dtype | None = None, kl: str = "analytic", samples: int = 1,
           prior_tensors: bool = False, offsets: tuple[int, int] = (0, 0), ops=OPS) -> Calls:
    """The linear layer on x [samples * batch, inputs] of x_dtype, or else of the parameters' dtype."""
    factory = {"dtype": dtype, "device": device}
    pairs = [*posterior(outputs, inputs, **factory), *posterior(outputs, **factory)]
    priors = packing.pack_priors(prior(outputs, inputs, tensors=prior_tensors, **factory),
                                 prior(outputs, tensors=prior_tensors, **factory))
    to_draw = packing.to_draw(pairs, key(device), priors, "softplus", kl, samples, 0, *offsets)
    x = torch.randn(samples * batch, inputs, dtype=x_dtype or dtype, device=device)
    grad_y = torch.randn(samples * batch, outputs, dtype=x.dtype, device=device)
    grad_kl = torch.ones((), dtype=sum_type(dtype), device=device)
    backward = ops._variational_linear_backward
    return {
        "variational_linear": lambda: ops._variational_linear(x, *to_draw),
        "variational_linear_backward": lambda: backward([grad_y, grad_kl], x, *to_draw, True)}


def estimated(inputs: int, outputs: int, batch: int, *, estimator: str, dtype: torch.dtype, device: str,
              x_dtype: torch.dtype | None = None, kl: str = "analytic", samples: int = 1, prior_tensors: bool = False,
              ops=OPS) -> Calls:
    """The linear layer by the estimators "local" and "flipout"."""
    factory = {"dtype": dtype, "device": device}
    pairs = [*posterior(outputs, inputs, **factory), *posterior(outputs, **factory)]
    priors = packing.pack_priors(prior(outputs, inputs, tensors=prior_tensors, **factory),
                                 prior(outputs, tensors=prior_tensors, **factory))
    to_draw = packing.to_draw(pairs, key(device), priors, "softplus", kl, samples, 0, 0, 0, estimator)
    x = torch.randn(samples * batch, inputs, dtype=x_dtype or dtype, device=device)
    grad_y = torch.randn(samples * batch, outputs, dtype=x.dtype, device=device)
    grad_kl = torch.ones((), dtype=sum_type(dtype), device=device)
    kept = ops._estimated_linear(x, *to_draw)[2]
    backward = ops._estimated_linear_backward
    return {
        "estimated_linear": lambda: ops._estimated_linear(x, *to_draw),
        "estimated_linear_backward": lambda: backward([grad_y, grad_kl], x, *to_draw, True, kept)}


def chain(sizes: tuple[int, ...], batch: int, *, dtype: torch.dtype, device: str, kl: str = "analytic", samples: int = 1,
          prior_tensors: bool = False) -> Calls:
    """Layers of these sizes with ReLU between them, on x [samples * batch, sizes[0]]."""
    factory, links = {"dtype": dtype, "device": device}, []
    for inputs, outputs in zip(sizes, sizes[1:]):
        shapes = (outputs, inputs), (outputs,)
        priors = packing.pack_priors(*(prior(*shape, tensors=prior_tensors, **factory) for shape in shapes))
        pairs = [t for shape in shapes for t in posterior(*shape, **factory)]
        links.append(packing.Link(pairs, key(device), priors, (checks.ACTIVATIONS["relu"], 0.0, 0.0)))
    arguments = packing.to_chain(links, "softplus", kl, samples, False)
    x, grad_y = (torch.randn(samples * batch, columns, **factory) for columns in (sizes[0], sizes[-1]))
    grad_kl = torch.ones((), dtype=sum_type(dtype), device=device)
    return {
        "variational_chain": lambda: OPS._variational_chain(x, *arguments)[:2],
        "variational_chain_backward": lambda: OPS._variational_chain_backward([grad_y, grad_kl], x, *arguments, True, None)}


def noisy(inputs: int, outputs: int, batch: int, *, dtype: torch.dtype, device: str, x_dtype: torch.dtype | None = None,
          offsets: tuple[int, int] = (0, 0)) -> Calls:
    """The linear layer with factorised noise."""
    factory = {"dtype": dtype, "device": device}
    pairs = [*posterior(outputs, inputs, **factory), *posterior(outputs, **factory)]
    to_draw = packing.to_draw(pairs, key(device), packing.pack_priors(Normal(), Normal()), "identity", None, 1, 5, *offsets)
    x = torch.randn(batch, inputs, dtype=x_dtype or dtype, device=device)
    grad_y = torch.randn(batch, outputs, dtype=x.dtype, device=device)
    return {
        "noisy_linear": lambda: OPS._noisy_linear(x, *to_draw),
        "noisy_linear_backward": lambda: OPS._noisy_linear_backward([grad_y, None], x, *to_draw, True)}


class Case(NamedTuple):
    """A shape to be timed. type: float32, tf32 (float32 with TF32 allowed) or bfloat16, parameters and x
    alike. batch: of one draw; 0 for the operators that have no x."""
    inputs: int
    outputs: int
    batch: int
    type: str
    samples: int = 1
    estimator: str = "weight"

    @property
    def name(self) -> str:
        batch = f", batch {self.batch}" if self.batch else ""
        draws = f", {self.samples} draws" if self.samples > 1 else ""
        estimator = "" if self.estimator == "weight" else f", {self.estimator}"
        return f"{self.inputs} x {self.outputs}{batch}{draws}, {self.type}{estimator}"

    @property
    def provider(self) -> str:
        """Its name among providers.py's."""
        return "bnn_fast" if self.estimator == "weight" else f"bnn_fast {self.estimator}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.type == "bfloat16" else torch.float32

    def calls(self, device: str, ops=OPS) -> Calls:
        """ops: those of a linear layer that are called."""
        options = {"dtype": self.dtype, "device": device, "samples": self.samples}
        if not self.batch:
            return elementwise(self.outputs, self.inputs, **options)
        if self.estimator != "weight":
            return estimated(self.inputs, self.outputs, self.batch, estimator=self.estimator, ops=ops, **options)
        return linear(self.inputs, self.outputs, self.batch, ops=ops, **options)

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
# Local beside the first of them, in float32 as it always computes.
LAYERS[:0] = [Case(8192, 8192, batch, "float32", estimator="local") for batch in (1, 16)]
# Between the batches above, where the operators go from one regime to the other.
SWEEP = [Case(n, n, batch, type) for n in (4096, 1024) for type in ("float32", "bfloat16")
         for batch in (2, 4, 8, 32, 128)]
