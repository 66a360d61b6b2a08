"""Any model made variational, and the other way; models of other libraries taken over."""
from .convert import to_deterministic, to_variational
from .imports import import_from, import_state_dict

__all__ = ["import_from", "import_state_dict", "to_deterministic", "to_variational"]
