"""What is done with a model of variational layers: sampling, divergence, the ELBO and its likelihoods, predictions.
Imports layers and what they import, and metrics.
"""
