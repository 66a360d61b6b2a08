"""Reading what a demo prints, and its pictures."""
from __future__ import annotations

import functools
import os
import re

import pytest

from bnn_fast.demos import timing


@pytest.fixture
def hasty(monkeypatch):
    """Step times from one round: there, and not worth reading."""
    monkeypatch.setattr(timing, "interleaved", functools.partial(timing.interleaved, seconds=0.0, rounds=1))


def row(text: str, label: str) -> list[str]:
    """The cells of a table's row."""
    return re.split(r"\s{2,}", re.search(f"^{re.escape(label)}  .*", text, re.MULTILINE).group())


def pictures(text: str, folder) -> list[str]:
    """Names of the figures printed, each of which is there and is one."""
    paths = re.findall(r"^  (.*\.png)$", text, re.MULTILINE)
    for path in paths:
        assert os.path.dirname(path) == str(folder)
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
        assert os.path.getsize(path) > 5000
    return [os.path.basename(path) for path in paths]


def check_step_times(text: str) -> None:
    ours = float(row(text, "step, bnn_fast")[1].split()[0])
    for other in ("nn.Linear", "plain PyTorch", "bnn_fast.reference"):
        _, time, ratio = row(text, f"step, {other}")
        expected = ours / float(time.split()[0])
        assert float(re.search(r"[\d.]+", ratio).group()) == pytest.approx(expected, rel=0.1, abs=0.02)
