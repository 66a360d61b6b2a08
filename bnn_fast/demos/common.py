"""What the demos share: the progress bar, predictions in pieces, pictures saved, the table at the end."""
from __future__ import annotations

import os
from typing import Iterable, Iterator

import torch
from torch import Tensor, nn

import bnn_fast as bf

from . import plain, timing


class Progress:
    """A progress bar over training steps, with the loss and its parts."""

    def __init__(self, total: int, label: str):
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label, unit="step", mininterval=0.5)

    def step(self, loss: Tensor, elbo: bf.ELBO) -> None:
        # Reading a value waits for the device: not at every step.
        if self._bar.n % 20 == 0:
            self._bar.set_postfix(loss=f"{loss.item():.4g}", nll=f"{elbo.nll.item():.4g}",
                                  kl=f"{elbo.kl.item():.4g}", refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        self._bar.write(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()


@torch.no_grad()
def draws_by_piece(model: nn.Module, x: Tensor, n_samples: int, seed: int, rows: int) -> Iterator[Tensor]:
    """mc_forward on `rows` rows of x at a time, [n_samples, <= rows, ...]: memory does not grow with x.

    The seed makes the draws the same networks for every piece.
    """
    for piece in x.split(rows):
        yield bf.mc_forward(model, piece, n_samples, seed)


def save(axes, folder: str, name: str) -> str:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    axes.figure.savefig(path)
    return path


def step_times(model: nn.Sequential, likelihood: nn.Module, x: Tensor, y: Tensor, n_data: int) -> list[tuple]:
    """Rows for `table`: a step (forward, KL, backward) of `model`, and without bnn_fast in three ways."""
    elbo = bf.ELBO(model, likelihood, n_data)
    linear = bf.draw(model, seed=0)
    plainly, reference = plain.twin(model, plain.PlainLinear), plain.twin(model, plain.ReferenceLinear)

    def nll(network):
        return likelihood(network(x).unsqueeze(0), y).mean()

    def loss(network):
        return nll(network) + plain.kl(network) / n_data

    cases = {
        "bnn_fast": timing.training_step(model, lambda: elbo(x, y)),
        "nn.Linear": timing.training_step(linear, lambda: nll(linear)),
        "plain PyTorch": timing.training_step(plainly, lambda: loss(plainly)),
        "bnn_fast.reference": timing.training_step(reference, lambda: loss(reference)),
    }
    times = timing.interleaved(cases, synchronize=timing.synchronizer(x.device))
    ours = times.pop("bnn_fast").median
    return [("step, bnn_fast", f"{1e3 * ours:.2f} ms", "forward + KL + backward"),
            *((f"step, {name}", f"{1e3 * t.median:.2f} ms",
               f"bnn_fast takes {ours / t.median:.2f} times that") for name, t in times.items())]


def table(title: str, rows: Iterable[tuple]) -> str:
    """Rows of equally many texts, in columns as wide as they have to be, under a title."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    rule = "-" * max(map(len, (title, *lines)))
    return "\n".join(["", title, rule, *lines, rule])
