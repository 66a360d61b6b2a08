"""The operators: compiled (raw), differentiable (autograd), in plain PyTorch (reference, noise), as functions with
checks (functional). Imports priors and checks; nothing here knows of layers.
"""
