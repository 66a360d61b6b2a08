"""What the raw operators take, packed here alone: lists of what belongs together. csrc/ops.cpp says what is in each.

An operator's arguments are (x, if it has one, *groups of tensors, numbers, options); the first group is the posterior.
"""
from __future__ import annotations

from typing import NamedTuple, Sequence

from torch import Tensor

from .. import checks
from ..priors import Normal

KL, N_SAMPLES, ESTIMATOR = 2, 3, 7  # where they are among the options of what draws
GRADIENT = 7          # and of rows that are looked up
GRADIENTS = {"dense": 0, "sparse": 1, "by frequency": 2}
SHARED, LAYERS = 4, 5  # and of a chain
KEPT = 2 ** 20        # elements that a chain, and rows that are looked up, keep for the backward: kKept in csrc/arguments.h
REDUCE = 2            # and among those of the KL without a draw
PAIR = ("mu", "rho")  # names of the posterior's tensors, as errors call them
LOOK_UP = ("rows", "counts")
LAYER = ("weight_mu", "weight_rho", "bias_mu", "bias_rho")
NOISY = ("weight_mu", "weight_sigma", "bias_mu", "bias_sigma")


class Prior(NamedTuple):
    """loc and scale of one prior after the other: numbers, but where a bit of `places` is set; there it is the next tensor."""
    tensors: list[Tensor]
    numbers: Sequence[float]
    places: int


def pack_prior(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> Prior:
    """tensors: none, or one or None for each number."""
    if not tensors:
        return Prior([], numbers, 0)
    return Prior([t for t in tensors if t is not None], numbers, sum([1 << i for i, t in enumerate(tensors) if t is not None]))


def pack_priors(*priors: Normal) -> Prior:
    values = [value for prior in priors for value in (prior.loc, prior.scale)]
    tensors = [value if isinstance(value, Tensor) else None for value in values]
    return pack_prior(tensors, [float(i % 2) if isinstance(value, Tensor) else value for i, value in enumerate(values)])


def to_draw(posterior: list[Tensor], key: Tensor, prior: Prior, scale: str, kl: str | None, n_samples: int, stream: int = 0,
            row_offset: int = 0, column_offset: int = 0, estimator: str = "weight") -> tuple:
    """The arguments, behind x, of what draws: by another estimator than "weight", those of its operator."""
    return (posterior, key, prior.tensors, prior.numbers,
            [checks.SCALES[scale], prior.places, checks.KLS[kl], n_samples, stream, row_offset, column_offset]
            + ([] if estimator == "weight" else [checks.ESTIMATORS[estimator]]))


def to_look_up(posterior: list[Tensor], look_up: list[Tensor], key: Tensor, prior: Prior, scale: str, kl: str | None, n_samples: int,
               stream: int, gradient: str, weight: float = 1.0, row_offset: int = 0, column_offset: int = 0) -> tuple:
    """The arguments of rows that are looked up. look_up: rows, int64 [T] in equal parts of the draws or [2, T] with the draw of each, and
    maybe counts. The KL of a row counts `weight`, divided by the row's counts, every time.
    """
    posterior, key, tensors, numbers, options = to_draw(posterior, key, prior, scale, kl, n_samples, stream, row_offset, column_offset)
    return posterior, look_up, key, tensors, [*numbers, weight], [*options, GRADIENTS[gradient]]


class Link(NamedTuple):
    """A layer of a chain: (mu, rho) of its weight and bias, or the weight and bias of one that is not drawn; the bias may be missing.

    numbers, prior: as `pack_prior` takes them; key: of one that is drawn, or None. activation: (code, its two numbers).
    """
    tensors: list[Tensor]
    key: Tensor | None = None
    prior: Prior | None = None
    activation: tuple[int, float, float] = (0, 0.0, 0.0)


def to_chain(links: Sequence[Link], scale: str, kl: str | None, n_samples: int, shared: bool) -> tuple:
    """The arguments, behind x, of a chain."""
    tensors, keys, priors, numbers, places = [], [], [], [], 0
    options = [checks.SCALES[scale], 0, checks.KLS[kl], n_samples, int(shared)]
    for link in links:
        tensors += link.tensors
        drawn = link.key is not None
        if drawn:
            keys.append(link.key)
            places |= link.prior.places << len(numbers)
            priors += link.prior.tensors
            numbers += link.prior.numbers
        options += (drawn + 2 * (len(link.tensors) > 1 + drawn), link.activation[0])
    options[1] = places
    for link in links:
        numbers += link.activation[1:]
    return tensors, keys, priors, numbers, options


def to_compare(posterior: list[Tensor], prior: Prior, scale: str, reduce: bool) -> tuple:
    """Those of the KL without a draw."""
    return posterior, prior.tensors, prior.numbers, [checks.SCALES[scale], prior.places, int(reduce)]


def without_kl(arguments: tuple) -> tuple:
    """The same of what draws, and no KL."""
    options = arguments[-1]
    return *arguments[:-1], [*options[:KL], checks.KLS[None], *options[KL + 1:]]


def spread(arguments: tuple) -> tuple[tuple, list[Tensor]]:
    """(form, tensors) of an operator's arguments, as torch.autograd.Function sees no tensor in a list."""
    *groups, numbers, options = arguments
    sizes = tuple([len(group) if isinstance(group, list) else None for group in groups])
    tensors = [t for group in groups for t in (group if isinstance(group, list) else (group,))]
    return (sizes, tuple(numbers), tuple(options)), tensors


def gather(form: tuple, tensors: tuple) -> tuple:
    """The arguments again."""
    sizes, numbers, options = form
    groups, at = [], 0
    for size in sizes:
        groups.append(tensors[at] if size is None else list(tensors[at:at + size]))
        at += 1 if size is None else size
    return *groups, numbers, options
