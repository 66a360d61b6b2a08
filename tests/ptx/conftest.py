from __future__ import annotations

import os
from pathlib import Path

import pytest
from kernels import one_thread  # noqa: F401

from ptx import build
from ptx.device import Device

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("cuda"):
            item.add_marker("ptx")
    items.sort(key=lambda item: item.path == HERE / "test_coverage.py")  # after what it tells of
    here = {item.path.name for item in items if HERE in item.path.parents}
    whole = here >= {path.name for path in HERE.glob("test_*.py")}
    config.whole_of_ptx = whole and not any("::" in argument for argument in config.args)


def pytest_deselected(items):
    for item in items:
        if item.get_closest_marker("ptx"):
            item.config.whole_of_ptx = False


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = build.find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found: it makes the PTX that these tests run")
    return found


@pytest.fixture(scope="session")
def interpreted(nvcc):
    """The CUDA operators on CPU tensors (operators.py), with PTX for sm_80 or BNN_FAST_PTX_ARCHITECTURE."""
    from ptx.operators import Operators

    return Operators(build.operators(os.environ.get("BNN_FAST_PTX_ARCHITECTURE", "80")))


@pytest.fixture(scope="session", params=["interpreted", pytest.param("device", marks=pytest.mark.cuda)])
def cuda_ops(request):
    """The CUDA operators, from their PTX and on a GPU."""
    return request.getfixturevalue("interpreted") if request.param == "interpreted" else Device()
