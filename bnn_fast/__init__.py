"""Variational Bayesian neural networks with fused operators, on CPU and CUDA."""
from . import functional, metrics, plotting, reference
from ._build import build_info
from ._version import __version__
from .checks import check_parameters
from .divergence import kl_divergence
from .elbo import ELBO, Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian
from .elbo import blundell_weights, linear_warmup
from .layers import VariationalLinear
from .predict import predict
from .prediction import ClassPrediction, GaussianPrediction, Prediction
from .priors import Normal
from .sampling import draw, freeze, mc_forward, sampling, unfreeze

__all__ = [
    "Bernoulli", "Categorical", "ClassPrediction", "ELBO", "Gaussian", "GaussianPrediction",
    "HeteroscedasticGaussian", "Normal", "Prediction", "VariationalLinear", "__version__", "blundell_weights",
    "build_info", "check_parameters", "draw", "freeze", "functional", "kl_divergence", "linear_warmup",
    "mc_forward", "metrics", "plotting", "predict", "reference", "sampling", "unfreeze",
]
