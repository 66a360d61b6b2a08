"""The second extension, autograd's nodes: when it is loaded, and that all is right without it."""
from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref

import torch
from common import needs_extension, needs_nodes

import bnn_fast as bf

pytestmark = needs_extension
TOLD = "import json; print(json.dumps(bnn_fast.build_info()))"


def info(code: str, **environment) -> dict:

    done = subprocess.run([sys.executable, "-c", code + TOLD], text=True, capture_output=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_nodes
def test_it_is_loaded_under_the_torch_it_was_built_for():
    told = bf.build_info()
    assert told["nodes"] and told["nodes_error"] is None
    assert bf.VariationalLinear(2, 2)(torch.randn(3, 2)).grad_fn.name() == "VariationalDraw"


def test_it_is_not_even_tried_under_another_torch():
    built = bf.build_info()["torch_built"]
    told = info("import torch; torch.__version__ = '2.99.0'; import bnn_fast, sys;"
                "assert 'bnn_fast._autograd' not in sys.modules;")
    assert told["extension"] and not told["nodes"]
    assert told["nodes_error"] == f"built for torch {built}"


def test_it_can_be_left_out_or_missing():
    assert info("import bnn_fast;", BNN_FAST_NODES="0")["nodes_error"] == "BNN_FAST_NODES is 0"
    told = info("import sys; sys.modules['bnn_fast._autograd'] = None; import bnn_fast;")
    assert not told["nodes"] and "_autograd" in told["nodes_error"]


@needs_nodes
def test_without_it_these_tests_pass():
    files = [f"{os.path.dirname(__file__)}/../{name}.py" for name in (
        "inference/test_compile", "operators/test_functional", "inference/test_elbo", "inference/test_sampling")]
    # Neither the reference nor inductor meets the nodes.
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", "not reference_compiles and not inductor"], text=True,
                          capture_output=True, env={**os.environ, "BNN_FAST_NODES": "0"})
    assert done.returncode == 0, done.stdout


@needs_nodes
def test_the_graph_is_freed_with_its_output():
    """No circle of references through the calls: tensors die without the garbage collector."""


    gc.disable()
    try:
        layer = bf.VariationalLinear(3, 2)
        hidden = torch.randn(4, 3, requires_grad=True) * 2
        seen = weakref.ref(hidden)
        y, kl = layer(hidden), bf.kl_divergence(layer)
        del hidden
        (y.sum() + kl).backward()
        del y
        assert seen() is None
    finally:
        gc.enable()


@needs_nodes
def test_anomaly_mode_and_hooks_see_the_nodes():
    layer = bf.VariationalLinear(3, 2)
    with torch.autograd.detect_anomaly(check_nan=True):
        y = layer(torch.randn(4, 3))
        seen = []
        y.grad_fn.register_hook(lambda inputs, outputs: seen.append([t is None for t in inputs]))
        (y.sum() + bf.kl_divergence(layer)).backward()
    assert seen == [[True, False, False, False, False]]  # x needs none
