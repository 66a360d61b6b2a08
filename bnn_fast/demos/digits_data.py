"""The images of the digits demo."""
from __future__ import annotations

import gzip
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BadData(Exception):
    """A file of --data is missing, or is not what it should be."""


class Data(NamedTuple):
    train_x: Tensor     # [N, side * side], from 0 to 1
    train_y: Tensor     # [N]
    test_x: Tensor
    test_y: Tensor


def bundled() -> Data:
    """scikit-learn's digits, 8 x 8 pixels: 1,347 to train with and 450 held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.25, random_state=1996, stratify=y)
    return Data(pixels(train_x, 16), torch.from_numpy(train_y), pixels(test_x, 16), torch.from_numpy(test_y))


def mnist(folder: str) -> Data:
    """MNIST, 28 x 28 pixels: 60,000 to train with and 10,000 held out, from its four IDX files."""
    train_x, train_y, test_x, test_y = (read_idx(folder, name) for name in (
        "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"))
    train_y, test_y = (torch.from_numpy(y).long() for y in (train_y, test_y))
    return Data(pixels(train_x, 255), train_y, pixels(test_x, 255), test_y)


def pixels(images: np.ndarray, largest: int) -> Tensor:
    return torch.from_numpy(images).float().flatten(1) / largest


def read_idx(folder: str, name: str) -> np.ndarray:
    """The bytes of an IDX file, `name` or `name`.gz, in their shape. BadData if there is none."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        path += ".gz"
        if not os.path.exists(path):
            raise BadData(f"--data: expected {name} or {name}.gz in {folder}, found neither")
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        content = file.read()
    # Two zeros, 8 for bytes, the number of dimensions; each dimension as a big-endian int32; the bytes.
    if content[:3] != b"\0\0\x08":
        raise BadData(f"--data: expected an IDX file of bytes, given {path}, "
                      f"which begins with {content[:4].hex()}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">i4")
    if len(content) - start != shape.prod():
        raise BadData(f"--data: {path} says {shape.tolist()} and holds {len(content) - start} bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
