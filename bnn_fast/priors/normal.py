"""Priors over the weights."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks


class Normal:
    """The Gaussian prior N(loc, scale^2), independent for every weight.

    Args:
        loc: mean; a number, or a tensor of the weight's shape.
        scale: standard deviation (not variance), positive; a number, or a tensor of the weight's shape.

    A prior is a constant: a layer gets another one by `layer.prior = Normal(...)`, and AttributeError is raised
    where `layer.prior.loc` is set.

    Raises TypeError if an argument is neither, or is a tensor that requires grad, and ValueError if a scale is
    not positive or a value not finite. Tensors on the meta device are not looked into.
    """

    __slots__ = ("loc", "scale")

    def __init__(self, loc: float | Tensor = 0.0, scale: float | Tensor = 1.0):
        self._set(_value("loc", loc, positive=False), _value("scale", scale, positive=True))

    @classmethod
    def unchecked(cls, loc: float | Tensor, scale: float | Tensor) -> Normal:
        """Of values that have passed the checks before: they look at the values, and so wait for the device."""
        prior = cls.__new__(cls)
        prior._set(loc, scale)
        return prior

    def _set(self, loc, scale) -> None:
        object.__setattr__(self, "loc", loc)
        object.__setattr__(self, "scale", scale)

    def __setattr__(self, name: str, value) -> None:
        raise AttributeError(f"a prior is a constant, its {name} cannot be set: give the layer another, "
                             "layer.prior = bnn_fast.Normal(loc, scale)")

    def __reduce__(self):
        return Normal.unchecked, (self.loc, self.scale)

    def __repr__(self) -> str:
        return f"Normal(loc={_show(self.loc)}, scale={_show(self.scale)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Normal):
            return NotImplemented
        return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor)
                   else not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
                   for a, b in ((self.loc, other.loc), (self.scale, other.scale)))

    __hash__ = None

    @property
    def has_tensors(self) -> bool:
        return isinstance(self.loc, Tensor) or isinstance(self.scale, Tensor)


def as_normal(name: str, prior, mu: Tensor | None) -> Normal:
    """prior as a Normal over mu's elements. One of torch.distributions is taken over: parameters of one element
    as numbers, others broadcast to mu's shape.
    """
    if isinstance(prior, Normal):
        return prior
    if not isinstance(prior, torch.distributions.Normal):
        raise TypeError(f"{name}: expected a Normal, given {checks.describe(prior)} "
                        "(bnn_fast.Normal and torch.distributions.Normal will do)")
    values = []
    for kind in ("loc", "scale"):
        value = getattr(prior, kind)
        if value.dim() == 0 and not value.requires_grad:
            value = value.item()
        elif mu is not None:
            try:
                value = value.expand(mu.shape)
            except RuntimeError:
                raise ValueError(f"{name}.{kind}: expected to broadcast to {list(mu.shape)}, "
                                 f"given {checks.describe(value)}") from None
        values.append(value)
    return Normal(*values)


def _value(name: str, value, positive: bool) -> float | Tensor:
    expected = "positive and finite" if positive else "finite"
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.requires_grad:
            raise TypeError(
                f"prior {name}: expected a number or a floating-point tensor that does not require grad, "
                f"given {checks.describe(value)}{', requires_grad=True' if value.requires_grad else ''}")
        # Looking at the values reads the device, so never while a graph is traced.
        if not value.is_meta and not torch.compiler.is_compiling():
            bad = ~value.isfinite() | (value <= 0) if positive else ~value.isfinite()
            if bad.any():
                raise ValueError(f"prior {name}: expected every element to be {expected}, "
                                 f"given {value[bad][0].item()} among {value.numel()} elements")
        return value
    if not checks.is_number(value):
        raise TypeError(f"prior {name}: expected a number or a tensor, given {checks.describe(value)}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"prior {name}: expected to be {expected}, given {value}")
    return float(value)


def _show(value: float | Tensor) -> str:
    return f"<tensor {list(value.shape)}>" if isinstance(value, Tensor) else repr(value)
