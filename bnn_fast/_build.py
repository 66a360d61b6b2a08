"""The compiled extension: loading it, and what it says of itself."""

from __future__ import annotations

import os

import torch

from ._version import __version__

try:
    from . import _C

    EXTENSION_ERROR = None
except ImportError as error:
    _C = None
    EXTENSION_ERROR = str(error)

# The nodes use libtorch's own headers, so under another torch they could do anything: not even tried.
nodes, NODES_ERROR = None, EXTENSION_ERROR
if _C and _C.TORCH_VERSION != torch.__version__:
    NODES_ERROR = f"built for torch {_C.TORCH_VERSION}"
elif os.environ.get("BNN_FAST_NODES") == "0":
    NODES_ERROR = "BNN_FAST_NODES is 0"
elif _C:
    try:
        from . import _autograd as nodes

        NODES_ERROR = None
    except ImportError as error:
        NODES_ERROR = str(error)


def build_info() -> dict:
    """How this bnn_fast was built and what it runs on. RuntimeError if BNN_FAST_CPU names no instruction set.

    Returns a dict with
      ``version``: of bnn_fast;
      ``torch``: the version running;
      ``torch_built``: the version the extension was built against, None without the extension;
      ``cuda_architectures``: list of str, as in ``"9.0"``; empty for a build without CUDA kernels;
      ``cpu_capability``: the instruction set chosen at run time, None without the extension;
      ``extension``: whether the compiled operators are in use;
      ``extension_error``: why they are not, else None;
      ``nodes``: whether autograd's nodes are the compiled ones, made for one version of torch; without them all works,
        small layers slower;
      ``nodes_error``: why they are not, else None.
    """
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "torch_built": _C.TORCH_VERSION if _C else None,
        "cuda_architectures": [name for name in _C.CUDA_ARCHITECTURES.split(";") if name] if _C else [],
        "cpu_capability": _C.cpu_capability() if _C else None,
        "extension": _C is not None,
        "extension_error": EXTENSION_ERROR,
        "nodes": nodes is not None,
        "nodes_error": NODES_ERROR,
    }
