"""Which key each layer of a model has under a seed."""
from __future__ import annotations

import hashlib

# What torch's wrappers call the module in them: DataParallel, DistributedDataParallel and AveragedModel; torch.compile;
# activation checkpointing and offloading; FullyShardedDataParallel.
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def layer_seeds(names: list[str], seed: int) -> list[int]:
    """The layers' 64-bit seeds: the first eight bytes of sha256("seed:name"), little endian."""
    seeds, taken = [], set()
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in taken:  # a module that really is called like a wrapper
            plain = name
        taken.add(plain)
        digest = hashlib.sha256(f"{seed}:{plain}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "little", signed=True))
    return seeds


# hashlib is not traced. What torch.compiler.assume_constant_result does, which takes a second to import torch._dynamo.
layer_seeds._dynamo_marked_constant = True


def first_with_parameters(identities: list[list[tuple[int, ...]]]) -> list[int]:
    """For each layer the index of the first one with the same parameters, by the layers' `identities()`."""
    first = {}
    return [first.setdefault(pairs[0] if pairs else i, i) for i, pairs in enumerate(identities)]
