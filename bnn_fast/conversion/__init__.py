"""Any model made variational, and the other way; models of other libraries taken over."""
from .convert import to_deterministic, to_variational

__all__ = ["to_deterministic", "to_variational"]
