"""Every kernel for every default architecture: no warning, no spill, no stack."""

from __future__ import annotations

import pytest

from ptx import build
from ptx.report import table

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8bnn_fast12_GLOBAL__N_110sum_kernelEPKd' for 'sm_80'
ptxas info    : Function properties for _ZN8bnn_fast12_GLOBAL__N_110sum_kernelEPKd
    24 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 64 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 7.043 ms
ptxas info    : Compiling entry function '_Z4tileIfLi4EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z4tileIfLi4EEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 384 bytes cmem[0]
"""


@pytest.mark.parametrize("architecture", build.architectures())
def test_no_kernel_spills_or_has_a_stack(architecture, nvcc):
    found = [r for r in build.resources() if r.architecture == architecture]
    assert {r.source for r in found} == {source.name for source in build.kernel_sources()}
    assert all(r.registers > 0 for r in found)
    wrong = [r for r in found if r.stack or r.spill_stores or r.spill_loads]
    assert not wrong, "\n" + table(wrong)


def test_what_ptxas_says_is_read():
    first, second = build.parse_resources("a.cu", "80", LOG)
    assert first == ("a.cu", "80", "sum_kernel", 28, 64, 24, 16, 12)
    assert second == ("a.cu", "80", "tile<float, 4>", 32, 0, 0, 0, 0)
    assert [line.split() for line in table([first, second]).splitlines()[1:]] == [
        ["a.cu"],
        ["sum_kernel", "28", "64", "24", "28"],
        ["tile<float,", "4>", "32", "0", "0", "0"],
    ]


def test_the_flags_are_setups():
    setup = (build.ROOT / "setup.py").read_text()
    for flag in (*build.NVCC_FLAGS, *build.TORCH_FLAGS[1:]):
        assert f'"{flag}"' in setup, flag
    assert build.TORCH_FLAGS[0].split("=")[1] in setup
