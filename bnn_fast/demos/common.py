"""What the demos share: training with a progress bar, networks, pictures saved, the table at the end."""
from __future__ import annotations

import os
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import bnn_fast as bf

from . import plain, timing


class Progress:
    """A progress bar over training steps, with the loss and its parts."""

    def __init__(self, total: int, label: str):
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label, unit="step", mininterval=0.5)

    def step(self, **parts: Tensor) -> None:
        # Reading a value waits for the device: not at every step.
        if self._bar.n % 20 == 0:
            self._bar.set_postfix({name: f"{value.item():.4g}" for name, value in parts.items()},
                                  refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()


def say(text: str) -> None:
    """Print a line above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text)


def minimise(objective: Callable[[], dict[str, Tensor]], parameters: Iterable[Tensor], *, steps: int,
             lr: float, label: str, decay: bool = False) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Adam on objective()["loss"], as a loop: yields (step from 1, what objective() gave) at every step,
    while the parameters are still those that gave it.

    decay: the learning rate falls to 0 along half a cosine, and the noise of the gradients dies away with it.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decay else None
    with Progress(steps, label) as progress:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            parts = objective()
            parts["loss"].backward()
            yield step, {name: value.detach() for name, value in parts.items()}
            optimizer.step()
            if decay:
                schedule.step()
            progress.step(**parts)


def elbo_parts(elbo: bf.ELBO, x: Tensor, y: Tensor, n_samples: int = 1) -> dict[str, Tensor]:
    """The loss of elbo(x, y, n_samples) with its two parts, as `minimise` takes them."""
    return {"loss": elbo(x, y, n_samples), "nll": elbo.nll, "kl": elbo.kl}


def perceptron(*sizes: int, layer: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Sequential:
    """layer(in, out) between neighbouring sizes, with a ReLU between layers."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [layer(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def panels(columns: int, width: float, height: float):
    """`columns` Axes side by side on one new figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained").subplots(1, columns)


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
