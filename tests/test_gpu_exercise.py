"""The programs that run every operator on a GPU, once or timed."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import exercise, operators, timer, timings
from benchmarks.gpu.operators import Case

from common import needs_extension

ROOT = Path(__file__).resolve().parent.parent


@needs_extension
def test_the_exercise_goes_through_every_operator_and_reads_its_results(monkeypatch):
    registered = set(re.findall(r'"_(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text()))
    cases = list(exercise.cases("cpu"))
    registered.remove("linear_regime")  # computes nothing
    assert registered == {operator for _, calls in cases for operator in calls}
    assert exercise.main(["--device", "cpu"]) == sum(len(calls) for _, calls in cases)
    bad = {"kl_normal": lambda: torch.tensor(torch.nan)}
    monkeypatch.setattr(exercise, "cases", lambda device: [("case", bad)])
    with pytest.raises(SystemExit, match="kl_normal, case: not all of the result is finite"):
        exercise.main(["--device", "cpu"])


@pytest.mark.cuda
def test_timer_profiler_and_graph_on_the_gpu():
    a = torch.randn(1024, 1024, device="cuda")
    times = timer.interleaved({"product": lambda: a @ a}, ahead=True)
    assert 1e-6 < times["product"].median < 1e-2
    assert 1e8 < timings.clock(timer.interleaved) < 1e10
    assert sum(timings.breakdown(lambda: a @ a, "cuda").values()) > 1e-6
    total = torch.zeros((), device="cuda")
    replay = timings.captured(lambda: total.add_(1))
    replay()
    assert total.item() == 4.0  # three calls before, none while it was captured


@pytest.mark.cuda
def test_the_operators_to_be_timed_run_on_the_gpu():
    for case in (Case(33, 65, 0, "bfloat16"), Case(33, 65, 3, "tf32"), Case(33, 65, 3, "float32", samples=2),
                 Case(33, 65, 3, "float32", estimator="local")):
        for call in case.calls("cuda").values():
            call()
    torch.cuda.synchronize()
    assert operators.key("cuda").is_cuda
