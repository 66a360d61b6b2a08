"""Whole trainings with Adam, wall clock until the loss of the data falls to a stated value.

The providers train in turn, a few steps each. The time and its ratio are those of a step; beside them is the
time to the loss, torch.compile's compilation in it. Noise and initialisation decide how many steps that
takes, more than the library does.
"""
from __future__ import annotations

import time
from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnn_fast.demos import bayes_by_backprop, digits, digits_data, timing

from . import harness
from .measure import Run, extra_memory
from .providers import BASE, Provider
from .step import NETWORK, POINTS


class Task(NamedTuple):
    """goal: of the mean data loss over `chunk` steps; at most so many chunks."""
    sizes: tuple[int, ...]
    x: Tensor
    y: Tensor
    batch: int
    learning_rate: float
    loss: Callable[[Tensor, Tensor], Tensor]
    unit: float      # nats per unit of the loss
    chunk: int
    chunks: int
    goal: float


def tutorial(points: int = POINTS) -> Task:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, points).unsqueeze(1)
    y = bayes_by_backprop.curve(x) + bayes_by_backprop.NOISE * torch.randn_like(x)
    return Task(NETWORK, x, y, points, 0.01, F.mse_loss, 0.5 / bayes_by_backprop.LIKELIHOOD ** 2,
                chunk=20, chunks=40, goal=6.0)


def images(data: digits_data.Data, settings: digits.Settings, chunk: int, chunks: int, goal: float) -> Task:
    hidden = settings.hidden
    return Task((data.train_x.shape[1], hidden, hidden, 10), data.train_x, data.train_y, settings.batch, 1e-3,
                F.cross_entropy, 1.0, chunk, chunks, goal)


def tasks(data: str | None) -> dict[str, Task]:
    found = {"tutorial network, to a mean square error of 6": tutorial(),
             "digits, to an NLL of 0.4": images(digits_data.bundled(), digits.DIGITS, 22, 20, 0.4)}
    if data:
        found["MNIST, an epoch"] = images(digits_data.mnist(data), digits.MNIST, 67, 7, 0.0)
    return found


def learner(task: Task, provider: Provider, device: str) -> Iterator[float]:
    """Trains; gives the mean loss of each chunk of steps."""
    torch.manual_seed(0)
    x, y = task.x.to(device), task.y.to(device)
    model = provider.model(task.sizes, device=device)
    optimiser = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    losses = []
    while True:
        for rows in torch.randperm(len(x), device=device).split(task.batch):
            part = (x, y) if task.batch == len(x) else (x[rows], y[rows])
            optimiser.zero_grad()
            data_loss = task.loss(model(part[0]), part[1])
            kl = provider.kl(model).sum() / len(x) if provider.kl else 0.0
            (task.unit * data_loss + kl).backward()
            optimiser.step()
            losses.append(data_loss.detach())
            if len(losses) == task.chunk:
                yield torch.stack(losses).mean().item()  # waits for the device
                losses.clear()


def race(learners: dict[str, Iterator[float]], task: Task) -> dict[str, dict]:
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    losses: dict[str, float] = {}
    running = dict(learners)
    for _ in range(task.chunks):
        for name, one in list(running.items()):
            start = time.perf_counter()
            losses[name] = next(one)
            seconds[name].append(time.perf_counter() - start)
            if losses[name] <= task.goal:
                del running[name]
    times = {name: timing.summary([s / task.chunk for s in taken]) for name, taken in seconds.items()}
    return {name: {**t, "seconds": sum(seconds[name]), "loss": losses[name],
                   "steps": task.chunk * len(seconds[name]), "goal": task.goal,
                   "reached": name not in running}
            for name, t in harness.ratios(times, BASE).items()}


def measure(run: Run, chosen: dict[str, Task] | None = None) -> dict[str, dict]:
    found = {}
    for setting, task in (chosen or tasks(run.data)).items():
        learners = {name: learner(task, provider, run.device) for name, provider in run.providers.items()}
        found[setting] = race(learners, task)
        for name, t in found[setting].items():
            t["extra"] = extra_memory(partial(next, learners[name]), run.cuda)
            t["note"] = (f"{t['seconds']:.2f} s, {t['steps']} steps, loss {t['loss']:.3g}"
                         f"{'' if t['reached'] or not task.goal else ': not reached'}")
    return found
