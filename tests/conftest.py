from __future__ import annotations

import pytest
import torch


def pytest_pycollect_makemodule(module_path, parent):
    """test_field_reports.py stands for the modules of its folder."""
    return Reports.from_parent(parent, path=module_path) if module_path.name == "test_field_reports.py" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process for all of ptx/, whose test_coverage.py looks at what that process ran; the rest test by test."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ptx" if nodeid.startswith("tests/ptx/") else nodeid

    return Scheduling(config, log)


class Reports(pytest.File):
    def collect(self):
        modules = sorted(self.path.with_name("field_reports").glob("[!_]*.py"))
        return [pytest.Module.from_parent(self, path=path) for path in modules]


def pytest_collection_modifyitems(items):
    reason = None
    if not torch.cuda.is_available():
        reason = "no CUDA GPU"
    else:
        import bnn_fast

        if not bnn_fast.build_info()["cuda_architectures"]:
            reason = "bnn_fast was built without CUDA kernels"
    if reason:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))
