"""What a pass must at least cost on a GPU, whatever kernels do it, and the targets.

    floor = max(bytes / copy bandwidth, warp instructions / issue rate, flops / matrix rate)

The three rates are measured; the instructions are counted by ncu where it works, of bnn_fast's own kernels.
"""
from __future__ import annotations

from typing import NamedTuple

from .operators import Case

WARP = 32
STEP_TARGETS = [  # inputs = outputs, batch, type, and how much more than nn.Linear's time a step may take
    (8192, 1, "float32", 3.0), (8192, 16, "float32", 3.0), (4096, 4096, "bfloat16", 1.3),
    (8192, 4096, "bfloat16", 1.3)]
LOCAL_TARGETS = [(8192, 1, "float32", 2.2), (8192, 16, "float32", 2.2)]  # the same of estimator="local"
NETWORK_TARGETS = {"eager": 1.0, "CUDA graph": 0.7}
FRACTION_TARGET = 0.75


class Work(NamedTuple):
    bytes: int  # read or written, each tensor once
    flops: int  # of the matrix products


def work(operator: str, case: Case) -> Work:
    """What `operator` has to move and multiply. Biases, the key and the KL's sum are small and left out."""
    size = case.dtype.itemsize
    weights = case.inputs * case.outputs * size
    rows = case.samples * case.batch
    x, y = rows * case.inputs * size, rows * case.outputs * size
    product = 2 * rows * case.inputs * case.outputs
    mu_rho = 2 * weights
    return {  # what is read, then what is written
        "sample_normal": Work(mu_rho + case.samples * weights, 0),
        "sample_normal_backward": Work(mu_rho + case.samples * weights + mu_rho, 0),
        "kl_normal": Work(mu_rho, 0),
        "kl_normal_backward": Work(mu_rho + mu_rho, 0),
        "variational_linear": Work(mu_rho + x + y, product),
        "variational_linear_backward": Work(mu_rho + x + y + mu_rho + x, 2 * product),
        "estimated_linear": Work(mu_rho + x + y, 2 * product),
        "estimated_linear_backward": Work(mu_rho + x + y + mu_rho + x, 4 * product),
    }[operator]


def floor(done: Work, type: str, instructions: float | None, ceilings: dict[str, float]) -> tuple[float, str]:
    """(seconds, what bounds it). ceilings: bytes, warp instructions, and flops of each type, a second."""
    bounds = {"bytes": done.bytes / ceilings["bytes"], "flops": done.flops / ceilings[type],
              "instructions": (instructions or 0) / ceilings["instructions"]}
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound], bound


def targets(timings: dict) -> list[dict]:
    """Each target with what was found, None where it was not measured."""
    def row(name: str, target: float, found: float | None, met: bool | None) -> dict:
        return {"name": name, "target": target, "found": found, "met": None if found is None else met}

    rows = []
    for estimator, wanted in (("weight", STEP_TARGETS), ("local", LOCAL_TARGETS)):
        for n, batch, type, target in wanted:
            case = Case(n, n, batch, type, estimator=estimator)
            found = timings["step"].get(case.name, {}).get(case.provider, {}).get("ratio")
            rows.append(row(f"step over nn.Linear, {case.name}", target, found, found is not None and found <= target))
    for how, target in NETWORK_TARGETS.items():
        for name, of_name in timings["network"].items():
            if name.endswith(how):
                found = of_name["bnn_fast"]["ratio"]
                rows.append(row(f"training step over the deterministic network's, {name}", target, found, found <= target))
    fractions = {f"{operator}, {case}": t["fraction"] for case, operators in timings["operators"].items()
                 for operator, t in operators.items()}
    worst = min(fractions, key=fractions.__getitem__, default=None)
    below = sum(fraction < FRACTION_TARGET for fraction in fractions.values())
    rows.append(row(f"of the floor, the least of {len(fractions)} passes, {below} of them below: {worst}",
                    FRACTION_TARGET, fractions.get(worst), below == 0))
    return rows
