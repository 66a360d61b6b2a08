"""What a step launches: on a GPU its kernels; without one the operators that a CPU runs, each of which would be a kernel there."""
from __future__ import annotations

from collections import Counter
from typing import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"detach", "select", "unbind", "view", "expand", "unsqueeze", "t", "to"}


class Log(TorchDispatchMode):
    """Counts the operators by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names[name] += 1
        return function(*arguments, **(keywords or {}))


def count(case: Callable[[], object], cuda: bool) -> int:
    case()
    if not cuda:
        with Log() as log:
            case()
        return log.names.total()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
