"""The operators on a real GPU, for CPU tensors: what the tests ask the interpreter, they ask the device too."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map_only


class Device:
    """Has torch.ops.bnn_fast's operators by their names; arguments are copied there with their strides, results back."""

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.bnn_fast, name)

        def call(*arguments):
            return tree_map_only(torch.Tensor, torch.Tensor.cpu, operator(*tree_map_only(torch.Tensor, _there, arguments)))

        return call


def _there(argument: torch.Tensor) -> torch.Tensor:
    given = argument.untyped_storage()
    storage = torch.empty(given.nbytes(), dtype=torch.uint8).untyped_storage().copy_(given).cuda()
    there = torch.empty(0, dtype=argument.dtype, device="cuda")
    return there.set_(storage, argument.storage_offset(), argument.shape, argument.stride())
