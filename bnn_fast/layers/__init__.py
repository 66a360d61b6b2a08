"""The layers: modules around the operators, and what a layer remembers between calls. Imports operators, priors and
checks; nothing here knows of inference.
"""
from .attention import VariationalMultiheadAttention
from .base import VariationalLayer
from .bilinear import VariationalBilinear
from .chain import Sequential
from .convolution import (
    VariationalConv1d, VariationalConv2d, VariationalConv3d, VariationalConvTranspose1d, VariationalConvTranspose2d,
    VariationalConvTranspose3d)
from .embedding import VariationalEmbedding, VariationalEmbeddingBag
from .noisy import NoisyLinear
from .normalisation import (
    VariationalBatchNorm1d, VariationalBatchNorm2d, VariationalBatchNorm3d, VariationalGroupNorm, VariationalLayerNorm)
from .recurrent import (
    VariationalGRU, VariationalGRUCell, VariationalLSTM, VariationalLSTMCell, VariationalRNN, VariationalRNNCell)
from .sequential import VariationalMLP, fuse
from .variational import Variational
from .variational_linear import VariationalLinear

__all__ = [
    "NoisyLinear", "Sequential", "Variational", "VariationalBatchNorm1d", "VariationalBatchNorm2d", "VariationalBatchNorm3d",
    "VariationalBilinear", "VariationalConv1d", "VariationalConv2d", "VariationalConv3d",
    "VariationalConvTranspose1d", "VariationalConvTranspose2d", "VariationalConvTranspose3d", "VariationalEmbedding",
    "VariationalEmbeddingBag", "VariationalGRU",
    "VariationalGRUCell", "VariationalGroupNorm", "VariationalLSTM", "VariationalLSTMCell", "VariationalLayer",
    "VariationalLayerNorm", "VariationalLinear", "VariationalMLP", "VariationalMultiheadAttention", "VariationalRNN",
    "VariationalRNNCell", "fuse"]
