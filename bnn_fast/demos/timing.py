"""How long steps take: cases timed in turn, so that a busy moment of the machine hits all of them alike."""
from __future__ import annotations

import time
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

LONG = 0.1  # seconds a call
SLOW = 5.0  # seconds a round of all cases


class Times(NamedTuple):
    """Seconds a call: the median over the rounds, and the 20th and 80th percentiles."""
    median: float
    low: float
    high: float


def interleaved(cases: dict[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 9,
                synchronize: Callable[[], object] = lambda: None) -> dict[str, Times]:
    """Time the cases in turn, for at least so many rounds and seconds in all, after a round or two to warm up.

    A case that takes less than a millisecond is called several times a round. Before its time is taken it is
    called once, so that it does not pay for what the case before it left in the caches, unless it takes long.
    Of rounds that take very long three will do. `synchronize` waits for the device.
    """
    def run(case, calls, before=True):
        if before:
            case()
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            case()
        synchronize()
        return (time.perf_counter() - start) / calls

    first = {name: run(case, 1) for name, case in cases.items()}
    quick = {name: seconds < LONG for name, seconds in first.items()}
    calls = {name: max(1, round(1e-3 / run(case, 1))) if quick[name] else 1 for name, case in cases.items()}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    rounds = min(rounds, 3) if sum(first.values()) > SLOW else rounds
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < seconds:
        for name, case in cases.items():
            taken[name].append(run(case, calls[name], quick[name]))
        done += 1
    return {name: summary(values) for name, values in taken.items()}


def summary(values: list[float]) -> Times:
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Times(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One step without the optimiser: gradients set to None, forward, KL, backward."""
    def step():
        model.zero_grad(set_to_none=True)
        loss().backward()

    return step


def synchronizer(device: str | torch.device) -> Callable[[], None]:
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
