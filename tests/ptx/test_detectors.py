"""The interpreter finds what is wrong with the kernels in faults/, at its line, and nothing in their correct
twins.
"""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ptx.interpreter import GlobalMemory, PtxFault, launch, parse

FAULTS = Path(__file__).parent / "faults"
SHARED, GLOBAL, BARRIERS, ASYNCHRONOUS, WARPS = (
    (1, 64, 64),
    (3, 64, 192),
    (1, 96, 96),
    (1, 64, 256),
    (1, 32, 32),
)
RACE = "race in {} memory: {} after {}".format
KERNELS = {  # name: (blocks, threads, elements), what is wrong
    "read_before_barrier": (SHARED, RACE("shared", "read", "write")),
    "overwrite_before_barrier": (SHARED, RACE("shared", "write", "read")),
    "one_reader_of_many": (SHARED, RACE("shared", "write", "read")),
    "read_before_syncwarp": (SHARED, RACE("shared", "read", "write")),
    "syncwarp_of_other_lanes": (SHARED, RACE("shared", "read", "write")),
    "syncwarp_across_warps": (SHARED, RACE("shared", "read", "write")),
    "same_cell": (SHARED, RACE("shared", "write", "write")),
    "neighbouring_bytes": (SHARED, RACE("shared", "read", "write")),
    "unwritten": (SHARED, "read of uninitialised shared memory"),
    "shared_out_of_bounds": (SHARED, "out-of-bounds access of shared memory"),
    "shared_misaligned": (SHARED, "misaligned access"),
    "atomic_against_plain": (SHARED, RACE("shared", "read", "write")),
    "global_out_of_bounds": (GLOBAL, "out-of-bounds access of global memory"),
    "read_out_of_bounds": (GLOBAL, "out-of-bounds access of global memory"),
    "global_misaligned": (GLOBAL, "misaligned access"),
    "global_unwritten": (GLOBAL, "read of uninitialised global memory"),
    "write_to_constant": (GLOBAL, "write to read-only memory"),
    "blocks_write_alike": (GLOBAL, RACE("global", "write", "write")),
    "block_reads_what_another_writes": (GLOBAL, RACE("global", "read", "write")),
    "threads_exchange": (GLOBAL, RACE("global", "read", "write")),
    "atomics_meet": (GLOBAL, RACE("global", "write", "write")),
    "barrier_in_branch": (BARRIERS, "divergent barrier"),
    "exit_before_barrier": (BARRIERS, "divergent barrier"),
    "barriers_at_two_places": (BARRIERS, "divergent barrier"),
    "named_barrier_of_others": (BARRIERS, RACE("shared", "read", "write")),
    "named_barrier_from_two_places": (BARRIERS, "divergent barrier"),
    "named_barrier_chain": (BARRIERS, RACE("shared", "read", "write")),
    "producer_and_consumer": (BARRIERS, RACE("shared", "write", "read")),
    "copy_without_wait": (ASYNCHRONOUS, "read of cp.async data before its wait"),
    "copy_without_barrier": (ASYNCHRONOUS, RACE("shared", "read", "write")),
    "one_group_too_few": (ASYNCHRONOUS, "read of cp.async data before its wait"),
    "copy_over_what_is_read": (ASYNCHRONOUS, RACE("shared", "write", "read")),
    "copy_from_beyond": (ASYNCHRONOUS, "out-of-bounds access of global memory"),
    "shuffle_in_branch": (WARPS, "shfl with lanes that are not converged"),
    "shuffle_from_absent_lane": (WARPS, "shfl from a lane that is not here"),
    "vote_with_a_lane_too_many": (WARPS, "vote with lanes that are not converged"),
    "matrix_in_branch": (WARPS, "mma with lanes that are not converged"),
    "matrix_load_in_branch": (WARPS, "ldmatrix with lanes that are not converged"),
}


@pytest.fixture(scope="module")
def kernels(nvcc, tmp_path_factory):
    """name -> the module it is in"""
    folder = tmp_path_factory.mktemp("faults")
    sources = [str(path) for path in sorted(FAULTS.glob("*.cu"))]
    command = [
        nvcc,
        "-ptx",
        "-lineinfo",
        "-std=c++20",
        "-arch=sm_80",
        "--output-directory",
        str(folder),
        *sources,
    ]
    subprocess.run(command, check=True, capture_output=True)
    modules = [parse(path.read_text()) for path in sorted(folder.glob("*.ptx"))]
    return {name: module for module in modules for name in module.kernels}


def line_of(name):
    for path in FAULTS.glob("*.cu"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(rf"// fault: {name}$", line):
                return f"{path.name}:{number}"
    raise AssertionError(f"no line is marked with {name}")


def run(module, name, faulty):
    (blocks, threads, elements), _ = KERNELS[name]
    source, out = np.arange(elements, dtype=np.float32), np.zeros(elements, np.float32)
    memory = GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes, "out", initialised=False)
    memory.add(source.ctypes.data, source.nbytes, "in", read_only=True)
    pointers = [source, out] if len(module.kernels[name].params) == 3 else [out]
    params = [struct.pack("Q", array.ctypes.data) for array in pointers] + [struct.pack("i", faulty)]
    launch(module, name, (blocks, 1, 1), (threads, 1, 1), 256, params, memory)
    return out


def test_every_kernel_is_listed(kernels):
    assert set(kernels) == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_planted_fault_is_found_at_its_line(kernels, name):
    with pytest.raises(PtxFault) as caught:
        run(kernels[name], name, True)
    fault = caught.value
    assert (fault.kind, fault.kernel) == (KERNELS[name][1], name)
    assert line_of(name) in fault.lines and line_of(name) in str(fault)
    assert fault.block is not None and fault.thread is not None


@pytest.mark.parametrize("name", KERNELS)
def test_correct_twin_is_clean(kernels, name):
    run(kernels[name], name, False)
