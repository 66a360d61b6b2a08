"""Checks of what callers give. Each raises before anything runs, naming the argument, what was given and
expected.

They run at every call of an operator, so they compare attributes only and never read a tensor's values.
"""
from __future__ import annotations

import numbers
import operator
import warnings
import weakref

import numpy as np
import torch
from torch import Tensor

SCALES = {"softplus": 0, "exp": 1, "sqrt_exp": 2, "square": 3, "identity": 4}
KLS = {None: 0, "analytic": 1, "sampled": 2}
ESTIMATORS = {"weight": 0, "local": 1, "flipout": 2}
ACTIVATIONS = {"identity": 0, "relu": 1, "leaky_relu": 2, "elu": 3, "gelu": 4, "gelu_tanh": 5, "silu": 6, "tanh": 7, "sigmoid": 8,
               "softplus": 9}
REDUCTIONS = {"sum": 0, "mean": 1, "none": 2}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
AUTOCAST = (torch.float32, *_HALVES)


_warned = weakref.WeakSet()     # models without variational layers


def describe(value) -> str:
    """What was given, in a few words whatever it is: shapes of tensors and arrays, how many a container holds."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"a numpy {value.dtype} array {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, (tuple, list, dict, set, frozenset)):
        first = "" if not isinstance(value, (tuple, list)) or not value else f", the first {describe(value[0])}"
        return f"{kind} of {len(value)}{first}"
    text = " ".join(repr(value).split())
    return f"{kind} {text if len(text) <= 60 else text[:57] + '...'}"


def choice(name: str, value, choices: dict) -> int:
    """The code of an option; ValueError listing the choices if there is no such option."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        known = ", ".join(map(repr, choices))
        given = repr(value) if isinstance(value, str) or value is None else describe(value)
        raise ValueError(f"{name}: expected one of {known}, given {given}") from None


_WORD = 2 ** 32  # values of a word of the noise counter


def noise_place(rows: int, columns: int, n_samples: int, stream: int, row_offset: int, column_offset: int
                ) -> list[int]:
    """(n_samples, stream, row_offset, column_offset) as ints: where the noise of [rows, columns] is counted from, all of it
    within the counter's words.
    """
    found = []
    for name, value, most in (("n_samples", n_samples, _WORD), ("stream", stream, _WORD - 1),
                              ("row_offset", row_offset, _WORD - rows), ("column_offset", column_offset, 4 * _WORD - columns)):
        value = integer(name, value)
        if not (name == "n_samples") <= value <= most:
            raise ValueError(f"{name}: expected {int(name == 'n_samples')} to {most}, given {value}")
        found.append(value)
    return found


def integer(name: str, value, lowest: int | None = None, otherwise: str = "") -> int:
    """value as an int (numpy's integers count, True and tensors do not), if it is one and not below `lowest`."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            if isinstance(value, (bool, Tensor)):  # which have __index__
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an integer{otherwise}, given {describe(value)}") from None
    if lowest is not None and value < lowest:
        raise ValueError(f"{name}: expected at least {lowest}, given {value}")
    return value


def positive_int(name: str, value) -> int:
    return integer(name, value, 1)


def sizes(name: str, value, count: int, lowest: int):
    """value as an int, or `count` of them, none below `lowest`."""
    if not isinstance(value, (tuple, list)):
        return integer(name, value, lowest, f" or {count} of them")
    if len(value) != count:
        raise ValueError(f"{name}: expected an integer or {count} of them, given {describe(value)}")
    return tuple(integer(name, item, lowest) for item in value)


def is_number(value) -> bool:
    """Whether value is a real number; numpy's are, True and tensors are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(name: str, value, otherwise: str = ""):
    """value, if it is a real number."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number{otherwise}, given {describe(value)}")
    return value


def last_dimensions(name: str, x, expected: tuple[int, ...], argument: str) -> None:
    """x is a tensor whose last dimensions are these, which the argument of this name says."""
    words = f"a tensor [..., {', '.join(map(str, expected))}] ({argument})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {words}, given {describe(x)}")
    if x.shape[max(0, x.dim() - len(expected)):] != expected:
        raise ValueError(f"{name}: expected {words}, given {describe(x)}")


def batch(name: str, value) -> None:
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise TypeError(f"{name}: expected a tensor [B, ...], given {describe(value)}")


def positive(name: str, value) -> float | None:
    """value as a float, if it is a positive finite number; None is left."""
    if value is not None and not is_number(value):
        raise TypeError(f"{name}: expected a positive number or None, given {describe(value)}")
    if value is not None and not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, given {value}")
    return None if value is None else float(value)


def flags(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, (bool, int, np.bool_)):
            raise TypeError(f"{name}: expected True or False, given {describe(value)}")


def module(name: str, value) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, given {describe(value)}")


def any_layers(model: torch.nn.Module, layers, consequence: str, stacklevel: int = 3) -> None:
    """Warn, once for each model, if it has no variational layers; `consequence` says what that makes of the
    caller's result.
    """
    if not layers and not torch.compiler.is_compiling() and model not in _warned:
        _warned.add(model)
        warnings.warn(f"model: expected variational layers, found none in {type(model).__name__}: {consequence}",
                      stacklevel=stacklevel)


def linear_input(x: Tensor, weight_mu: Tensor, n_samples: int) -> None:
    """x [..., in] against weight_mu [out, in]; dimension 0 of x holds n_samples equal parts."""
    try:
        shape = x.shape
    except AttributeError:
        raise TypeError(f"x: expected a tensor [..., {weight_mu.shape[1]}], given {describe(x)}") from None
    except RuntimeError:
        raise TypeError("x: expected an ordinary tensor, given a nested one (nn.TransformerEncoder makes them of "
                        "padded batches unless it has enable_nested_tensor=False)") from None
    if not shape or shape[-1] != weight_mu.shape[1]:
        given = describe(x)
        if n_samples != 1 and shape and shape[0] % n_samples == 0:  # what the caller had before it was repeated
            given = f"{[shape[0] // n_samples, *shape[1:]]} for each of {n_samples} draws"
            if len(shape) == 1:
                given += "; a single row is x.unsqueeze(0)"
        raise ValueError(f"x: expected a last dimension of {weight_mu.shape[1]} (in_features), given {given}")
    like_parameters("x", x, weight_mu)
    if n_samples != 1 and (len(shape) < 2 or shape[0] % n_samples):
        raise ValueError(f"x: expected dimension 0 to be the batch repeated n_samples={n_samples} times, "
                         f"given {describe(x)}; see mc_forward")


def like_parameters(name: str, x: Tensor, mu: Tensor, autocasting: bool = False) -> None:
    """x with the parameters' dtype, or in 16 bits beside float32, or both of what autocast makes alike; and on their device."""
    if x.dtype != mu.dtype and not (x.dtype in _HALVES and mu.dtype == torch.float32) and not (
            autocasting and x.dtype in AUTOCAST and mu.dtype in AUTOCAST):
        raise TypeError(f"{name}: expected {mu.dtype} as the parameters have, given {describe(x)}")
    if x.device != mu.device:
        raise ValueError(f"{name}: expected to be on {mu.device} as the parameters are, given {describe(x)}")


def repeated(name: str, x, n_samples: int, unbatched: int = 0) -> None:
    """If x is a tensor of more than `unbatched` dimensions, its dimension 0 holds n_samples equal parts; ValueError for
    `unbatched` or fewer, unless that is 0, which stands for numbers.
    """
    if not isinstance(x, Tensor) or x.dim() == unbatched == 0:
        return
    if x.dim() <= unbatched or x.shape[0] % n_samples:
        raise ValueError(f"{name}: expected dimension 0 to be the batch repeated n_samples={n_samples} times, "
                         f"given {describe(x)}; see mc_forward")


def parameter_pair(name: str, mu: Tensor, rho: Tensor, prior, prior_name: str = "prior") -> None:
    """mu and rho alike in shape, dtype and device, and the prior's tensors like them."""
    if not isinstance(mu, Tensor) or mu.dtype not in _DTYPES:
        raise TypeError(f"{name}mu: expected a float32, float64, bfloat16 or float16 tensor, "
                        f"given {describe(mu)}")
    _alike(f"{name}rho", rho, f"{name}mu", mu)
    _alike(f"{prior_name}.loc", prior.loc, f"{name}mu", mu, number=True)
    _alike(f"{prior_name}.scale", prior.scale, f"{name}mu", mu, number=True)


def weight(weight_mu: Tensor, bias_mu: Tensor | None, bias_rho: Tensor | None, rho_name: str = "bias_rho") -> None:
    if weight_mu.dim() != 2:
        raise ValueError(f"weight_mu: expected [out, in], given {describe(weight_mu)}")
    if (bias_mu is None) != (bias_rho is None):
        missing = "bias_mu" if bias_mu is None else rho_name
        raise ValueError(f"{missing}: expected bias_mu and {rho_name} together or neither, given None")
    if bias_mu is not None:
        if not isinstance(bias_mu, Tensor) or bias_mu.shape != weight_mu.shape[:1]:
            raise ValueError(f"bias_mu: expected [{weight_mu.shape[0]}] (out_features), "
                             f"given {describe(bias_mu)}")
        if bias_mu.dtype != weight_mu.dtype:
            raise TypeError(f"bias_mu: expected {weight_mu.dtype} as weight_mu has, "
                            f"given {describe(bias_mu)}")
        if bias_mu.device != weight_mu.device:
            raise ValueError(f"bias_mu: expected to be on {weight_mu.device}, given {describe(bias_mu)}")


def noisy(x: Tensor, weight_mu: Tensor, weight_sigma: Tensor, bias_mu: Tensor | None, bias_sigma: Tensor | None, key_: Tensor) -> None:
    """What a noisy layer takes."""
    if not isinstance(weight_mu, Tensor) or weight_mu.dtype not in _DTYPES:
        raise TypeError(f"weight_mu: expected a float32, float64, bfloat16 or float16 tensor, given {describe(weight_mu)}")
    _alike("weight_sigma", weight_sigma, "weight_mu", weight_mu)
    weight(weight_mu, bias_mu, bias_sigma, "bias_sigma")
    if bias_mu is not None:
        _alike("bias_sigma", bias_sigma, "bias_mu", bias_mu)
    key(key_, weight_mu)
    linear_input(x, weight_mu, 1)


def key(value: Tensor, mu: Tensor) -> None:
    """An int64 tensor [2], (seed, first sample), or [3], with the row of a whole batch that the input begins at."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"key: expected an int64 tensor [2] (seed, first sample), given {describe(value)}")
    if value.shape not in ((2,), (3,)):
        raise ValueError(f"key: expected shape [2] (seed, first sample), given {describe(value)}")
    if value.device != mu.device:
        raise ValueError(f"key: expected to be on {mu.device} as the parameters are, given {describe(value)}")


def estimator(value: str, row_offset: int, column_offset: int) -> None:
    choice("estimator", value, ESTIMATORS)
    for name, offset in (("row_offset", row_offset), ("column_offset", column_offset)):
        if value != "weight" and offset != 0:
            raise ValueError(f"{name}: expected 0 with estimator={value!r}, whose noise belongs to outputs, given {describe(offset)}")


def check_parameters(model: torch.nn.Module) -> None:
    """Raise ValueError naming the first parameter of `model` that holds a NaN. Reads all of them, so not for
    every step.
    """
    module("model", model)
    for name, parameter in model.named_parameters():
        nans = int(parameter.isnan().sum())
        if nans:
            raise ValueError(f"{name}: expected numbers, given {nans} NaN among {parameter.numel()} elements")


def _alike(name: str, value, other_name: str, other: Tensor, number: bool = False) -> None:
    if not isinstance(value, Tensor):
        if number:
            return
        raise TypeError(f"{name}: expected a tensor like {other_name}, given {describe(value)}")
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected shape {list(other.shape)} as {other_name} has, "
                         f"given {describe(value)}")
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} as {other_name} has, given {describe(value)}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected to be on {other.device} as {other_name} is, "
                         f"given {describe(value)}")
