from .variational_linear import VariationalLinear

__all__ = ["VariationalLinear"]
