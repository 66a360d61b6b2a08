"""What of a module's kernels has been executed so far, for tests that no instruction is left out."""

from __future__ import annotations

from typing import NamedTuple

from .module import Module


class Missed(NamedTuple):
    """Something that a kernel has never done."""

    kernel: str
    what: str
    lines: tuple  # "file:line", innermost first
    text: str  # of the instruction


def missed(module: Module) -> list[Missed]:
    """Kernels that were never launched, instructions that no thread has executed, branches that were never
    taken, or always.
    """
    found = []
    for name in module.kernels:
        if name not in module.programs:
            found.append(Missed(name, "never launched", (), ""))
            continue
        program = module.programs[name]
        for pc, instruction in enumerate(program.instructions):
            conditional = instruction.opcode[0] == "bra" and instruction.guard
            ahead, aside = (pc, True) in program.outcomes, (pc, False) in program.outcomes
            if conditional and ahead != aside:
                what = "always taken" if ahead else "never taken"
            elif not (ahead or aside):
                what = "never executed"
            else:
                continue
            found.append(Missed(name, what, instruction.lines, instruction.text))
    return found
