"""A cubic with noise: the data of two demos."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOISE = 1.5         # standard deviation


def curve(x):
    return 0.2 * x ** 3 - 2 * x ** 3 + 8 * x


def data(points: int, device: str) -> list[Tensor]:
    """x of training [0.8 points, 1] and validation [0.2 points, 1], then y of both."""
    from sklearn.model_selection import train_test_split

    x = np.linspace(-3.0, 3.0, points)
    y = curve(x) + np.random.default_rng(1996).normal(0.0, NOISE, points)
    return [torch.tensor(part, dtype=torch.float32, device=device).unsqueeze(1)
            for part in train_test_split(x, y, test_size=0.2, random_state=1996)]
