"""The variational counterparts of nn.Embedding and nn.EmbeddingBag."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..priors import Normal
from .table import LookUp, Table, check_batch, check_integers

_MODES = {"sum": 0, "mean": 1, "max": 2}
_KL = """kl_rows: "all": the KL is that of the whole table, a pass of its own with a dense gradient. "batch": with gradients on it is
            an estimate from the rows that the latest call looked up, with a gradient of those alone (sparse with sparse=True). Every
            lookup of row v counts n_data / (B row_counts[v]) times the row's KL, B being the entries of the batch. A batch
            drawn evenly from the data looks up row v B row_counts[v] / n_data times on average, so that the estimate's mean
            is the KL of all rows that occur in the data. A row looked up with a count of 0 makes it inf.
        row_counts: int64 [num_embeddings], for kl_rows="batch": how often the whole training set looks up each row,
            `torch.bincount(tokens.flatten(), minlength=num_embeddings)`. A buffer.
        n_data: for kl_rows="batch": entries of the training set, as `ELBO` has it."""


class VariationalEmbedding(Table):
    __doc__ = f"""A table of vectors w ~ N(weight_mu, sigma(weight_rho)^2) [num_embeddings, embedding_dim] that is looked up by row.

    A call draws the rows that it looks up and costs these, whatever the size of the table; they are the rows that a draw of the
    whole table has, so that a row looked up twice is the same twice.

    Args:
        num_embeddings, embedding_dim, scale_grad_by_freq, sparse: as in nn.Embedding.
        padding_idx: as in nn.Embedding. The row is pruned: its mean, 0 at first, without noise, KL and gradient.
        max_norm: None.
        norm_type: without a meaning.
        {_KL}
        prior, scale, kl, init, init_sigma, device, dtype: as in VariationalLinear; means begin as torch's own with init="default".

    Shapes: input [...], int64 or int32, to [..., embedding_dim] in the parameters' dtype, also under autocast. Under `sampling`
    with several samples dimension 0 of the input is the batch repeated.

    Raises TypeError or ValueError where an argument does not fit, or the input is of another type, on another device, or not
    divisible among the samples; IndexError, on the CPU, where it asks for a row that there is not. On CUDA, where nobody waits for a
    look at the numbers, such a row is NaN and has no gradient; with the means torch's own embedding stops the device.
    """
    ordinary = nn.Embedding

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: None = None,
                 norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, *, kl_rows: str = "all",
                 row_counts: Tensor | None = None, n_data: int | None = None, prior: Normal = Normal(0.0, 1.0),
                 bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic", init: str = "default",
                 init_sigma: float | None = None, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, kl_rows,
                         row_counts, n_data, prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init,
                         init_sigma=init_sigma, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def check(self, n_samples: int, input: Tensor) -> None:
        super().check(n_samples, input)
        check_batch(n_samples, input)

    def combine(self, rows: Tensor, input: Tensor) -> Tensor:
        return rows.view(*input.shape, self.embedding_dim)

    def compute(self, weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return F.embedding(input, weights["weight"], self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)


class VariationalEmbeddingBag(Table):
    __doc__ = f"""Sums, means or maxima of bags of rows of a table as in VariationalEmbedding.

    Args:
        num_embeddings, embedding_dim, scale_grad_by_freq, mode, sparse, include_last_offset: as in nn.EmbeddingBag.
        padding_idx: as in nn.EmbeddingBag: the row is left out of bags; and pruned, as in VariationalEmbedding.
        max_norm: None.
        norm_type: without a meaning.
        {_KL}
        prior, scale, kl, init, init_sigma, device, dtype: as in VariationalLinear.

    Shapes: input [B, N], or [T] with offsets [B] ([B + 1] with include_last_offset) of the bags in it, int64 or int32;
    per_sample_weights of the input's shape, with mode="sum"; to [B, embedding_dim] in the parameters' dtype. The entries of the
    batch are bags. Under `sampling` with several samples the bags are the samples', sample-major: dimension 0 of an input
    [S B, N]; of an input [T] the bags that offsets tell of, of whatever sizes.

    Raises TypeError or ValueError where an argument does not fit, or the input is of another type, on another device, or not
    divisible among the samples; IndexError, on the CPU, where it asks for a row that there is not. On CUDA, where nobody waits for a
    look at the numbers, such a row is NaN and has no gradient; with the means torch's own embedding stops the device.
    """
    ordinary = nn.EmbeddingBag

    def __init__(self, num_embeddings: int, embedding_dim: int, max_norm: None = None, norm_type: float = 2.0,
                 scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, *, include_last_offset: bool = False,
                 padding_idx: int | None = None, kl_rows: str = "all", row_counts: Tensor | None = None, n_data: int | None = None,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus",
                 kl: str = "analytic", init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, kl_rows,
                         row_counts, n_data, prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init,
                         init_sigma=init_sigma, device=device, dtype=dtype)
        checks.choice("mode", mode, _MODES)
        checks.flags(include_last_offset=include_last_offset)
        for name in ("scale_grad_by_freq", "sparse"):
            if mode == "max" and getattr(self, name):
                raise ValueError(f"{name}: expected False with mode='max', of which torch has no such gradient, given True")
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return super().forward(input, offsets, per_sample_weights)

    def check(self, n_samples: int, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> None:
        super().check(n_samples, input)
        if input.dim() not in (1, 2):
            raise ValueError(f"input: expected [B, N], or [T] with offsets, given {checks.describe(input)}")
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError(f"offsets: expected None beside an input [B, N], given {checks.describe(offsets)}")
            check_batch(n_samples, input)
        else:
            check_integers("offsets", offsets, self.device)
            bags = offsets.shape[0] - self.include_last_offset if offsets.dim() == 1 else -1
            if bags < 0 or bags % n_samples:
                many = "" if n_samples == 1 else f", B the bags repeated n_samples={n_samples} times"
                raise ValueError(f"offsets: expected [{'B + 1' if self.include_last_offset else 'B'}]{many}, "
                                 f"given {checks.describe(offsets)}")
        if per_sample_weights is None:
            return
        words = (f"per_sample_weights: expected None, or with mode='sum' a tensor {list(input.shape)} of {self.weight_mu.dtype} on "
                 f"{self.device}, as the input and the parameters are")
        if self.mode != "sum":
            raise ValueError(f"{words}, given {checks.describe(per_sample_weights)} with mode={self.mode!r}")
        if not isinstance(per_sample_weights, Tensor) or per_sample_weights.dtype != self.weight_mu.dtype:
            raise TypeError(f"{words}, given {checks.describe(per_sample_weights)}")
        if per_sample_weights.shape != input.shape or per_sample_weights.device != self.device:
            raise ValueError(f"{words}, given {checks.describe(per_sample_weights)}")

    def asked(self, n_samples: int, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> LookUp:
        if offsets is None:
            return super().asked(n_samples, input)
        bags, rows = offsets.shape[0] - self.include_last_offset, input.long()
        places = torch.arange(rows.numel(), device=rows.device)
        used = places < offsets[-1] if self.include_last_offset else None
        if n_samples == 1 or bags == 0:
            return LookUp(rows, 1, None, bags, None, used)
        starts = offsets[:bags:bags // n_samples].long().contiguous()     # of the draws
        draws = (torch.searchsorted(starts, places, right=True) - 1).clamp(min=0)
        parts = None
        if self.scale_grad_by_freq:
            ends = [*starts.tolist()[1:], rows.numel()]
            parts = [end - start for start, end in zip((0, *ends), ends)]
        return LookUp(rows, n_samples, draws, bags, parts, used)

    def combine(self, rows: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Tensor:
        places, padding = torch.arange(rows.shape[0], device=rows.device).view(input.shape), None
        if self.padding_idx is not None:
            padding = rows.shape[0]
            places = places.masked_fill(input == self.padding_idx, padding)
            rows = torch.cat((rows, rows.new_zeros(1, self.embedding_dim)))
        return self._bags(places, rows, None if offsets is None else offsets.long(), per_sample_weights, padding)

    def compute(self, weights: dict[str, Tensor], input: Tensor, offsets: Tensor | None = None,
                per_sample_weights: Tensor | None = None) -> Tensor:
        return self._bags(input, weights["weight"], offsets, per_sample_weights, self.padding_idx,
                          scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse)

    def _bags(self, input, table, offsets, per_sample_weights, padding_idx, **gradient) -> Tensor:
        return F.embedding_bag(input, table, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
                               include_last_offset=self.include_last_offset, padding_idx=padding_idx, **gradient)

    def _settings(self) -> dict:
        return {**super()._settings(), "mode": self.mode, "include_last_offset": self.include_last_offset}
