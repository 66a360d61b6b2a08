"""What torch's FLOP counter (torch.utils.flop_counter) counts: the products, as for nn.Linear; drawing is not counted."""
from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula([torch.ops.bnn_fast._variational_linear, torch.ops.bnn_fast._noisy_linear])
def _linear(x_shape, shapes, *arguments, out_shape=None, **options) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(shapes[0])


@register_flop_formula([torch.ops.bnn_fast._variational_linear_backward, torch.ops.bnn_fast._noisy_linear_backward])
def _linear_backward(grad_shapes, x_shape, shapes, *arguments, out_shape=None, **options) -> int:
    """dW, and dx where it is wanted."""
    if grad_shapes[0] is None:
        return 0
    return (1 + bool(arguments[-1])) * _linear(x_shape, shapes)


@register_flop_formula(torch.ops.bnn_fast._estimated_linear)
def _estimated_linear(x_shape, shapes, *arguments, out_shape=None, **options) -> int:
    return 2 * _linear(x_shape, shapes)


@register_flop_formula(torch.ops.bnn_fast._estimated_linear_backward)
def _estimated_linear_backward(grad_shapes, x_shape, shapes, *arguments, out_shape=None, **options) -> int:
    *arguments, _ = arguments
    return 2 * _linear_backward(grad_shapes, x_shape, shapes, *arguments)
