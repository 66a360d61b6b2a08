"""A step on 1, 2, ... CPU threads, and on all of them beside other programs that keep every processor busy."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from functools import partial

import torch

from .measure import Run, compare
from .step import layer, shape_name

SHAPES = [(512, 512, 128), (2048, 2048, 32)]
BESIDE = (784, 400, 128)
PROVIDERS = ("nn.Linear", "bnn_fast", "plain PyTorch")


def counts() -> list[int]:
    most = len(os.sched_getaffinity(0))
    return sorted({2 ** n for n in range(most.bit_length())} | {most})


@contextlib.contextmanager
def neighbours(count: int):
    """So many processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(run: Run, shapes=SHAPES) -> dict[str, dict]:
    if run.cuda:
        return {}
    before = torch.get_num_threads()
    run = run.only(PROVIDERS)._replace(seconds=run.seconds / 2)
    found = {}
    try:
        for threads in counts():
            torch.set_num_threads(threads)
            for shape in shapes:
                found[f"{shape_name(*shape)}, {threads} threads"] = compare(
                    {name: partial(layer, p, shape, run) for name, p in run.providers.items()}, run)
    finally:
        torch.set_num_threads(before)
    for busy in (0, counts()[-1]):
        with neighbours(busy):
            found[f"{shape_name(*BESIDE)}, {busy} busy neighbours"] = compare(
                {name: partial(layer, p, BESIDE, run) for name, p in run.providers.items()}, run)
    return found
