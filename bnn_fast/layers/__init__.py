"""The layers: modules around the operators, and what a layer remembers between calls. Imports operators, priors and
checks; nothing here knows of inference.
"""
from .base import VariationalLayer
from .embedding import VariationalEmbedding, VariationalEmbeddingBag
from .variational_linear import VariationalLinear

__all__ = ["VariationalEmbedding", "VariationalEmbeddingBag", "VariationalLayer", "VariationalLinear"]
