"""python -m benchmarks.gpu.timings FILE: every operator, the step of a layer and networks, into FILE.

FILE is the record that benchmarks.gpu.check began; it is saved after every case.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import json
import pathlib
import time
from functools import partial
from typing import Callable

import torch
from torch import nn

import bnn_fast as bf

from .. import harness, networks
from ..providers import available
from ..step import step
from . import floors, timer
from .operators import ELEMENTWISE, LAYERS, SWEEP, TYPES, Case

NETWORKS = [(networks.NETWORK, 128), (networks.NETWORK, networks.POINTS), (networks.MIDDLE, 64)]
PREDICTIONS = [(networks.NETWORK, networks.POINTS, 100), (networks.MIDDLE, 450, 100)]


class Timings:
    """device and watch (as `timer.interleaved`) can be others in a test."""

    def __init__(self, record: dict, save: Callable[[dict], None], device: str = "cuda",
                 watch=timer.interleaved):
        self.record, self.save, self.device, self.watch = record, save, device, watch
        self.found = record["timings"] = {"ceilings": {}, "operators": {}, "step": {}, "step on the GPU": {},
                                          "network": {}, "errors": {}, "left_out": []}
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1

    def run(self, seconds: float, elementwise=ELEMENTWISE, layers=LAYERS, sweep=SWEEP) -> None:
        """In the order of what matters most; what does not fit into the time is listed as left out."""
        end = time.monotonic() + seconds
        jobs = {"ceilings": self.ceilings}
        jobs |= {f"operators, {case.name}": partial(self.operators, case) for case in elementwise}
        jobs |= {f"network, {networks.name_of(*case)}": partial(self.network, *case) for case in NETWORKS}
        for case in layers:
            jobs[f"step, {case.name}"] = partial(self.steps, case)
            jobs[f"operators, {case.name}"] = partial(self.operators, case)
        jobs |= {f"predict, {networks.name_of(*case)}": partial(self.prediction, *case, draws) for *case, draws in PREDICTIONS}
        jobs |= {f"operators, {case.name}": partial(self.operators, case) for case in sweep}
        for name, job in jobs.items():
            if time.monotonic() > end:
                self.found["left_out"].append(name)
                continue
            try:
                job()
            except Exception as error:
                self.found["errors"][name] = f"{type(error).__name__}: {error}"[:500]
            self.record["targets"] = floors.targets(self.found)
            self.save(self.record)

    def ceilings(self, size: int = 8192, bytes: int = 2 ** 31) -> None:
        """A second: bytes copied (read and written), flops of each type, warp instructions issued."""
        found = self.found["ceilings"]
        source = torch.empty(bytes, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        found["bytes"] = 2 * bytes / self.watch({"": lambda: target.copy_(source)}, ahead=True)[""].median
        for type in TYPES:
            case = Case(size, size, size, type)
            a, b = (torch.randn(size, size, dtype=case.dtype, device=self.device) for _ in range(2))
            with case.precision():
                found[type] = 2 * size ** 3 / self.watch({"": lambda: a @ b}, ahead=True)[""].median
        found["clock"] = clock(self.watch)
        found["instructions"] = 4 * self.record["environment"]["multiprocessors"] * found["clock"]

    def operators(self, case: Case) -> None:
        size = case.inputs * case.outputs * case.dtype.itemsize
        with case.precision():
            sets = [case.calls(self.device) for _ in range(timer.copies(self.cache, size))]
            calls = {name: timer.rotated([s[name] for s in sets]) for name in sets[0]}
            times = self.watch(calls, ahead=True)
            kernels = {name: breakdown(call, self.device) for name, call in calls.items()}
        counted = self.record.get("instructions", {}).get(case.name, {})
        self.found["operators"][case.name] = {name: {
            **t._asdict(), **result(name, case, t.median, counted.get(name), self.found["ceilings"]),
            "kernels": kernels[name]} for name, t in times.items()}

    def steps(self, case: Case) -> None:
        """Forward, KL and backward over the same of nn.Linear, on as many rows."""
        size = case.inputs * case.outputs * case.dtype.itemsize
        factory = {"device": self.device, "dtype": case.dtype}
        layers, calls = nn.ModuleList(), collections.defaultdict(list)
        for _ in range(timer.copies(self.cache, size)):
            for name, provider in available([case.provider, "plain PyTorch"])[0].items():
                if name != "plain PyTorch" or case.samples == 1:  # it has no several draws
                    layers.append(provider.model((case.inputs, case.outputs), **factory))
                    shape = (case.inputs, case.outputs, case.samples * case.batch)
                    calls[name].append(step(layers[-1], provider.kl, *shape, **factory))
        draws = bf.sampling(layers, n_samples=case.samples) if case.samples > 1 else contextlib.nullcontext()
        with case.precision(), draws:
            runs = {name: timer.rotated(steps) for name, steps in calls.items()}
            for where, ahead in (("step", False), ("step on the GPU", True)):
                self.found[where][case.name] = harness.ratios(self.watch(runs, ahead=ahead), "nn.Linear")

    def network(self, sizes: networks.Sizes, batch: int) -> None:
        """A training step with Adam, eager and as a CUDA graph."""
        providers = available(["bnn_fast", "plain PyTorch"])[0]
        runs = {name: networks.step(provider, sizes, batch, self.device) for name, provider in providers.items()}
        for how, of in (("eager", lambda run: run), ("CUDA graph", captured)):
            times = self.watch({name: of(run) for name, run in runs.items()})
            self.found["network"][f"{networks.name_of(sizes, batch)}, {how}"] = harness.ratios(times, "nn.Linear")

    def prediction(self, sizes: networks.Sizes, batch: int, draws: int) -> None:
        providers = available(["bnn_fast"])[0]
        runs = {name: networks.prediction(provider, sizes, batch, draws, self.device) for name, provider in providers.items()}
        name = f"{networks.name_of(sizes, batch)}: predict, {draws} draws"
        self.found["network"][name] = harness.ratios(self.watch(runs), "nn.Linear")


def result(operator: str, case: Case, seconds: float, instructions: float | None, ceilings: dict) -> dict:
    """What a pass did at least, and how near it came to its floor."""
    done = floors.work(operator, case)
    floor, bound = floors.floor(done, case.type, instructions, ceilings)
    per_weight = instructions and instructions * floors.WARP / (case.inputs * case.outputs)
    return {"bytes": done.bytes, "flops": done.flops, "instructions_per_weight": per_weight,
            "floor": floor, "bound": bound, "fraction": floor / seconds}


def clock(watch, cycles: int = 10 ** 8) -> float:
    """Cycles a second: how long the GPU takes to wait for so many of them."""
    return cycles / watch({"": lambda: torch.cuda._sleep(cycles)})[""].median


def breakdown(call: Callable[[], object], device: str, calls: int = 3) -> dict[str, float]:
    """Seconds a call in each kernel, as torch's profiler tells."""
    kinds = {"cuda": (torch.profiler.ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA),
             "cpu": (torch.profiler.ProfilerActivity.CPU, torch.autograd.DeviceType.CPU)}
    activity, kind = kinds[device]
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    found: dict[str, float] = collections.defaultdict(float)
    for event in profile.events():
        if event.device_type == kind:
            found[event.name] += event.time_range.elapsed_us() * 1e-6 / calls
    return dict(found)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """run as a CUDA graph, after a few calls that may allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=100.0)
    options = parser.parse_args()
    timings = Timings(json.loads(options.file.read_text()), lambda record: harness.save(record, options.file))
    timings.run(options.seconds)
    found = timings.found
    print(f"{len(found['operators'])} shapes of operators, {len(found['step'])} of layers; "
          f"{len(found['errors'])} failed, {len(found['left_out'])} left out for want of time")
    for name, error in found["errors"].items():
        print(f"failed: {name}: {error}")
    raise SystemExit(bool(found["errors"]))


if __name__ == "__main__":
    main()
