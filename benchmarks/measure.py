"""Time and peak extra memory of cases, on the CPU or a GPU."""
from __future__ import annotations

import itertools
from typing import Callable, NamedTuple, Sequence

import torch

from bnn_fast.demos import timing

from . import harness
from .gpu import timer
from .providers import BASE, Provider

Case = Callable[[], object]


class Run(NamedTuple):
    """What to measure with. seconds: for all cases of a setting together, at least; rounds likewise."""
    providers: dict[str, Provider]
    device: str = "cpu"
    seconds: float = 3.0
    rounds: int = 5
    data: str | None = None  # folder with MNIST

    def only(self, names: Sequence[str]) -> Run:
        return self._replace(providers={name: p for name, p in self.providers.items() if name in names})

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


def watch(makers: dict[str, Callable[[], Case]], run: Run) -> tuple[dict[str, dict], dict[str, Case]]:
    """({extra: bytes} or, where a case cannot be made or called, {error}; those that can)."""
    found, cases = {}, {}
    for name, make in makers.items():
        try:
            case = make()
            case()
            found[name] = {"extra": extra_memory(case, run.cuda)}
            cases[name] = case
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return found, cases


def compare(makers: dict[str, Callable[[], Case]], run: Run, base: str = BASE) -> dict[str, dict]:
    """For each case that works {median, low, high: seconds a call, ratio: to that of `base` if there, extra}.

    The times are taken in turn.
    """
    found, cases = watch(makers, run)
    times = (timer.interleaved(cases) if run.cuda else
             timing.interleaved(cases, seconds=run.seconds, rounds=run.rounds))
    ratios = harness.ratios(times, base)
    return {name: {**ratios.get(name, {}), **t} for name, t in found.items()}


def cold(make: Callable[[], Case], bytes_of_one: int, run: Run) -> Case:
    """The case of `make`; on a GPU several, taken in turn, so that little of one is left in the L2 cache."""
    if not run.cuda:
        return make()
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size
    return timer.rotated([make() for _ in range(timer.copies(cache, bytes_of_one))])


def extra_memory(case: Case, cuda: bool = False) -> int:
    """Bytes by which a call's memory at its peak exceeds what is left when it ends: gradients and its result.

    It is torch's allocator that is watched; what a library takes past it is not seen.
    """
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = case()
        torch.cuda.synchronize()
        left = torch.cuda.memory_allocated()
        peak = torch.cuda.max_memory_allocated()
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            result = case()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        taken = list(itertools.accumulate(event.nbytes() for event in events)) or [0]
        peak, left = max(taken), taken[-1]
    del result
    return max(0, peak - left)
