from __future__ import annotations

import pytest
import torch


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
