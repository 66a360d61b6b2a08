"""What the tests of embeddings share: the classes of torch.nn with settings and inputs."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf

ROWS, COLUMNS = 11, 6
TOKENS = torch.tensor([[1, 4, 4], [0, 10, 3], [7, 7, 7], [4, 2, 0]])
BAGS = torch.tensor([0, 5, 5, 9])


class Case:
    """A class of torch.nn, its settings, and inputs."""

    def __init__(self, name, inputs=(TOKENS,), **settings):
        self.name, self.inputs, self.settings = name, inputs, settings

    def layer(self, **options):
        torch.manual_seed(0)
        return getattr(bf, f"Variational{self.name}")(ROWS, COLUMNS, **self.settings, **{"init_sigma": 0.3, **options})

    def module(self, weight: torch.Tensor, **settings):
        module = getattr(nn, self.name)(ROWS, COLUMNS, **{**self.settings, **settings}, dtype=weight.dtype)
        module.load_state_dict({"weight": weight.detach()})
        return module

    def in_dtype(self, dtype):
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)

    def halves(self):
        """The inputs as those of two batches apart."""
        if self.name == "Embedding" or self.inputs[0].dim() == 2:
            return list(zip(*(x.chunk(2) for x in self.inputs)))
        tokens, offsets, *weights = self.inputs
        last = self.settings.get("include_last_offset", False)
        bags = len(offsets) - last
        middle = int(offsets[bags // 2])
        starts = (offsets[:bags // 2 + last], offsets[bags // 2:] - middle)
        return [(x, start, *w) for x, start, *w in zip(tokens.tensor_split([middle]), starts,
                                                       *(w.tensor_split([middle]) for w in weights))]


CASES = {
    "Embedding": Case("Embedding"),
    "Embedding, padding": Case("Embedding", padding_idx=-1),
    "Embedding, int32": Case("Embedding", (TOKENS.flatten().int(),)),
    "Embedding, frequency": Case("Embedding", scale_grad_by_freq=True, padding_idx=0),
    "Embedding, sparse": Case("Embedding", sparse=True, padding_idx=4),
    "Bag": Case("EmbeddingBag"),
    "Bag, padding": Case("EmbeddingBag", padding_idx=4, mode="mean"),
    "Bag, weights": Case("EmbeddingBag", (TOKENS, torch.linspace(-1, 2, 12).view(4, 3)), mode="sum"),
    "Bag, offsets": Case("EmbeddingBag", (TOKENS.flatten(), BAGS), mode="sum", sparse=True, padding_idx=-4),
    "Bag, last offset": Case("EmbeddingBag", (TOKENS.flatten(), torch.tensor([0, 4, 6, 9, 12])), include_last_offset=True),
    "Bag, offsets and weights": Case("EmbeddingBag", (TOKENS.flatten().int(), BAGS.int(), torch.linspace(1, 2, 12)), mode="sum"),
    "Bag, maximum": Case("EmbeddingBag", (TOKENS.flatten(), BAGS), mode="max"),
    "Bag, frequency": Case("EmbeddingBag", (TOKENS.flatten(), BAGS), scale_grad_by_freq=True),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def call(layer, inputs):
    """The layer with the inputs, per_sample_weights by name."""
    if len(inputs) > 1 and inputs[-1].is_floating_point():
        return layer(*inputs[:-1], per_sample_weights=inputs[-1])
    return layer(*inputs)
