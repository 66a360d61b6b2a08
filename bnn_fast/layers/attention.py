"""The variational counterpart of nn.MultiheadAttention."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..operators import functional
from ..priors import Normal
from .counterpart import Counterpart
from .fastpath import NO_WEIGHT, asked_by_a_transformer


class VariationalMultiheadAttention(Counterpart):
    """Multi-head attention (Vaswani et al. 2017) with weights drawn at every call, one draw shared by the batch.

    Arguments, inputs and outputs: those of nn.MultiheadAttention; then the keyword arguments of VariationalLinear. The posteriors have
    torch's names, those of its out_proj being called out_proj_weight and out_proj_bias.

    Under `sampling` with several samples the batch is the samples', sample-major: dimension 0 with batch_first, else dimension 1; masks of
    the batch and of its heads likewise in their dimension 0, a mask [L, S] is everybody's. `mc_forward`, `predict` and `ELBO` repeat
    dimension 0; with time first they need vectorized=False.

    It may be `self_attn` of nn.TransformerEncoderLayer, whose fused inference path is left aside.

    Raises ValueError or TypeError where an argument does not fit, or an input has another number of features, dtype or device, or, with
    several samples, no batch that they divide.
    """
    ordinary = nn.MultiheadAttention
    no_settings = ("out_proj",)

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
                 add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        sizes = {name: value if value is None else checks.positive_int(name, value) for name, value in sizes.items()}
        checks.flags(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first)
        if sizes["embed_dim"] % sizes["num_heads"]:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, given {embed_dim}")
        super().__init__({**sizes, "dropout": dropout, "bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn,
                          "batch_first": batch_first},
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)

    def _named(self, module: nn.Module) -> dict[str, nn.Parameter | None]:
        out = {f"out_proj_{name}": parameter for name, parameter in module.out_proj._parameters.items()}
        return {**module._parameters, **out}

    def _put(self, module: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        for name, w in weights.items():
            owner = module.out_proj if name.startswith("out_proj_") else module
            setattr(owner, name.removeprefix("out_proj_"), w)

    def places(self, name: str) -> list[str]:
        return [f"out_proj.{name.removeprefix('out_proj_')}" if name.startswith("out_proj_") else name]

    def _fan_in(self, module: nn.Module) -> int:
        return module.embed_dim

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
                attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False):
        return super().forward(query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights,
                               attn_mask=attn_mask, average_attn_weights=average_attn_weights, is_causal=is_causal)

    def check(self, n_samples: int, query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask=None, attn_mask=None,
              **flags) -> None:
        at = 0 if self.batch_first else 1
        for name, x, features in (("query", query, "embed_dim"), ("key", key, "kdim"), ("value", value, "vdim")):
            checks.last_dimensions(name, x, (getattr(self, features),), features)
            self._check(name, x)
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(f"{name}: expected 2 dimensions, or 3 with a batch, as query {list(query.shape)}, "
                                 f"given {checks.describe(x)}")
            if n_samples > 1 and (x.dim() == 2 or x.shape[at] % n_samples):
                raise ValueError(f"{name}: expected dimension {at} to be the batch repeated n_samples={n_samples} times, "
                                 f"given {checks.describe(x)}; see mc_forward")
        self._check_places(query, key, value, key_padding_mask, attn_mask)

    def _check_places(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask, attn_mask) -> None:
        """Batch and lengths of everything agree."""
        time = 1 if self.batch_first and query.dim() == 3 else 0
        batch = [query.shape[1 - time]] if query.dim() == 3 else []
        length, source = query.shape[time], key.shape[time]
        if batch and key.shape[1 - time] != batch[0]:
            raise ValueError(f"key: expected a batch of {batch[0]} as query {list(query.shape)}, given {checks.describe(key)}")
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value: expected length and batch of key {list(key.shape)}, given {checks.describe(value)}")
        of_heads = [*[self.num_heads * rows for rows in batch or [1]], length, source]
        for name, mask, shapes in (("key_padding_mask", key_padding_mask, [[*batch, source]]),
                                   ("attn_mask", attn_mask, [[length, source], of_heads])):
            if mask is not None and (not isinstance(mask, Tensor) or list(mask.shape) not in shapes):
                raise ValueError(f"{name}: expected a tensor {' or '.join(map(str, shapes))}, given {checks.describe(mask)}")

    def compute(self, weights: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask=None,
                need_weights: bool = True, attn_mask=None, average_attn_weights: bool = True, is_causal: bool = False):
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected one beside is_causal=True, given None")
        w = weights if functional.autocasting(query) else {name: each.to(query.dtype) for name, each in weights.items()}
        masks = {name: F._canonical_mask(mask, name, None if name == "key_padding_mask" else F._none_or_dtype(key_padding_mask),
                                         "key_padding_mask", query.dtype)
                 for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask))}
        swapped = self.batch_first and query.dim() == 3
        if swapped:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        apart = not self._qkv_same_embed_dim
        y, attention = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, w.get("in_proj_weight"), w.get("in_proj_bias"), w.get("bias_k"),
            w.get("bias_v"), self.add_zero_attn, self.dropout, w["out_proj_weight"], w.get("out_proj_bias"), training=self.training,
            need_weights=need_weights, use_separate_proj_weight=apart, q_proj_weight=w.get("q_proj_weight"),
            k_proj_weight=w.get("k_proj_weight"), v_proj_weight=w.get("v_proj_weight"), average_attn_weights=average_attn_weights,
            is_causal=is_causal, **masks)
        return (y.transpose(0, 1) if swapped else y), attention

    def compute_samples(self, weights: dict[str, Tensor], n_samples: int, query: Tensor, key: Tensor, value: Tensor, *,
                        key_padding_mask=None, attn_mask=None, **flags):
        at = 0 if self.batch_first else 1
        inputs = _each(lambda x: x.chunk(n_samples, at), query, key, value)
        padding = [None] * n_samples if key_padding_mask is None else key_padding_mask.chunk(n_samples)
        shared = attn_mask is None or attn_mask.dim() == 2
        masks = [attn_mask] * n_samples if shared else attn_mask.chunk(n_samples)
        found = [self.compute({name: w[s] for name, w in weights.items()}, *(x[s] for x in inputs), key_padding_mask=padding[s],
                              attn_mask=masks[s], **flags) for s in range(n_samples)]
        outputs, attentions = zip(*found)
        return torch.cat(outputs, at), None if attentions[0] is None else torch.cat(attentions)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, {super().extra_repr()}"

    def __getattr__(self, name: str):
        if (name in self.__dict__.get("_fans", ()) or name == "out_proj") and asked_by_a_transformer():
            return NO_WEIGHT    # here, as the base looks at its own caller
        return super().__getattr__(name)


def _each(function, query: Tensor, key: Tensor, value: Tensor) -> list:
    """function of each, the same object where they are: torch projects them together then."""
    done = {id(x): function(x) for x in {id(x): x for x in (query, key, value)}.values()}
    return [done[id(x)] for x in (query, key, value)]
