"""python -m benchmarks.gpu.instructions: each operator once, for ncu to count its kernels' instructions.

Before each call its name is printed and one waiting kernel launched, by which the counts are told apart.
"""
from __future__ import annotations

import csv
import io

import torch

from .operators import ELEMENTWISE, LAYERS, SWEEP

METRIC = "smsp__inst_executed.sum"
MARKER = "spin_kernel"  # of torch.cuda._sleep
NAME = "count: "


def ncu(program: str, csv_path: str) -> list[str]:
    """The command before the program's own. Clocks stay as they are; only bnn_fast's kernels are counted."""
    return [program, "--metrics", METRIC, "--csv", "--page", "raw", "--print-units", "base",
            "--log-file", csv_path, "--clock-control", "none", "--cache-control", "none",
            "--kernel-name-base", "demangled", "--kernel-name", f"regex:bnn_fast|{MARKER}"]


def parse(table: str, printed: str) -> dict[str, dict[str, float]]:
    """{case: {operator: warp instructions}} of ncu's table and the program's output, both in order."""
    lines = table.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    counts: list[float] = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if not row["ID"]:  # the units
            continue
        if MARKER in row["Kernel Name"]:
            counts.append(0.0)
        else:
            counts[-1] += float(row[METRIC].replace(",", ""))
    names = [line.removeprefix(NAME).split(" | ") for line in printed.splitlines() if line.startswith(NAME)]
    found: dict[str, dict[str, float]] = {}
    for (case, operator), count in zip(names, counts, strict=True):
        if count:
            found.setdefault(case, {})[operator] = count
    return found


def main() -> None:
    for case in ELEMENTWISE + LAYERS + SWEEP:
        with case.precision():
            for operator, call in case.calls("cuda").items():
                print(f"{NAME}{case.name} | {operator}", flush=True)
                torch.cuda._sleep(1)
                try:
                    call()
                except RuntimeError as error:
                    print(f"failed: {error}")


if __name__ == "__main__":
    main()
