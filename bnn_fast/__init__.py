"""Variational Bayesian neural networks with fused operators, on CPU and CUDA."""
import sys

from . import metrics, plotting
from ._build import build_info
from ._version import __version__
from .checks import check_parameters
from .conversion import import_from, import_state_dict, to_deterministic, to_variational
from .inference.divergence import kl_divergence
from .inference.elbo import ELBO
from .inference.explain import explain
from .inference.families import LaplaceNoise, NegativeBinomial, Poisson, StudentTNoise
from .inference.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian
from .inference.mixture import FamilyPrediction, GaussianPrediction, MixturePrediction
from .inference.passes import mc_forward
from .inference.posteriors import posterior, set_prior
from .inference.predict import predict
from .inference.prediction import ClassPrediction, Prediction
from .inference.pruning import prune, signal_to_noise
from .inference.sampling import draw, freeze, sampling, unfreeze
from .inference.schedules import blundell_weights, linear_warmup
from .layers import (
    NoisyLinear, Sequential, Variational, VariationalBatchNorm1d, VariationalBatchNorm2d, VariationalBatchNorm3d, VariationalBilinear,
    VariationalConv1d, VariationalConv2d, VariationalConv3d, VariationalConvTranspose1d,
    VariationalConvTranspose2d, VariationalConvTranspose3d, VariationalEmbedding, VariationalEmbeddingBag,
    VariationalGRU, VariationalGRUCell,
    VariationalGroupNorm, VariationalLSTM, VariationalLSTMCell, VariationalLayer, VariationalLayerNorm,
    VariationalLinear, VariationalMLP, VariationalMultiheadAttention, VariationalRNN, VariationalRNNCell, fuse)
from .operators import functional, reference
from .operators.raw import plain
from .priors import Normal, initialisation

# Their public paths, wherever the files are.
for _module in (functional, initialisation, reference):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

__all__ = [
    "Bernoulli", "Categorical", "ClassPrediction", "ELBO", "FamilyPrediction", "Gaussian", "GaussianPrediction",
    "HeteroscedasticGaussian", "LaplaceNoise", "MixturePrediction", "NegativeBinomial", "NoisyLinear", "Normal", "Poisson",
    "Prediction", "Sequential", "StudentTNoise", "Variational", "VariationalBatchNorm1d",
    "VariationalBatchNorm2d", "VariationalBatchNorm3d", "VariationalBilinear", "VariationalConv1d",
    "VariationalConv2d", "VariationalConv3d", "VariationalConvTranspose1d", "VariationalConvTranspose2d",
    "VariationalConvTranspose3d", "VariationalEmbedding", "VariationalEmbeddingBag",
    "VariationalGRU", "VariationalGRUCell", "VariationalGroupNorm",
    "VariationalLSTM", "VariationalLSTMCell", "VariationalLayer", "VariationalLayerNorm", "VariationalLinear",
    "VariationalMLP", "VariationalMultiheadAttention", "VariationalRNN", "VariationalRNNCell", "__version__",
    "blundell_weights", "build_info", "check_parameters", "draw", "explain", "freeze", "functional", "fuse", "import_from",
    "import_state_dict", "kl_divergence",
    "linear_warmup", "mc_forward", "metrics", "plain", "plotting", "posterior", "predict", "prune",
    "reference", "sampling", "set_prior", "signal_to_noise", "to_deterministic", "to_variational", "unfreeze",
]
