"""ResNet-20 for images of 32 x 32: He et al., "Deep residual learning for image recognition", 2016, section 4.2, with projections
where the size changes."""
from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, conv: Callable):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n_out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = conv(n_out, n_out, 3, stride=1, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = None if stride == 1 else conv(n_in, n_out, 1, stride=stride, padding=0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet20(nn.Module):
    """conv, linear: what makes the layers, with the arguments of nn.Conv2d and nn.Linear."""

    def __init__(self, classes: int = 10, conv: Callable = nn.Conv2d, linear: Callable = nn.Linear):
        super().__init__()
        blocks, n_in = [], 16
        for n_out in (16, 32, 64):
            for _ in range(3):
                blocks.append(Block(n_in, n_out, 1 if n_in == n_out else 2, conv))
                n_in = n_out
        self.stem = nn.Sequential(conv(3, 16, 3, stride=1, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks, self.fc = nn.Sequential(*blocks), linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))
