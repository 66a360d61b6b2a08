"""A table of which a call draws the rows that it looks up, and no others."""
from __future__ import annotations

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..operators import arguments as packing
from ..operators import autograd, raw, reference
from . import steps
from .base import VariationalLayer
from .posterior import Pair

_ROWS = {"all": 0, "batch": 1}


class LookUp(NamedTuple):
    """What a call asks for."""
    rows: Tensor                # int64 [T]
    n_samples: int
    draws: Tensor | None        # int64 [T], the draw of each; None where the draws have equal parts
    examples: int               # entries of the batch, those of all draws
    parts: list[int] | None     # lookups of each draw, where the gradient depends on them
    used: Tensor | None = None  # which are in any bag, None for all of them

    def draw_of_each(self) -> Tensor:
        """int64 [T], or 0-d where all are of one."""
        if self.draws is not None:
            return self.draws
        if self.n_samples == 1:
            return self.rows.new_zeros(())
        return torch.arange(self.n_samples, device=self.rows.device).repeat_interleave(self.rows.numel() // self.n_samples)

    def packed(self) -> list[Tensor]:
        """What the operators take, one for all rows or one for each part."""
        if self.draws is None and self.used is None and self.parts is None:
            return [self.rows]
        draws = self.draw_of_each() if self.used is None else self.draw_of_each().where(self.used, -1)
        rows = torch.stack((self.rows, draws.expand_as(self.rows)))
        return [rows] if self.parts is None else list(rows.split(self.parts, 1))


class Table(VariationalLayer):
    """A table of rows, and how its gradient and KL are made."""
    ordinary: type[nn.Module]

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, max_norm, norm_type: float,
                 scale_grad_by_freq: bool, sparse: bool, kl_rows: str, row_counts: Tensor | None, n_data: int | None, **options):
        super().__init__(**options)
        checks.flags(scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
        self.num_embeddings = checks.integer("num_embeddings", num_embeddings, 0)
        self.embedding_dim = checks.integer("embedding_dim", embedding_dim, 0)
        if max_norm is not None:
            raise ValueError(f"max_norm: expected None, as rows are drawn and none is there to be scaled, given {max_norm}")
        if sparse and scale_grad_by_freq:
            raise ValueError("sparse: expected False beside scale_grad_by_freq=True, whose gradient torch has dense alone, given True")
        if padding_idx is not None:
            padding_idx = checks.integer("padding_idx", padding_idx, otherwise=" or None")
            if not -self.num_embeddings <= padding_idx < self.num_embeddings:
                raise ValueError(f"padding_idx: expected {-self.num_embeddings} to {self.num_embeddings - 1}, given {padding_idx}")
            padding_idx %= self.num_embeddings
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        checks.choice("kl_rows", kl_rows, _ROWS)
        self.kl_rows, self.n_data = kl_rows, n_data
        counts = self._checked_counts(row_counts)
        self.add_posterior("weight", (self.num_embeddings, self.embedding_dim), fan_in=2)  # N(0, 2 / fan_in), as torch's own
        self.register_buffer("row_counts", None if counts is None else counts.to(self.device, copy=True))
        self._clear_padding()

    def _checked_counts(self, counts: Tensor | None) -> Tensor | None:
        if self.kl_rows == "all":
            for name, value in (("row_counts", counts), ("n_data", self.n_data)):
                if value is not None:
                    raise ValueError(f"{name}: expected None without kl_rows='batch', given {checks.describe(value)}")
            return None
        self.n_data = checks.integer("n_data", self.n_data, 1)
        expected = f"row_counts: expected an int64 tensor [{self.num_embeddings}] (num_embeddings), none below 0, for kl_rows='batch'"
        if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
            raise TypeError(f"{expected}, given {checks.describe(counts)}")
        if counts.shape != (self.num_embeddings,):
            raise ValueError(f"{expected}, given {checks.describe(counts)}")
        if not counts.is_meta and (counts < 0).any():
            raise ValueError(f"{expected}, given {counts.min().item()} among them")
        return counts

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._clear_padding()

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """The padding row is 0 at first, as torch's own."""
        if self.padding_idx is not None:
            self.weight_mu[self.padding_idx].zero_()
            self.keep_pruned()

    def keep_pruned(self) -> None:
        """The padding row, too, is a pruned one: it is mu, without noise, KL and gradient. Of it alone no masks of the table's size
        are kept.
        """
        super().keep_pruned()
        if self.padding_idx is not None:
            self.weight_rho.data[self.padding_idx].fill_(-torch.inf)
            steps.pruned.add(self)

    def find_pruned(self) -> None:
        super().find_pruned()
        if self.padding_idx is not None and "weight" in self._pruned:
            mask = self._pruned["weight"][0]
            mask[self.padding_idx] = False
            if not mask.any():
                del self._pruned["weight"]
        self.keep_pruned()

    def pairs(self) -> list:
        if self.padding_idx is not None and not torch.compiler.is_compiling() and not (
                torch._C._are_functorch_transforms_active()):
            self.keep_pruned()
        return super().pairs()

    def forward(self, input: Tensor, *arguments) -> Tensor:
        compiling = torch.compiler.is_compiling()
        functorch = not compiling and torch._C._are_functorch_transforms_active()
        mode, recomputed = self._mode(compiling)
        self.check(mode.n_samples, input, *arguments)
        pair = self.pairs()[0]
        try:
            if mode.mean:
                return self.compute({"weight": pair.mu}, input, *arguments)
            key, asked = self._key(mode, pair.mu.device), self.asked(mode.n_samples, input, *arguments)
            with_kl = self.kl_rows == "batch" and torch.is_grad_enabled() and not recomputed and not functorch
            rows, kl = self._draw_rows(pair, key, asked, with_kl, compiling or functorch)
        except (IndexError, RuntimeError):
            self._check_range(input)
            raise
        if not recomputed and not functorch:
            self._remember(self._registered((pair.mu, pair.rho)), key, mode.n_samples, kl, compiling,
                           asked if self.kl_rows == "batch" else None)
        return self.combine(rows, input, *arguments)

    def asked(self, n_samples: int, input: Tensor, *arguments) -> LookUp:
        """What the call asks for; the draws have equal parts of dimension 0 of the input."""
        rows = input.reshape(-1).long()
        parts = [rows.numel() // n_samples] * n_samples
        return LookUp(rows, n_samples, None, input.shape[0] if input.dim() else 1,
                      parts if n_samples > 1 and self.scale_grad_by_freq else None)

    def combine(self, rows: Tensor, input: Tensor, *arguments) -> Tensor:
        """The output, of the drawn rows [T, D]."""
        raise NotImplementedError

    def _draw_rows(self, pair: Pair, key: Tensor, asked: LookUp, with_kl: bool, transformed: bool):
        """(drawn rows [T, D], the estimate of the KL as `Record` keeps it)."""
        if not raw.compiled_for(pair.mu.device):
            return reference.sample_rows(pair.mu, pair.rho, asked.rows, asked.draw_of_each(), key, scale=self.scale, stream=pair.stream,
                                         look_up=self._look_up(asked.parts)), None
        found = [self._run(autograd.ROWS, (), arguments, transformed) for arguments in self._arguments(pair, key, asked, with_kl)]
        rows = found[0][0] if len(found) == 1 else torch.cat([rows for rows, _ in found])
        kls = tuple([kl for _, kl in found])
        if not with_kl or None in kls:
            return rows, None
        return rows, tuple([kl * self._weight(asked) for kl in kls]) if transformed else kls

    def _arguments(self, pair: Pair, key: Tensor, asked: LookUp, with_kl: bool) -> list[tuple]:
        gradient = "sparse" if self.sparse else "by frequency" if self.scale_grad_by_freq else "dense"
        counts = [self.row_counts] if with_kl else []
        weight = self._weight(asked) if with_kl and not torch.compiler.is_compiling() else 1.0  # a number of a graph is a constant
        return [packing.to_look_up([pair.mu, pair.rho], [rows, *counts], key, packing.pack_priors(pair.prior), self.scale,
                                   self.kl if with_kl else None, asked.n_samples, pair.stream, gradient, weight) for rows in asked.packed()]

    def _weight(self, asked: LookUp) -> float:
        return self.n_data / max(asked.examples, 1)

    def _look_up(self, parts: list[int] | None) -> Callable[[Tensor, Tensor], Tensor]:
        def look_up(rows: Tensor, table: Tensor) -> Tensor:
            return F.embedding(rows, table, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse)

        if parts is None:
            return look_up
        return lambda rows, table: torch.cat([look_up(part, table) for part in rows.split(parts)])  # how frequent in each draw

    def estimated_kl(self, record) -> Tensor | None:
        if record.given is None or not torch.is_grad_enabled():
            return None
        asked, pair = record.given, self.pairs()[0]
        if raw.compiled_for(pair.mu.device):
            kls = [autograd.ROWS.apply(*arguments)[1] for arguments in self._arguments(pair, record.key, asked, True)]
            return sum(kls[1:], kls[0]) * (self._weight(asked) if torch.compiler.is_compiling() else 1.0)
        kl = reference.rows_kl(pair.mu, pair.rho, asked.rows, asked.draw_of_each(), record.key, prior=pair.prior, scale=self.scale,
                               kl=self.kl, stream=pair.stream, look_up=lambda rows, table: F.embedding(rows, table, sparse=self.sparse))
        weight = self._weight(asked) / self.row_counts[asked.rows].double()
        weight = weight.masked_fill(kl.detach() == 0, 0.0)  # padding that was not counted is no 0 * inf
        if asked.used is not None:
            weight = weight.masked_fill(~asked.used, 0.0)
        return (kl * weight).sum().to(kl.dtype)

    def check(self, n_samples: int, input: Tensor, *arguments) -> None:
        check_integers("input", input, self.device)

    def _check_range(self, input: Tensor) -> None:
        """IndexError if it asks for rows that there are not; a look at it only where something failed."""
        if input.device.type == "cpu" and input.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in input.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"input: expected row numbers from 0 to {self.num_embeddings - 1} (num_embeddings - 1), "
                                 f"given {low} to {high}") from None

    def drawn(self, key: Tensor | None) -> nn.Module:
        module = self.ordinary(self.num_embeddings, self.embedding_dim, **self._settings(), device="meta")
        module.weight = nn.Parameter(self.weights(key)["weight"])
        return module.train(self.training)

    def _settings(self) -> dict:
        return {"padding_idx": self.padding_idx, "norm_type": self.norm_type, "scale_grad_by_freq": self.scale_grad_by_freq,
                "sparse": self.sparse}

    def extra_repr(self) -> str:
        kl_rows = () if self.kl_rows == "all" else (f"kl_rows={self.kl_rows!r}",)
        return ", ".join((self.ordinary.extra_repr(self), *kl_rows, super().extra_repr()))


def check_integers(name: str, value, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32) or value.is_nested:
        raise TypeError(f"{name}: expected an int64 or int32 tensor, given "
                        f"{'a nested one' if isinstance(value, Tensor) and value.is_nested else checks.describe(value)}")
    if value.device != device:
        raise ValueError(f"{name}: expected to be on {device} as the parameters are, given {checks.describe(value)}")


def check_batch(n_samples: int, input: Tensor) -> None:
    if n_samples > 1 and (input.dim() == 0 or input.shape[0] % n_samples):
        raise ValueError(f"input: expected dimension 0 to be the batch repeated n_samples={n_samples} times, "
                         f"given {checks.describe(input)}; see mc_forward")
