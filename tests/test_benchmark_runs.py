"""Several runs of the benchmark suite as one result: medians, and the range of the ratios."""
from __future__ import annotations

import json

import pytest

from benchmarks import compare, harness, providers, suite
from benchmarks.__main__ import main
from benchmarks.measure import Run


LAYER = "3 x 4, batch 5"


def timed(ratio: float, base: float = 1.0) -> dict[str, dict]:
    cases = {"nn.Linear": base, "bnn_fast": ratio * base}
    return {LAYER: {name: {"median": t, "low": 0.9 * t, "high": 1.1 * t, "ratio": t / base, "extra": 8, "reached": True}
                      for name, t in cases.items()}}


def test_several_runs_give_medians_and_the_range_of_ratios():
    found = harness.together([timed(3.0), timed(1.0, base=2.0), timed(1.5)])[LAYER]["bnn_fast"]
    assert found == {"median": 2.0, "low": 1.8, "high": pytest.approx(2.2), "ratio": 1.5, "extra": 8, "reached": True,
                     "ratios": [3.0, 1.0, 1.5]}
    assert harness.ratio(found) == "1.50 (1.00 to 3.00)"


def test_one_run_is_as_it_was_measured():
    assert harness.together([timed(3.0)]) == timed(3.0)
    assert harness.ratio(timed(3.0)[LAYER]["bnn_fast"]) == "3.00"


def test_a_case_that_failed_in_one_run_has_failed():
    failed = timed(2.0)
    failed[LAYER]["bnn_fast"] = {"error": "ValueError: not today"}
    for runs in ([failed, timed(2.0)], [timed(2.0), failed]):
        assert harness.together(runs)[LAYER]["bnn_fast"] == {"error": "ValueError: not today"}


def test_a_change_within_the_range_of_the_runs_is_noise():
    def record(*ratios):
        settings = harness.together([timed(ratio) for ratio in ratios])
        return {"sections": {"step": harness.results("step", settings, "nn.Linear", {})}}

    before = record(1.0, 1.5, 2.0)
    assert compare.compare(before, record(1.9, 1.95, 2.4)) == []
    rows = compare.compare(before, record(2.1, 2.2, 2.4))
    assert [row[3] for row in rows] == ["47 % slower"]


def test_every_run_measures_every_section_again(tmp_path, monkeypatch, capsys):
    seen = []
    for name, section in suite.SECTIONS.items():
        monkeypatch.setattr(section, "measure", lambda run, name=name: (seen.append(name), timed(len(seen)))[1])
    run = Run(providers.available(["nn.Linear"])[0])
    record, path = suite.measure(["step", "predict"], run, {}, tmp_path, runs=3)
    assert seen == ["step", "predict"] * 3
    assert record == json.loads(path.read_text())
    assert record["sections"]["step"]["runs"] == 3
    assert record["sections"]["step"]["settings"][LAYER]["bnn_fast"]["ratios"] == [1.0, 3.0, 5.0]
    table = suite.show(record)
    assert "3.00 (1.00 to 5.00)" in table and "runs 3" in table


def test_no_runs_are_refused(capsys):
    assert main(["step", "--runs", "0"]) == 1
    assert "--runs: expected at least 1, given 0" in capsys.readouterr().err
