"""Distributions over weights: priors, what rho means (scales), how parameters begin. Imports checks alone."""
from .normal import Normal, as_normal

__all__ = ["Normal", "as_normal"]
