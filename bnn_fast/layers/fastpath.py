"""torch's fused inference path of transformers takes weights and calls no layer: how it is told that a layer has none."""
from __future__ import annotations

import sys

import torch

_TRANSFORMER = "torch.nn.modules.transformer"


class _NoWeight:
    """What nn.TransformerEncoderLayer and nn.TransformerEncoder see as a layer's weight, bias or projection when they look whether
    their fused inference path can run. It cannot; they leave it where a weight has a __torch_function__ of its own.
    """

    @property
    def weight(self):
        return self

    bias = weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise TypeError("a variational layer has no weight, it draws one at every call: "
                        "torch.backends.mha.set_fastpath_enabled(False) turns off what asks for it")


NO_WEIGHT = _NoWeight()


def asked_by_a_transformer() -> bool:
    """Whether it is torch's transformer that looks for the attribute, in whose __getattr__ this is called."""
    return torch.compiler.is_compiling() or sys._getframe(2).f_globals.get("__name__") == _TRANSFORMER
