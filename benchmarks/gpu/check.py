"""All that is to be done on a machine with a GPU, in eight minutes: `make gpu-check`.

Steps: build, tests, sanitizer, instructions, timings. Each has its time and what those before it left of
theirs; one that fails does not stop the next. What is found is saved after each, in
<out>/<name of the GPU>.json; what the programs print goes to build/gpu-check/*.log. The build is in place and
for this GPU alone. A target that is missed is told, and is no failure.
"""
from __future__ import annotations

import glob
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
LOGS = ROOT / "build" / "gpu-check"
SECONDS = {"build": 150, "tests": 120, "sanitizer": 50, "instructions": 40, "timings": 110}
NOT_HERE = {"tests/test_build.py": "is about setup.py alone", "tests/test_installed.py": "needs pip"}
MARKED = "not slow and not ptx"  # those of tests/ptx that interpret: they run for real here
SKIPPED = r"SKIPPED.*(?:no CUDA GPU|built without CUDA kernels)"  # as tests/conftest.py says it
OURS = ["--kernel-name", "kns=bnn_fast"]  # not for initcheck, which has to see what ATen's kernels write
SANITIZERS = {"memcheck": ["--report-api-errors", "no"], "racecheck": OURS, "initcheck": [],
              "synccheck": OURS}


class Outcome(NamedTuple):
    state: str  # ok, failed, not run
    note: str


class Program:
    """A program that writes to a log of its own, and is killed with all it started if it takes too long."""

    def __init__(self, name: str, command: list[str], **environment: str):
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                                            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                                            start_new_session=True)

    def wait(self, until: float) -> int | None:
        """Its exit status, None if it was killed."""
        try:
            return self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def last(self, lines: int = 1) -> str:
        return "\n".join(line[:300] for line in self.output.strip().splitlines()[-lines:])

    def outcome(self, until: float) -> Outcome:
        status = self.wait(until)
        if status is None:
            return Outcome("failed", f"killed at its time limit, after: {self.last()}")
        if status:
            return Outcome("failed", f"exit status {status}; the end of {self.log}:\n{self.last(15)}")
        return Outcome("ok", self.last())


def build(path: pathlib.Path, until: float) -> Outcome:
    capability = json.loads(path.read_text())["environment"]["capability"]
    # not strict: a warning of a compiler that nobody has tried yet is no reason to measure nothing
    return Program("build", [sys.executable, "setup.py", "build_ext", "--inplace"], BNN_FAST_CUDA="1",
                   BNN_FAST_STRICT="0", TORCH_CUDA_ARCH_LIST=capability).outcome(until)


def tests(path: pathlib.Path, until: float) -> Outcome:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", MARKED,
               *(f"--ignore={name}" for name in NOT_HERE)]
    threads = os.cpu_count() or 1
    if importlib.util.find_spec("xdist"):
        workers = max(1, threads // 2)
        command += ["-n", str(workers)]
        threads = 2
    run = Program("tests", command, OMP_NUM_THREADS=str(threads))
    outcome = run.outcome(until)
    skipped = re.search(SKIPPED, run.output)
    if skipped and outcome.state == "ok":
        outcome = Outcome("failed", f"the tests of the GPU did not run: {skipped[0]}")
    left_out = "; ".join(f"{name} {reason}" for name, reason in NOT_HERE.items())
    return outcome._replace(note=f"{outcome.note}\nleft out: {left_out}")


def sanitizer(path: pathlib.Path, until: float) -> Outcome:
    """The four tools at the same time."""
    program = tool("compute-sanitizer")
    if not program:
        return Outcome("not run", "compute-sanitizer was not found")
    running = {name: Program(name, [
        program, "--tool", name, "--error-exitcode", "86", "--print-limit", "10", "--launch-timeout", "60",
        *options, sys.executable, "-m", "benchmarks.gpu.exercise"],
        PYTORCH_NO_CUDA_MEMORY_CACHING="1") for name, options in SANITIZERS.items()}
    try:
        found = {name: sanitizer_outcome(run.outcome(until), run.output) for name, run in running.items()}
    finally:
        for run in running.values():
            run.kill()
    states = {outcome.state for outcome in found.values()}
    return Outcome(next(state for state in ("failed", "not run", "ok") if state in states),
                   "\n".join(f"{name}: {outcome.state}: {outcome.note}" for name, outcome in found.items()))


def sanitizer_outcome(outcome: Outcome, output: str) -> Outcome:
    refused = re.search(r"^=+ .*not supported.*$", output, re.MULTILINE | re.IGNORECASE)
    if refused and outcome.state == "failed":
        return Outcome("not run", refused[0].strip("= "))
    summary = re.search(r"^=+ (\w+ SUMMARY: .*)$", output, re.MULTILINE)
    if summary and outcome.state == "ok":
        return Outcome("ok", summary[1])
    return Outcome("failed", f"{summary[1]}; {outcome.note}" if summary else outcome.note)


def instructions(path: pathlib.Path, until: float) -> Outcome:
    from .. import harness
    from . import instructions

    program = tool("ncu")
    if not program:
        return Outcome("not run", "ncu was not found")
    table = LOGS / "instructions.csv"
    table.unlink(missing_ok=True)
    run = Program("instructions", [*instructions.ncu(program, str(table)), sys.executable, "-m",
                                   "benchmarks.gpu.instructions"])
    outcome = run.outcome(until)
    text = table.read_text() if table.exists() else ""
    refused = re.search(r"^==ERROR== (?!The application returned)(.*)$", text + run.output, re.MULTILINE)
    if refused:
        return Outcome("not run", f"ncu: {refused[1]}")
    if outcome.state == "failed":
        return outcome
    record = json.loads(path.read_text())
    record["instructions"] = instructions.parse(text, run.output)
    harness.save(record, path)
    return Outcome("ok", f"{len(record['instructions'])} shapes")


def timings(path: pathlib.Path, until: float) -> Outcome:
    seconds = until - time.monotonic() - 20  # for the start, and for the case that runs when the time is up
    return Program("timings", [sys.executable, "-m", "benchmarks.gpu.timings", str(path), "--seconds",
                               str(round(seconds))]).outcome(until)


STEPS = {step.__name__: step for step in (build, tests, sanitizer, instructions, timings)}


def tool(name: str) -> str | None:
    """A program on PATH, or where the CUDA toolkit has it."""
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin",
               *sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def missing() -> str | None:
    """Why nothing can be done here."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} cannot import torch ({error}); name another: make gpu-check PYTHON=..."
    if not torch.cuda.is_available():
        return f"no CUDA GPU: torch {torch.__version__} of {sys.executable} sees none"
    return None


def check(steps: list[str], out: pathlib.Path, commit: str | None) -> int:
    """Runs the steps; 0 if none failed."""
    problem = missing()
    if problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 1
    from .. import harness  # needs torch

    environment = {**harness.environment(), **harness.gpu(), "command": shlex.join(sys.orig_argv)}
    if commit:
        environment["commit"] = commit
    path = out.resolve() / f"{re.sub(r'[^a-z0-9]+', '_', environment['gpu'].lower()).strip('_')}.json"
    harness.save({"benchmark": "gpu", "environment": environment, "steps": {}}, path)
    until = time.monotonic()
    for name in steps:
        until += SECONDS[name]
        begin = time.monotonic()
        limit = max(until, begin + SECONDS[name])
        print(f"gpu-check: {name}, at most {limit - begin:.0f} s", flush=True)
        try:
            outcome = STEPS[name](path, limit)
        except Exception as error:
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        record = json.loads(path.read_text())
        record["steps"][name] = {**outcome._asdict(), "seconds": round(time.monotonic() - begin, 1)}
        harness.save(record, path)
        print(f"gpu-check: {name}: {outcome.state}: {outcome.note}", flush=True)
    from . import report  # bnn_fast is imported with it, when it has been built

    print(report.show(record))
    print(f"\n{path}")
    return int(any(step["state"] == "failed" for step in record["steps"].values()))
