"""The count of SASS instructions a weight (issued.py): what it reads of a disassembly, and how often warps issue what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from benchmarks.gpu.operators import Case

from ptx import issued

SASS = """\
.text._Z6kernelPf:
	//## File "/somewhere/a.cu", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
	//## File "/somewhere/b.h", line 3 inlined at "/somewhere/a.cu", line 8
	//## File "/somewhere/a.cu", line 8
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_0:
	//## File "/somewhere/a.cu", line 7
        /*0030*/                   EXIT ;
        /*0040*/                   NOP;
"""


def test_places_of_a_disassembly():
    assert issued.places(SASS) == {"kernel": {("a.cu:7",): 2, ("b.h:3", "a.cu:8"): 2}}


def test_sass_is_issued_as_often_as_the_ptx_of_its_place():
    """Four instructions at b.h:3 in a.cu:8 issued ten times each are two of SASS issued ten times, or what ptxas knows alone."""
    program = SimpleNamespace(instructions=[SimpleNamespace(lines=lines) for lines in [("a.cu:7",), *[("b.h:3", "a.cu:8")] * 4]])
    counts = {0: 1, 1: 10, 2: 10, 3: 10, 4: 10}
    assert issued.estimate(program, counts, {("a.cu:7",): 2, ("b.h:3", "a.cu:8"): 2}) == 2 + 20
    assert issued.estimate(program, counts, {("c.h:1", "a.cu:8"): 3, ("d.h:1",): 5}) == pytest.approx(30)


def test_what_the_interpreter_counts(interpreted, monkeypatch):
    """mu and rho of 128 x 128 weights are loaded once, a quad to a lane."""
    monkeypatch.setattr(issued, "SIDE", 128)
    monkeypatch.setattr(issued, "SMALL_SIDE", 72)
    interpreted.runtime.stand_in_set_multiprocessors(1)
    try:
        found = issued.counted(interpreted, Case(8192, 8192, 1, "float32", estimator="local"), "")
    finally:
        interpreted.runtime.stand_in_set_multiprocessors(4)
    ((program, counts),) = (rest for name, *rest in found if "forward_kernel" in name and "sample" not in name)
    loads = [pc for pc, i in enumerate(program.instructions) if i.opcode[:2] == ("ld", "global") and "v4" in i.opcode]
    assert [counts[pc] for pc in loads if counts[pc]] == [128 * 128 / 4 / 32] * 2


def test_a_row_tells_what_bounds_it():
    case = Case(8192, 8192, 1, "float32", estimator="local")
    shown = issued.table([issued.Row(case, "forward", 60.0, 2e-3, 1e-3), issued.Row(case, "backward", 60.0, 2e-3, 3e-3)])
    assert [line.split()[-1] for line in shown.splitlines()[1:]] == ["bytes", "instructions"]
    assert issued.find_nvdisasm() is None or issued.find_nvdisasm().endswith("nvdisasm")
