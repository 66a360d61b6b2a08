"""SASS instructions that the fused kernels issue for a weight, and their floor beside that of the bytes; without a GPU.

The interpreter counts how often warps issue each PTX instruction, and nvdisasm tells what SASS ptxas has made of which place in the
sources, a line with those that it was inlined into. The SASS of a place is taken to be issued as often as its PTX is on the average.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import floors
from benchmarks.gpu.operators import Case

from . import build
from .operators import Operators, _parsed

ARCHITECTURE = "90"
SIDE, SMALL_SIDE = 512, 128  # of the layers that are interpreted: what a block does once is little beside what it repeats
# Of an H200 by its data sheet: bytes, warp instructions (four a cycle on 132 multiprocessors at 1.98 GHz), flops in float32.
CEILINGS = {"bytes": 4.8e12, "instructions": 132 * 4 * 1.98e9, "float32": 67e12}
SHOWN = [Case(8192, 8192, batch, "float32", estimator=estimator) for estimator in ("weight", "local", "flipout") for batch in (1, 16)]
WAYS = {"": "forward", "_backward": "backward"}


class Row(NamedTuple):
    case: Case
    way: str
    per_weight: float  # warp instructions, times the lanes of a warp
    bytes: float       # seconds that the bytes take, and the instructions
    instructions: float


def find_nvdisasm() -> str | None:
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(Path(build.find_nvcc()).resolve().parent))


def rows(nvdisasm: str) -> list[Row]:
    """Of SHOWN, in their order, forward and backward."""
    operators, sass = Operators(build.operators(ARCHITECTURE)), disassembled(nvdisasm)
    operators.runtime.stand_in_set_multiprocessors(1)
    found = []
    for case in SHOWN:
        for suffix, way in WAYS.items():
            kernels = ((build.short_name(name), *rest) for name, *rest in counted(operators, case, suffix))
            issued = sum(estimate(*rest, sass[name]) for name, *rest in kernels if re.search(rf"\b{way}_kernel<", name))
            (name,) = (n for n in calls(operators, case, 8) if n.endswith("linear" + suffix))
            done, per_weight = floors.work(name, case), 32 * issued / SIDE**2
            found.append(Row(case, way, per_weight, done.bytes / CEILINGS["bytes"],
                             per_weight * case.inputs * case.outputs / 32 / CEILINGS["instructions"]))
    return found


def calls(operators, case: Case, side: int) -> dict:
    """The case's operators on a square layer of this side, interpreted."""
    return case._replace(inputs=side, outputs=side).calls("cpu", operators)


def counted(operators, case: Case, suffix: str):
    """(kernel, program, how often warps have issued each of its instructions) of a call."""
    def prepared(side):
        return next(call for name, call in calls(operators, case, side).items() if name.endswith("linear" + suffix))

    small, call = prepared(SMALL_SIDE), prepared(SIDE)
    operators.launches.clear()
    small()  # decodes the programs' steps
    names = {launch.kernel for launch in operators.launches}
    programs = {name: _parsed(operators._files[name]).programs[name] for name in names}
    steps, counts = {name: list(programs[name].steps) for name in names}, {name: collections.Counter() for name in names}
    try:
        for name, program in programs.items():
            program.steps[:] = [counting(step, counts[name], pc) for pc, step in enumerate(steps[name])]
        call()
    finally:
        for name, program in programs.items():
            program.steps[:] = steps[name]
    return [(name, programs[name], counts[name]) for name in names]


def counting(step, counts, pc):
    def counted_step(state):
        counts[pc] += int(state.mask.reshape(-1, 32).any(1).sum())
        return step(state)

    return counted_step


def estimate(program, counts: dict, sass: dict) -> float:
    """Warp instructions of SASS, of which each place has so many."""
    issued, lengths = collections.Counter(), collections.Counter()
    for pc, instruction in enumerate(program.instructions):
        for depth in range(len(instruction.lines)):  # a place that ptxas alone knows counts as the one that it is inlined into
            issued[instruction.lines[depth:]] += counts[pc]
            lengths[instruction.lines[depth:]] += 1
    total = 0.0
    for place, number in sass.items():
        known = next((place[depth:] for depth in range(len(place)) if place[depth:] in lengths), None)
        total += number * issued[known] / lengths[known] if known else 0.0
    return total


def disassembled(nvdisasm: str) -> dict[str, collections.Counter]:
    """Of each fused kernel, by its short name, how many instructions each place has."""
    found = {}
    for source in build.kernel_sources():
        if not re.match(r"(linear|estimated)_(forward|backward)$", source.stem):
            continue
        folder = build.cubin(source, ARCHITECTURE)
        text = subprocess.run([nvdisasm, "-gi", "-c", "out.o"], cwd=folder, capture_output=True, text=True, check=True).stdout
        found |= places(text)
    return found


def places(text: str) -> dict[str, collections.Counter]:
    kernels, current, place, fresh = {}, None, (), True
    for line in text.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            current = kernels.setdefault(build.short_name(match[1]), collections.Counter())
        elif match := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            place, fresh = (() if fresh else place) + (f"{Path(match[1]).name}:{match[2]}",), False
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP)", line) and current is not None:
            current[place] += 1
            fresh = True
    return kernels


def table(found: list[Row]) -> str:
    lines = [f"{'sm_90 SASS a weight':42}{'':9}{'instructions':>13}{'their ms':>10}{'bytes ms':>10}  bound"]
    for row in found:
        bound = "bytes" if row.bytes > row.instructions else "instructions"
        times = f"{1e3 * row.instructions:10.3f}{1e3 * row.bytes:10.3f}"
        lines.append(f"{row.case.name:42}{row.way:9}{row.per_weight:13.1f}{times}  {bound}")
    return "\n".join(lines)
