"""The stand-in runtime holds launches to the hardware's limits, and the operators' memory to its bounds."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import pytest
from kernels import draw_arguments, posterior

from bnn_fast import Normal
from ptx import build
from ptx.interpreter import PtxFault
from ptx.operators import LAUNCH_FAILURE, Launcher, Operators, _Memory

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t
DYNAMIC_SHARED = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize


class Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


@pytest.fixture
def runtime(interpreted, monkeypatch):
    """The runtime with a kernel "k" registered at the address 1, whose launches all succeed."""
    library = interpreted.runtime
    nothing = ctypes.c_void_p(None)
    library.__cudaRegisterFunction(nothing, ctypes.c_void_p(1), nothing, b"k", -1, *[nothing] * 5)
    monkeypatch.setattr(interpreted, "_interpret", lambda *launch: None)
    return library


def launch(runtime, grid, block, shared=0) -> int:
    kernel = ctypes.c_void_p(1)
    runtime.cudaGetLastError()
    error = runtime.__cudaLaunchKernel(
        kernel,
        Dim3(*grid),
        Dim3(*block),
        ctypes.c_void_p(None),
        ctypes.c_size_t(shared),
        ctypes.c_void_p(None),
    )
    assert runtime.cudaGetLastError() == error and runtime.cudaGetLastError() == 0
    return error


@pytest.mark.parametrize(
    "grid, block",
    [
        ((0, 1, 1), (1, 1, 1)),
        ((1, 1, 0), (1, 1, 1)),
        ((1, 1, 1), (32, 0, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((1, 1, 65536), (1, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 65)),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(grid, block, runtime):
    assert launch(runtime, grid, block) == INVALID_CONFIGURATION


def test_a_launch_within_the_limits_is_made(runtime):
    for grid, block in (((2**31 - 1, 1, 1), (1024, 1, 1)), ((1, 65535, 65535), (16, 1, 64))):
        assert launch(runtime, grid, block) == 0


def test_much_shared_memory_must_have_been_asked_for(runtime):
    def ask(size):
        return runtime.cudaFuncSetAttribute(ctypes.c_void_p(1), DYNAMIC_SHARED, size)

    assert launch(runtime, (1, 1, 1), (32, 1, 1), 48 * 1024) == 0
    assert launch(runtime, (1, 1, 1), (32, 1, 1), 48 * 1024 + 1) == INVALID_VALUE
    assert ask(227 * 1024 + 1) == INVALID_VALUE
    assert ask(100 * 1024) == 0
    assert launch(runtime, (1, 1, 1), (32, 1, 1), 100 * 1024) == 0
    assert launch(runtime, (1, 1, 1), (32, 1, 1), 100 * 1024 + 1) == INVALID_VALUE


def draw(ops: Operators, columns: int = 37):
    mu, rho = posterior(19, columns)
    return ops._sample_normal(*draw_arguments(mu, rho, prior=Normal(0.25, 0.5), kl="analytic"))


def test_a_fault_in_a_kernel_reaches_the_caller(interpreted, monkeypatch):
    def planted(*launch):
        raise PtxFault("planted")

    monkeypatch.setattr(interpreted, "_interpret", planted)
    with pytest.raises(PtxFault, match="planted"):
        draw(interpreted)


def test_a_failed_launch_is_an_exception_that_names_the_operator(interpreted):
    refuse = Launcher(lambda *launch: LAUNCH_FAILURE)
    interpreted.runtime.stand_in_set_launcher(refuse)
    try:
        with pytest.raises(RuntimeError, match="bnn_fast::_sample_normal: unspecified launch failure"):
            draw(interpreted)
    finally:
        interpreted.runtime.stand_in_set_launcher(interpreted._launcher)


def test_static_shared_memory_counts(interpreted, monkeypatch):
    usual = interpreted._interpret
    for static in (255, 256):  # of block_sum: see csrc/cuda/quad.cuh
        monkeypatch.setattr(interpreted, "_interpret", lambda at, most, arguments: usual(at, static, arguments))
        with nullcontext() if static == 256 else pytest.raises(RuntimeError, match="takes 256 . 0 bytes"):
            draw(interpreted)


@pytest.mark.parametrize("columns", [36, 37])
def test_an_access_one_element_beyond_a_buffer_is_a_fault(columns, interpreted, monkeypatch):
    whole = interpreted.allocations

    def shortened():
        return [type(a)(a.address, a.size - 4 * (a.size == 19 * columns * 4), a.number) for a in whole()]

    draw(interpreted, columns)
    monkeypatch.setattr(interpreted, "allocations", shortened)
    with pytest.raises(PtxFault, match=r"\.cuh?:\d+"):
        draw(interpreted, columns)


@pytest.mark.parametrize("fault", [{"read_only": True}, {"initialised": False}], ids=str)
def test_arguments_are_not_written_and_fresh_memory_is_not_read(fault, interpreted, monkeypatch):
    """Seen by taking the outputs for arguments, or the arguments for fresh memory."""
    usual = _Memory._add
    monkeypatch.setattr(
        _Memory, "_add", lambda self, a, name, **known: usual(self, a, name, **(known | fault))
    )
    with pytest.raises(PtxFault):
        draw(interpreted)


def test_no_memory_outlives_a_call(interpreted):
    weight, _ = draw(interpreted)
    assert weight.isfinite().all() and interpreted.allocations() == []


def test_what_the_runtime_leaves_out_does_not_link(nvcc, tmp_path):
    (tmp_path / "wait.cpp").write_text(
        "#include <cuda_runtime_api.h>\nint wait() { return cudaDeviceSynchronize(); }\n"
    )
    command = [nvcc, "-c", "-Xcompiler", "-fPIC", str(tmp_path / "wait.cpp"), "-o", "out.o"]
    with pytest.raises(RuntimeError, match="cudaDeviceSynchronize"):
        build.link([build.make(tmp_path / "object", command) / "out.o"])
