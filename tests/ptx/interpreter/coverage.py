"""What of a module's kernels has been executed so far, for tests that no part of a kernel is left out.

It is told by the places in the sources: a line, and the line that it was inlined into. An instruction itself may
be one of many copies that the compiler has made of a place, for each value of some variable.
"""

from __future__ import annotations

from typing import NamedTuple

from .module import Module


class Missed(NamedTuple):
    """Something that a kernel has never done."""

    kernel: str
    what: str
    place: tuple  # "file:line" of at most two lines, the inner one first


def missed(module: Module, files: set[str]) -> list[Missed]:
    """Kernels that were never launched; places of which no thread has executed an instruction, or whose branches
    were never taken, or always; loops that never went round again, or never ended. Lines of other files than these count as the line that they were inlined into.
    """
    found = []
    for name in module.kernels:
        if name not in module.programs:
            found.append(Missed(name, "never launched", ()))
            continue
        program, seen, branches = module.programs[name], {}, {}
        for pc, instruction in enumerate(program.instructions):
            place = tuple(line for line in instruction.lines if line.split(":")[0] in files)[:2]
            outcomes = {ahead for ahead in (True, False) if (pc, ahead) in program.outcomes}
            seen[place] = seen.get(place, False) or bool(outcomes)
            if instruction.opcode[0] == "bra" and instruction.guard:
                back = program.labels[instruction.operands[0].name] <= pc  # the next round of a loop
                branches.setdefault((place, back), set()).update(outcomes)
        found += [Missed(name, "never executed", place) for place, any_ in seen.items() if not any_]
        found += [
            Missed(name, ("always" if True in outcomes else "never") + (" repeated" if back else " taken"), place)
            for (place, back), outcomes in branches.items()
            if len(outcomes) == 1
        ]
    return found
