"""What a step of a layer takes and gives back."""
from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from common import gradients, needs_extension, network, twin  # noqa: F401

import bnn_fast as bf


def test_gradients_are_accumulated_without_a_copy():
    if not bf.build_info()["extension"]:
        pytest.skip("bnn_fast was installed without its extension")
    layer = bf.VariationalLinear(64, 64)
    y, kl = layer(torch.randn(8, 64)), bf.kl_divergence(layer)
    gradients = [torch.randn(8, 64), torch.ones(())]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.backward([y, kl], gradients)
    calls = {event.key: event.count for event in profile.key_averages()}
    passes = {name: n for name, n in calls.items() if name.startswith("bnn_fast::")}
    if bf.build_info()["nodes"]:
        assert passes == {"bnn_fast::_variational_linear_backward": 1}, "one pass serves y and the KL"
        assert not {"aten::clone", "aten::copy_", "aten::add", "aten::add_"} & set(calls)
    else:
        assert passes == {"bnn_fast::_variational_linear_backward": 1, "bnn_fast::_kl_normal_backward": 2}


FAULTS = """
import resource, torch, bnn_fast as bf
layer, x = bf.VariationalLinear(1024, 1024), torch.randn(32, 1024)

def steps(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        layer.zero_grad(set_to_none=True)
        (layer(x).sum() + bf.kl_divergence(layer)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

steps(3)
print(steps(40))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
@needs_extension
def test_a_step_takes_the_memory_that_the_step_before_gave_back():
    """2,048 pages of gradients, which the system would clear anew in most steps."""
    done = subprocess.run([sys.executable, "-c", FAULTS], text=True, capture_output=True, check=True)
    assert int(done.stdout) < 40 * 2048 / 4
