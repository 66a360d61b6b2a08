"""A step on 1, 2, ... CPU threads."""
from __future__ import annotations

import os
from functools import partial

import torch

from .measure import Run, compare
from .step import layer, shape_name

SHAPES = [(512, 512, 128), (2048, 2048, 32)]
PROVIDERS = ("nn.Linear", "bnn_fast", "plain PyTorch")


def counts() -> list[int]:
    most = len(os.sched_getaffinity(0))
    return sorted({2 ** n for n in range(most.bit_length())} | {most})


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
    return found
