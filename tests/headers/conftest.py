from __future__ import annotations

import pytest

from headers.build import load


@pytest.fixture(scope="session")
def headers():
    """The C++ headers as a Python module: see build.py and module.cpp."""
    return load()


@pytest.fixture(scope="session")
def float_lanes(headers) -> list[str]:
    """The names of all float32 lane types but the scalar one that this CPU runs."""
    return [
        name for name, (_, dtype) in headers.lanes().items() if dtype == "float32" and name != "scalar_float"
    ]
