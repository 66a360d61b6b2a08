"""Variational Bayesian neural networks with fused operators, on CPU and CUDA."""
from . import functional, reference
from ._build import build_info
from ._version import __version__
from .checks import check_parameters
from .divergence import kl_divergence
from .elbo import ELBO, Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian
from .elbo import blundell_weights, linear_warmup
from .layers import VariationalLinear
from .priors import Normal
from .sampling import draw, freeze, mc_forward, sampling, unfreeze

__all__ = [
    "Bernoulli", "Categorical", "ELBO", "Gaussian", "HeteroscedasticGaussian", "Normal", "VariationalLinear",
    "__version__", "blundell_weights", "build_info", "check_parameters", "draw", "freeze", "functional",
    "kl_divergence", "linear_warmup", "mc_forward", "reference", "sampling", "unfreeze",
]
