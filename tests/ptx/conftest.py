from __future__ import annotations

import os

import pytest
from kernels import one_thread  # noqa: F401

from ptx import build


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = build.find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found: it makes the PTX that these tests run")
    return found


@pytest.fixture(scope="session")
def cuda_ops(nvcc):
    """The CUDA operators on CPU tensors (operators.py), with PTX for sm_80 or BNN_FAST_PTX_ARCHITECTURE."""
    from ptx.operators import Operators

    return Operators(build.operators(os.environ.get("BNN_FAST_PTX_ARCHITECTURE", "80")))
