"""The CPU kernels as built: instruction sets kept apart, equal results from each, and what they allocate."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from kernels import OPS, draw_arguments

from bnn_fast import _C, build_info

INSTRUCTION_SETS = ("generic", "avx2", "avx2x16", "avx512")
FORBIDDEN = {"generic": r"[yz]mm|vfn?m(add|sub)", "avx2": r"zmm|\{%k|%[xy]mm(1[6-9]|2\d|3[01])",
             "avx2x16": r"zmm|\{%k|%[xy]mm(1[6-9]|2\d|3[01])"}


@pytest.fixture(scope="module")
def instructions() -> dict[str, list[str]]:
    """The instructions of every function whose name holds a kernel namespace, by namespace."""
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True,
                             check=True).stdout
    found, current = defaultdict(list), None
    for line in listing.splitlines():
        header = re.match(r"[0-9a-f]+ <(.+)>:$", line)
        if header:
            name = header.group(1)
            current = next((isa for isa in INSTRUCTION_SETS if f"{len(isa)}{isa}" in name), None)
        elif current and ":\t" in line:
            found[current].append(line)
    return found


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="x86 vector code is built on x86 only")
def test_every_instruction_set_has_its_own_functions(instructions):
    for isa in INSTRUCTION_SETS:
        assert len(instructions[isa]) > 1000, isa
    assert any("zmm" in line for line in instructions["avx512"])
    assert any("vfmadd" in line and "ymm" in line for line in instructions["avx2"])


@pytest.mark.parametrize("isa", FORBIDDEN)
def test_no_function_uses_instructions_beyond_its_set(instructions, isa):
    beyond = [line for line in instructions[isa] if re.search(FORBIDDEN[isa], line)]
    assert not beyond, beyond[:5]


PROBE = """
import hashlib, torch, bnn_fast
from bnn_fast import _C
op = torch.ops.bnn_fast
prior = [], [0.0, 1.0]
torch.manual_seed(0)
key = torch.tensor([-987654321987654321, 3])
digest = hashlib.sha256()
for rows, columns, offset in ((1, 1, 0), (3, 127, 0), (5, 1023, 6), (2, 300, 3)):
    mu, rho = torch.randn(rows, columns), torch.randn(rows, columns) * 40
    weight, kl = op._sample_normal([mu, rho], key, *prior, [0, 0, 2, 2, 0, 7, offset])
    digest.update(weight.numpy().tobytes())
rho = torch.linspace(-90, 90, 7 * 1031).view(7, 1031)
for scale in bnn_fast.checks.SCALES:
    w, kl = bnn_fast.functional.sample_normal(torch.zeros_like(rho), rho, key, scale=scale, n_samples=2, column_offset=3)
    digest.update(w.numpy().tobytes())
x, mu, rho = torch.randn(6, 300), torch.randn(9, 300), torch.randn(9, 300) - 3
y, kl = op._variational_linear(x, [mu, rho], key, *prior, [0, 0, 1, 2, 0, 0, 0])
print(_C.cpu_capability(), digest.hexdigest(), kl.item(), y.double().sum().item())
"""


def test_draws_have_the_same_bits_on_every_instruction_set():
    found = {}
    for isa in INSTRUCTION_SETS:
        done = subprocess.run([sys.executable, "-c", PROBE], env={**os.environ, "BNN_FAST_CPU": isa}, capture_output=True, text=True)
        if "one that this processor supports" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        name, *found[isa] = done.stdout.split()
        assert name == isa
    assert {"generic", build_info()["cpu_capability"]} <= set(found)
    digest, kl, y = found["generic"]
    for other, other_kl, other_y in found.values():
        assert other == digest
        assert float(other_kl) == pytest.approx(float(kl), rel=1e-6)
        assert float(other_y) == pytest.approx(float(y), rel=1e-4)


def allocated(function) -> int:
    """Bytes that torch's CPU allocator hands out during a call, at their highest, what is returned included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    del result
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("batch, samples, buffers", [(8, 1, 0), (8, 4, 0), (130, 1, 1), (130, 4, 1)])
def test_no_weight_sized_memory_beyond_gradients_and_one_buffer(batch, samples, buffers):
    rows = columns = 4096
    weights = rows * columns * 4
    mu, rho = torch.randn(rows, columns), torch.full((rows, columns), -3.0)
    n = samples * batch
    x, grad_y, grad_kl = torch.randn(n, columns), torch.randn(n, rows), torch.tensor(0.5)
    arguments = draw_arguments(mu, rho, kl="analytic", n_samples=samples)
    activations = 5 * n * rows * 4  # packed or as results; less than the weights
    assert activations < weights

    def forward():
        return OPS._variational_linear(x, *arguments)

    def backward():
        return OPS._variational_linear_backward([grad_y, grad_kl], x, *arguments, True)

    assert allocated(lambda: torch.empty(rows, columns)) == weights  # the watch sees what it should
    assert allocated(forward) <= buffers * weights + activations
    assert allocated(backward) <= (2 + buffers) * weights + activations
