"""The operators: compiled (raw), differentiable (autograd), in plain PyTorch (reference, noise), as functions with
checks (functional). Imports priors and checks; nothing here knows of layers.
"""
from . import raw

if raw.HAS_EXTENSION:
    from . import flops  # noqa: F401, which registers its formulas
