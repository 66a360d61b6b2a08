"""Times on the GPU, by CUDA events."""
from __future__ import annotations

import itertools
import time
from typing import Callable

import torch

from bnn_fast.demos.timing import Times, summary

ROUNDS, SECONDS = 9, 0.2   # for all cases together, at least and about
CALLS = 20                 # a round at most, few enough for the driver's queue of launches
CYCLES = 2e9               # a second, at least about as many as the GPU has


def interleaved(cases: dict[str, Callable[[], object]], ahead: bool = False) -> dict[str, Times]:
    """Seconds a call, of cases timed in turn.

    ahead: the GPU is kept waiting until all calls of a round are in its queue. The time is then the GPU's
    own; otherwise it is what a caller sees, with the cost of Python and of the launches where it is larger.
    """
    calls, cycles = {}, {}
    for name, case in cases.items():
        case()
        calls[name], cycles[name] = 1, 0
        calls[name] = min(CALLS, max(1, round(1e-3 / event_time(case, 1, 0))))
        if ahead:
            start = time.perf_counter()
            for _ in range(calls[name]):
                case()
            cycles[name] = round(CYCLES * (1.5 * (time.perf_counter() - start) + 2e-4))
            torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    begin = time.perf_counter()
    while len(next(iter(taken.values()))) < ROUNDS or time.perf_counter() - begin < SECONDS:
        for name, case in cases.items():
            taken[name].append(event_time(case, calls[name], cycles[name]))
    return {name: summary(values) for name, values in taken.items()}


def event_time(case: Callable[[], object], calls: int, cycles: int) -> float:
    """Seconds a call; the queue is empty at first but for a wait of so many cycles."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if cycles:
        torch.cuda._sleep(cycles)
    start.record()
    for _ in range(calls):
        case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def rotated(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Each call in its turn, on inputs of its own, so that the cache does not hold them. What a call returns
    is kept until its next turn: its memory is not handed to the call after it."""
    results = [call() for call in calls]
    turns = itertools.cycle(range(len(calls)))

    def run():
        turn = next(turns)
        results[turn] = None
        results[turn] = calls[turn]()

    return run


def copies(cached_bytes: int, bytes_of_one: int) -> int:
    """How many sets of inputs are needed for a call to find little of its own in a cache of so many bytes."""
    return min(64, max(1, -(-3 * cached_bytes // bytes_of_one)))
