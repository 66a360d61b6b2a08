"""Embeddings beside nn.Embedding, which has the name of the base: zero_grad, the look-up of 512 rows of 64 columns, its backward, alone and
with the KL of the rows looked up. Of a small table with dense gradients, and of a large one with sparse ones.
"""
from __future__ import annotations

from functools import partial

import torch
from torch import nn

import bnn_fast as bf

from .measure import Case, Run, compare
from .providers import BASE

TABLES = ((10_000, False), (1_000_000, True))    # rows, whether gradients are sparse
COLUMNS, BATCH = 64, (8, 64)


def step(layer: nn.Module, with_kl: bool) -> Case:
    device = next(layer.parameters()).device
    tokens = torch.randint(layer.num_embeddings, BATCH, device=device)
    gradient, one = torch.randn(*BATCH, layer.embedding_dim, device=device), torch.ones((), device=device)

    def training():
        layer.zero_grad()
        y = layer(tokens)
        if with_kl:
            torch.autograd.backward([y, bf.kl_divergence(layer)], [gradient, one])
        else:
            y.backward(gradient)

    return training


def measure(run: Run, tables: tuple[tuple[int, bool], ...] = TABLES) -> dict[str, dict]:
    def variational(rows: int, sparse: bool) -> nn.Module:
        counts = torch.ones(rows, dtype=torch.int64, device=run.device)
        return bf.VariationalEmbedding(rows, COLUMNS, sparse=sparse, kl_rows="batch", row_counts=counts, n_data=rows, device=run.device)

    found = {}
    for rows, sparse in tables:
        ours = variational(rows, sparse)
        found[f"Embedding {rows} x {COLUMNS}, {'sparse' if sparse else 'dense'} gradient, 512 tokens"] = compare({
            BASE: partial(step, nn.Embedding(rows, COLUMNS, sparse=sparse, device=run.device), False),
            "bnn_fast": partial(step, ours, False), "bnn_fast, with the KL": partial(step, ours, True)}, run)
    return found
