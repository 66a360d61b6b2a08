"""How a step's time grows with the weights, 2^10 to 2^26 in a square layer, and with the batch, 1 to 8192.

The floor is what a variational layer must at least take (24 bytes a weight, 6 flops a weight and row) at the
rates measured here: of a large copy and of a large product.
"""
from __future__ import annotations

from functools import partial

import torch

from .measure import Run, compare
from .step import layer, shape_name

WEIGHTS = [(2 ** n, 2 ** n, 32) for n in range(5, 14)]
BATCH = [(1024, 1024, batch) for batch in (1, 2, 8, 32, 128, 512, 2048, 8192)]
PROVIDERS = ("nn.Linear", "bnn_fast", "plain PyTorch")
FLOOR = "floor"


def rates(run: Run, size: int = 2048, elements: int = 2 ** 25) -> tuple[float, float]:
    """Bytes copied a second, read and written, and flops a second, in float32."""
    source = torch.zeros(elements, device=run.device)
    target, a = torch.empty_like(source), torch.randn(size, size, device=run.device)
    found = compare({"copy": lambda: lambda: target.copy_(source), "product": lambda: lambda: a @ a},
                    run._replace(seconds=1.0))
    return 8 * elements / found["copy"]["low"], 2 * size ** 3 / found["product"]["low"]


def floor(n_in: int, n_out: int, batch: int, bytes: float, flops: float) -> float:
    weights = n_in * n_out
    return max(24 * weights / bytes, 6 * weights * batch / flops)


def measure(run: Run, shapes=(*WEIGHTS, *BATCH)) -> dict[str, dict]:
    run = run.only(PROVIDERS)._replace(seconds=run.seconds / 3, rounds=3)
    bytes, flops = rates(run)
    found = {}
    for shape in shapes:
        cases = {name: partial(layer, p, shape, run) for name, p in run.providers.items()}
        found[shape_name(*shape)] = {**compare(cases, run), FLOOR: {"floor": floor(*shape, bytes, flops)}}
    return found
