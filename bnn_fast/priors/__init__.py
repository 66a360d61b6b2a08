"""Distributions over weights: priors, what rho means (scales), how parameters begin. Imports checks alone."""
from .normal import Normal

__all__ = ["Normal"]
