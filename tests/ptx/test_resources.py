"""What nvcc makes of the kernels: no warning, no spill, no stack; and the report of it."""

from __future__ import annotations

import re
import subprocess

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


SPILLING = """\
__global__ void __launch_bounds__(1024) spills(const volatile float* from, float* to) {
  float v[96];
  #pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = from[i * 1024 + threadIdx.x];
  #pragma unroll
  for (int i = 0; i < 96; ++i) to[i * 1024 + threadIdx.x] = v[(7 * i + 3) % 96] - v[i];
}
"""


def strict_flags() -> list[str]:
    """What setup.py adds under make."""
    text = (build.ROOT / "setup.py").read_text()
    return re.findall(r'"([^"]+)"', re.search(r'"BNN_FAST_STRICT".*?nvcc_flags \+= \[(.*?)\]', text, re.DOTALL)[1])


def test_no_kernel_spills_or_has_a_stack(nvcc):
    """On Hopper; the build under make refuses it on every architecture, as the next test shows."""
    found = build.resources(["90"])
    assert {r.source for r in found} == {source.name for source in build.kernel_sources()}
    assert all(r.registers > 0 for r in found)
    wrong = [r for r in found if r.stack or r.spill_stores or r.spill_loads]
    assert not wrong, "\n" + table(wrong)


def test_the_build_refuses_a_spill(nvcc, tmp_path):
    (tmp_path / "spills.cu").write_text(SPILLING)
    command = [nvcc, *build.NVCC_FLAGS, "-arch=sm_90", "-cubin", "spills.cu", "-o", "out.cubin"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    strict = subprocess.run([*command, *strict_flags()], cwd=tmp_path, capture_output=True, text=True)
    assert strict.returncode != 0 and "spill" in (strict.stdout + strict.stderr).lower()


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
