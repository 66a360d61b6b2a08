"""python -m benchmarks.gpu.exercise [--device cpu]: every operator once, small, through each regime.

For compute-sanitizer. Every element of every result is read, so that initcheck sees one that was not written.
"""
from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Iterator

import torch

from bnn_fast.layers.chain import TYPES as TYPES_OF_CHAINS

from . import operators

# inputs, outputs, batch, awkward on purpose: small layers; fused, with few rows and with more (45 only in
# 16-bit types); drawn
SHAPES = [(20, 19, 65), (1, 20, 130), (257, 130, 3), (257, 130, 13), (257, 130, 45), (257, 130, 601)]
# A tile of 128 rows, of 64 and of 32, each the widest and the last not full.
CHAINS = [((1, 20, 32, 1), 17000), ((13, 64, 3), 8500), ((7, 128, 10), 70)]
# parameters, x
TYPES = [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16),
         (torch.float16, torch.float16), (torch.float32, torch.bfloat16)]


def cases(device: str) -> Iterator[tuple[str, operators.Calls]]:
    for (dtype, x_dtype), draws in itertools.product(TYPES, (1, 3)):
        options = {"dtype": dtype, "device": device, "samples": draws}
        if draws > 1:  # with them the rarer options
            options |= {"kl": "sampled", "prior_tensors": True, "offsets": (5, 3)}
        name = f"{dtype}, x {x_dtype}, {draws} draws"
        if dtype == x_dtype:
            yield f"elementwise, {name}", operators.elementwise(33, 127, reduce=draws == 1, **options)
            yield f"look-up, {name}", operators.look_up(50, 127, 33, **options)
        if dtype == x_dtype and dtype in TYPES_OF_CHAINS[torch.device(device).type]:
            for sizes, batch in CHAINS:
                of_chain = {key: value for key, value in options.items() if key != "offsets"}
                yield f"chain {sizes}, batch {batch}, {name}", operators.chain(sizes, batch, **of_chain)
        if dtype == operators.sum_type(dtype):
            yield f"sum, {name}", {"sum_values": partial(operators.OPS._sum_values, [torch.ones((), dtype=dtype, device=device)] * 70)}
        for shape in SHAPES:
            yield f"linear {shape}, {name}", operators.linear(*shape, x_dtype=x_dtype, **options)
            if draws == 1:
                yield f"noisy {shape}, {name}", operators.noisy(*shape, dtype=dtype, device=device, x_dtype=x_dtype, offsets=(5, 3))
        options.pop("offsets", None)
        for shape, estimator in itertools.product(SHAPES[2:], ("local", "flipout")):
            yield f"{estimator} {shape}, {name}", operators.estimated(*shape, estimator=estimator, x_dtype=x_dtype, **options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    count = 0
    for name, calls in cases(device):
        for operator, call in calls.items():
            result = call()
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if not tensor.isfinite().all():
                    raise SystemExit(f"{operator}, {name}: not all of the result is finite")
            count += 1
    print(f"{count} calls")
    return count


if __name__ == "__main__":
    main()
