"""The steps of `make gpu-check` without a GPU: each fails alone, and the record is kept."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import check

from test_gpu_timings import TABLE

ROOT = Path(__file__).resolve().parent.parent


def test_the_gpu_is_described_with_and_without_nvidia_smi(monkeypatch, tmp_path):
    device = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132,
                             L2_cache_size=60)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = harness.gpu()
    assert found["gpu"] == "NVIDIA H200" and found["capability"] == "9.0" and found["multiprocessors"] == 132
    assert found["driver_version"] == "unknown"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.159.04, 345, 1980, 3201, 700.00'\n")
    program.chmod(0o755)
    found = harness.gpu()
    assert found["driver_version"] == "580.159.04" and found["clocks.max.sm"] == "1980"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has a GPU, in all that check asks before its steps."""
    monkeypatch.setattr(check, "missing", lambda: None)
    monkeypatch.setattr(check, "LOGS", tmp_path / "logs")
    gpu = {"gpu": "NVIDIA H200 (SXM)", "driver_version": "1", "capability": "9.0"}
    monkeypatch.setattr(harness, "gpu", lambda: gpu)
    return tmp_path


def test_steps_fail_alone_and_the_record_is_kept(machine, monkeypatch, capsys):
    seen = {}

    def step(name, outcome):
        def run(path, until):
            seen[name] = (until - time.monotonic(), json.loads(path.read_text())["steps"])
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return run

    monkeypatch.setattr(check, "STEPS", {
        "build": step("build", RuntimeError("no compiler")),
        "tests": step("tests", check.Outcome("failed", "1 failed")),
        "sanitizer": step("sanitizer", check.Outcome("not run", "not found")),
        "timings": step("timings", check.Outcome("ok", "all"))})
    assert check.check(list(check.STEPS), machine, commit="v1") == 1
    record = json.loads((machine / "nvidia_h200_sxm.json").read_text())
    assert [s["state"] for s in record["steps"].values()] == ["failed", "failed", "not run", "ok"]
    assert record["steps"]["build"]["note"] == "RuntimeError: no compiler"
    assert record["environment"]["commit"] == "v1" and "python" in record["environment"]["command"]
    assert list(seen["timings"][1]) == ["build", "tests", "sanitizer"]  # saved before the next began
    # the time that one leaves is the next one's
    assert seen["tests"][0] == pytest.approx(check.SECONDS["build"] + check.SECONDS["tests"], abs=5)
    assert "no compiler" in capsys.readouterr().out
    assert check.check(["sanitizer", "timings"], machine, commit=None) == 0
    assert sum(check.SECONDS.values()) <= 480


def test_a_program_that_takes_too_long_is_killed_with_its_children(machine):
    run = check.Program("slow", ["sh", "-c", "sleep 60 & echo $!; wait"])
    while not run.output.strip():
        time.sleep(0.01)
    child = int(run.output)
    outcome = run.outcome(time.monotonic())
    assert outcome.state == "failed" and "time limit" in outcome.note
    status = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_program_that_fails_shows_its_end(machine):
    run = check.Program("broken", ["sh", "-c", "echo before; echo the reason >&2; exit 3"])
    outcome = run.outcome(time.monotonic() + 9)
    assert outcome.state == "failed" and "exit status 3" in outcome.note
    assert outcome.note.endswith("before\nthe reason")


def test_the_build_is_for_this_gpu_alone(machine, monkeypatch):
    path = machine / "r.json"
    path.write_text(json.dumps({"environment": {"capability": "9.0"}}))
    started = []
    monkeypatch.setattr(check, "Program", lambda *arguments, **environment: started.append(environment)
                        or SimpleNamespace(outcome=lambda until: check.Outcome("ok", "")))
    assert check.build(path, 0.0).state == "ok"
    assert started[0]["TORCH_CUDA_ARCH_LIST"] == "9.0" and started[0]["BNN_FAST_CUDA"] == "1"


@pytest.mark.parametrize("printed, state", [
    ("3 passed", "ok"),
    ("SKIPPED [9] tests/test_cuda.py:1: bnn_fast was built without CUDA kernels\n3 passed", "failed"),
    ("SKIPPED [1] tests/test_build.py:1: no g++\n3 passed", "ok")])
def test_tests_that_skip_the_gpu_do_not_count(machine, monkeypatch, printed, state):
    program = check.Program
    monkeypatch.setattr(check, "Program", lambda name, *_, **__: program(name, ["printf", printed]))
    outcome = check.tests(machine, time.monotonic() + 9)
    assert outcome.state == state
    assert "tests/test_installed.py needs pip" in outcome.note
    assert all((ROOT / name).exists() for name in check.NOT_HERE)


TOOL = """#!/bin/sh
case "$*" in
  *memcheck*|*initcheck*) echo '========= ERROR SUMMARY: 0 errors';;
  *racecheck*) echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'; exit 86;;
  *synccheck*) echo '========= Error: Device not supported'; exit 1;;
esac
"""


def test_each_sanitizer_has_its_own_outcome(machine, monkeypatch):
    program = machine / "compute-sanitizer"
    program.write_text(TOOL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{machine}{os.pathsep}{os.environ['PATH']}")
    outcome = check.sanitizer(machine, time.monotonic() + 9)
    assert outcome.state == "failed"
    memcheck, racecheck, initcheck, synccheck = re.split(r"\n(?=\w+check: )", outcome.note)
    assert memcheck == "memcheck: ok: ERROR SUMMARY: 0 errors" and initcheck.startswith("initcheck: ok")
    assert racecheck.startswith("racecheck: failed: RACECHECK SUMMARY: 1 hazard")
    assert synccheck == "synccheck: not run: Error: Device not supported"


def test_instructions_are_added_to_the_record(machine, monkeypatch):
    program = machine / "ncu"
    program.write_text(f"#!/bin/sh\ncat > {machine / 'logs' / 'instructions.csv'} <<'END'\n{TABLE}END\n"
                       "echo 'count: A | forward'; echo 'count: A | other'; echo 'count: B | backward'\n")
    program.chmod(0o755)
    monkeypatch.setattr(check, "tool", lambda name: str(program))
    path = machine / "r.json"
    path.write_text("{}")
    assert check.instructions(path, time.monotonic() + 9) == ("ok", "2 shapes")
    assert json.loads(path.read_text())["instructions"]["A"] == {"forward": 1240.0}


def test_tools_that_are_missing_or_refuse_are_not_run(machine, monkeypatch):
    monkeypatch.setattr(check, "tool", lambda name: None)
    for step, name in ((check.sanitizer, "compute-sanitizer"), (check.instructions, "ncu")):
        assert step(machine, 0.0) == ("not run", f"{name} was not found")
    program = machine / "ncu"
    program.write_text("#!/bin/sh\necho '==ERROR== Failed to initialize the profiler: none'; exit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr(check, "tool", lambda name: str(program))
    outcome = check.instructions(machine, time.monotonic() + 9)
    assert outcome == ("not run", "ncu: Failed to initialize the profiler: none")
    program.write_text("#!/bin/sh\necho '==ERROR== The application returned an error code (1).'; exit 1\n")
    assert check.instructions(machine, time.monotonic() + 9).state == "failed"


def test_without_a_gpu_it_says_so_and_fails():
    done = subprocess.run(["make", "gpu-check", f"PYTHON={sys.executable}"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode != 0
    assert "gpu-check: no CUDA GPU: torch" in done.stderr


def test_without_torch_it_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "make gpu-check PYTHON=" in check.missing()
