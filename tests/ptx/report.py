"""Prints what ptxas gives each kernel on each default architecture, and what the fused ones issue for a weight: `make ptx-report`."""

from __future__ import annotations

from ptx import issued
from ptx.build import Resources, architectures, find_nvcc, resources


def table(found: list[Resources]) -> str:
    """A line for each kernel: its registers on each architecture, and of the rest the most on any of them."""
    names = list(dict.fromkeys(r.architecture for r in found))
    width = max(len(r.kernel) for r in found)

    def line(kernel, registers, *most):
        return " ".join([f"{kernel:{width}}", *(f"{r:>4}" for r in registers), *(f"{m:>7}" for m in most)])

    lines = [line("bytes but for registers on sm_", names, "shared", "stack", "spilled")]
    for source in dict.fromkeys(r.source for r in found):
        lines.append(source)
        here = [r for r in found if r.source == source]
        for kernel in dict.fromkeys(r.kernel for r in here):
            of = {r.architecture: r for r in here if r.kernel == kernel}
            lines.append(
                line(
                    kernel,
                    [of[name].registers if name in of else "-" for name in names],
                    max(r.shared for r in of.values()),
                    max(r.stack for r in of.values()),
                    max(r.spill_stores + r.spill_loads for r in of.values()),
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if find_nvcc() is None:
        raise SystemExit("nvcc was not found: put it on PATH, or its toolkit's folder in CUDA_HOME")
    print(table(resources(architectures())))
    if (nvdisasm := issued.find_nvdisasm()) is None:
        print("\nnvdisasm was not found, on PATH or beside nvcc: no instructions a weight")
    else:
        print("\n" + issued.table(issued.rows(nvdisasm)))
