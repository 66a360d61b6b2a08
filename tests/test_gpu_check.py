"""`make gpu-check` without a GPU: its formulas, its record and tables, and that a step fails alone."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import check, exercise, floors, instructions, operators, report, timer, timings
from benchmarks.gpu.operators import Case
from bnn_fast.demos.timing import Times

from common import needs_extension

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = {"bytes": 4e12, "float32": 5e13, "tf32": 4e14, "bfloat16": 8e14, "instructions": 1e12}


def fake_watch(cases, ahead=False):
    """Calls each case once; nn.Linear takes 1 ms, anything else 2 ms, and half of it on the GPU."""
    found = {}
    for name, case in cases.items():
        case()
        seconds = (1e-3 if name == "nn.Linear" else 2e-3) / (2 if ahead else 1)
        found[name] = Times(seconds, 0.9 * seconds, 2 * seconds)
    return found


# in = 3, out = 5, batch 7, two draws: 15 weights, 14 rows; 4 bytes each
@pytest.mark.parametrize("operator, bytes, flops", [
    ("sample_normal", 4 * (15 + 15 + 2 * 15), 0),
    ("sample_normal_backward", 4 * (15 + 15 + 2 * 15 + 15 + 15), 0),
    ("kl_normal", 4 * (15 + 15), 0),
    ("kl_normal_backward", 4 * (15 + 15 + 15 + 15), 0),
    ("variational_linear", 4 * (15 + 15 + 14 * 3 + 14 * 5), 2 * 15 * 14),
    ("variational_linear_backward", 4 * (15 + 15 + 14 * 3 + 14 * 5 + 15 + 15 + 14 * 3), 4 * 15 * 14)])
def test_what_an_operator_must_move_and_multiply(operator, bytes, flops):
    assert floors.work(operator, Case(3, 5, 7, "float32", samples=2)) == (bytes, flops)
    assert floors.work(operator, Case(3, 5, 7, "tf32", samples=2)) == (bytes, flops)
    assert floors.work(operator, Case(3, 5, 7, "bfloat16", samples=2)) == (bytes / 2, flops)


def test_the_floor_is_the_largest_of_three():
    done = floors.Work(bytes=4 * 10 ** 9, flops=10 ** 11)  # 1 ms, and 2 ms in float32
    assert floors.floor(done, "float32", None, CEILINGS) == (pytest.approx(2e-3), "flops")
    assert floors.floor(done, "tf32", None, CEILINGS) == (pytest.approx(1e-3), "bytes")
    assert floors.floor(done, "tf32", 1.5e9, CEILINGS) == (pytest.approx(1.5e-3), "instructions")


def test_targets_are_met_missed_or_not_measured():
    def step(ratio):
        return {"bnn_fast": {"ratio": ratio}}

    found = {"step": {"8192 x 8192, batch 1, float32": step(2.9),
                      "8192 x 8192, batch 16, float32": step(3.1)},
             "network": {"CUDA graph": {"bnn_fast": {"ratio": 1.4}}},
             "operators": {"a": {"kl_normal": {"fraction": 0.74}, "sample_normal": {"fraction": 0.9}}}}
    rows = floors.targets(found)
    assert [row["met"] for row in rows] == [True, False, None, None, True, False]
    assert rows[-1]["found"] == 0.74 and "1 of them below: kl_normal, a" in rows[-1]["name"]
    shown = [row[-1] for row in report.target_rows(rows)]
    assert shown[1:] == ["met", "missed", "not measured", "not measured", "met", "missed"]


class FakeGpu:
    """A clock for host and GPU. `work` is queued; an event has the time at which the queue reached it."""

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0
        self.order: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.free = max(gpu.free, gpu.host)

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / timer.CYCLES))
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.host)

    def wait(self):
        self.host = max(self.host, self.free)

    def work(self, seconds):
        self.free = max(self.free, self.host) + seconds

    def case(self, name, launch, seconds):
        def run():
            self.order.append(name)
            self.host += launch
            self.work(seconds)
        return run


def test_events_tell_what_a_caller_waits_for_and_ahead_what_the_gpu_does(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    cases = {"launch": gpu.case("launch", 1e-4, 1e-5), "gpu": gpu.case("gpu", 1e-5, 5e-4)}
    waited, alone = timer.interleaved(cases), timer.interleaved(cases, ahead=True)
    assert waited["launch"].median == pytest.approx(1e-4, rel=0.2)
    assert waited["gpu"].median == pytest.approx(5e-4, rel=0.05)
    assert alone["launch"].median == pytest.approx(1e-5) and alone["gpu"].median == pytest.approx(5e-4)


def test_cases_take_turns(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer.interleaved({name: gpu.case(name, 0.0, 2e-3) for name in "ab"})
    assert len(gpu.order) >= 2 * timer.ROUNDS
    assert "".join(gpu.order).startswith("aabb" + "ab" * timer.ROUNDS)  # two to warm up, one a turn then


def test_sets_rotate_and_keep_their_result_for_a_turn():
    class Result:
        pass

    calls, results = [], []

    def call(name):
        def run():
            calls.append(name)
            results.append(weakref.ref(result := Result()))
            return result
        return run

    run = timer.rotated([call("a"), call("b"), call("c")])
    for _ in range(4):
        run()
    assert calls == list("abcabca")
    assert [r() is not None for r in results] == [False, False, False, False, True, True, True]


def test_there_are_copies_enough_to_be_three_times_the_cache():
    assert timer.copies(60, 4) == 45 and timer.copies(60, 7) == 26
    assert timer.copies(60, 1000) == 1 and timer.copies(60, 1) == 64


@pytest.mark.parametrize("kernel, bare", [
    ("void bnn_fast::(anonymous namespace)::forward<float, 1>(bnn_fast::SampleForward, long)", "forward"),
    ("bnn_fast::<unnamed>::sum_kernel(const double *, long)", "sum_kernel"),
    ("void gemm<float>(int)", "gemm"), ("nvjet_tst_128x64", "nvjet_tst_128x64"),
    ("Memset (Device)", "Memset")])
def test_kernels_are_told_by_their_bare_name(kernel, bare):
    assert report.short(kernel) == bare


TABLE = '''==PROF== Connected to process 7
"ID","Kernel Name","Context","smsp__inst_executed.sum"
"","","","inst"
"0","at::cuda::(anonymous namespace)::spin_kernel(long)","1","11"
"1","bnn_fast::forward(float *)","1","1,234"
"2","bnn_fast::sum(double *)","1","6"
"3","at::cuda::(anonymous namespace)::spin_kernel(long)","1","11"
"4","at::cuda::(anonymous namespace)::spin_kernel(long)","1","11"
"5","bnn_fast::backward(float *)","1","50"
'''


def test_instructions_are_counted_by_call():
    printed = "count: A | forward\ncount: A | other\nfailed: no kernel\ncount: B | backward\n"
    assert instructions.parse(TABLE, printed) == {"A": {"forward": 1240.0}, "B": {"backward": 50.0}}
    with pytest.raises(ValueError):
        instructions.parse(TABLE, "count: A | forward\n")


def new_record():
    environment = {"multiprocessors": 132, "gpu": "Test GPU", "driver_version": "1", "torch": "2",
                   "commit": "c", "date": "d"}
    return {"environment": environment, "steps": {"build": {"state": "ok", "note": "built", "seconds": 3.0}}}


ELEMENTWISE = [Case(8, 6, 0, "bfloat16")]
LAYERS = [Case(4, 6, 3, "tf32"), Case(4, 6, 3, "float32", samples=2)]
SWEEP = [Case(4, 6, 2, "float32")]


@pytest.fixture
def measured(monkeypatch):
    """Timings on the CPU, of tiny shapes, by a watch that always tells the same; they know their ceilings."""
    monkeypatch.setattr(timings, "captured", lambda run: run)
    monkeypatch.setattr(timings, "POINTS", 10)
    monkeypatch.setattr(timings.Timings, "ceilings", lambda self: self.found["ceilings"].update(CEILINGS))
    record = {**new_record(), "instructions": {ELEMENTWISE[0].name: {"kl_normal": 15.0}}}
    saves = []
    run = timings.Timings(record, lambda r: saves.append(json.dumps(r)), device="cpu", watch=fake_watch)
    return run, saves


@needs_extension
def test_timings_their_record_and_their_tables(measured, tmp_path):
    run, saves = measured
    run.run(100.0, ELEMENTWISE, LAYERS, SWEEP)
    found = run.found
    assert not found["errors"] and not found["left_out"]
    assert len(saves) == 1 + 1 + 1 + 2 * 2 + 1  # after every case
    record = json.loads(saves[-1])
    assert record["timings"] == found

    assert list(found["operators"]) == [case.name for case in ELEMENTWISE + LAYERS + SWEEP]
    t = found["operators"]["8 x 6, bfloat16"]["kl_normal"]
    assert t["median"] == 1e-3 and t["bytes"] == 2 * 48 * 2 and t["flops"] == 0
    assert t["instructions_per_weight"] == 15.0 * 32 / 48
    assert t["floor"] == pytest.approx(192 / 4e12) and t["bound"] == "bytes"
    assert t["fraction"] == pytest.approx(192 / 4e12 / 1e-3)
    assert any(seconds > 0 for seconds in t["kernels"].values())
    assert found["operators"]["4 x 6, batch 3, tf32"]["variational_linear"]["instructions_per_weight"] is None

    assert set(found["step"]["4 x 6, batch 3, tf32"]) == {"nn.Linear", "bnn_fast", "plain PyTorch"}
    assert set(found["step"]["4 x 6, batch 3, 2 draws, float32"]) == {"nn.Linear", "bnn_fast"}
    for where, seconds in (("step", 2e-3), ("step on the GPU", 1e-3)):
        t = found[where]["4 x 6, batch 3, tf32"]["bnn_fast"]
        assert t["median"] == seconds and t["ratio"] == 2.0
    assert found["network"]["CUDA graph"]["bnn_fast"]["ratio"] == 2.0

    shown = report.show(record)
    assert re.search(r"kl_normal +1000.0 +900.0 to 2000.0 .* 10 .* bytes", shown)
    assert re.search(r"4 x 6, batch 3, tf32 +nn.Linear +1.000 ms .*\n +bnn_fast +2.000 ms +"
                     r"1.800 to 4.000 +2.00", shown)
    assert "not counted" in shown and "not measured" in shown and "built" in shown


@needs_extension
def test_a_case_that_fails_and_one_that_is_late_leave_the_others(measured, monkeypatch):
    run, _ = measured
    monkeypatch.setattr(run, "network", lambda: 1 / 0)
    broken = run.operators

    def operators(case):
        if case.type == "tf32":
            raise RuntimeError("out of something")
        broken(case)

    monkeypatch.setattr(run, "operators", operators)
    run.run(100.0, ELEMENTWISE, LAYERS, sweep=[])
    assert run.found["errors"] == {"network": "ZeroDivisionError: division by zero",
                                   "operators, 4 x 6, batch 3, tf32": "RuntimeError: out of something"}
    assert len(run.found["operators"]) == 2 and len(run.found["step"]) == 2
    assert "out of something" in report.show(run.record)

    late = timings.Timings(new_record(), lambda r: None, device="cpu", watch=fake_watch)
    late.run(-1.0, ELEMENTWISE, [], sweep=[])
    assert late.found["left_out"] == ["ceilings", "operators, 8 x 6, bfloat16", "network"]


def test_a_row_of_the_table_of_operators():
    t = {"median": 2e-3, "low": 1e-3, "high": 3e-3, "bytes": 10 ** 9, "flops": 10 ** 12, "floor": 15e-4,
         "instructions_per_weight": 64.2, "bound": "flops", "fraction": 0.75,
         "kernels": {"void a::b<1>(int)": 2e-3}}
    shown = ("2000.0", "1000.0 to 3000.0", "1.000", "1.000", "64", "1500.0", "flops", "75 %", "b 2000.0")
    assert report.operator_rows({"shape": {"op": t, "other": t}})[1:] == [
        ("shape", "op", *shown), ("", "other", *shown)]


@needs_extension
def test_a_case_has_its_draws_and_its_type():
    y, _ = Case(4, 6, 3, "bfloat16", samples=2).calls("cpu")["variational_linear"]()
    assert y.shape == (2 * 3, 6) and y.dtype == torch.bfloat16
    w, _ = Case(4, 6, 0, "float32", samples=2).calls("cpu")["sample_normal"]()
    assert w.shape == (2, 6, 4) and w.dtype == torch.float32


def test_ceilings(monkeypatch):
    monkeypatch.setattr(timings, "clock", lambda watch: 2e9)
    run = timings.Timings(new_record(), lambda r: None, device="cpu", watch=fake_watch)
    run.ceilings(size=8, bytes=1000)
    flops = pytest.approx(2 * 8 ** 3 / 1e-3)
    assert run.found["ceilings"] == {"bytes": pytest.approx(2 * 1000 / 1e-3), "float32": flops, "tf32": flops,
                                     "bfloat16": flops, "clock": 2e9, "instructions": 4 * 132 * 2e9}


def test_tf32_is_allowed_for_its_cases_alone():
    before = torch.get_float32_matmul_precision()
    with Case(1, 1, 1, "tf32").precision():
        assert torch.get_float32_matmul_precision() == "high"
    with Case(1, 1, 1, "float32").precision():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


@needs_extension
def test_the_exercise_goes_through_every_operator_and_reads_its_results(monkeypatch):
    registered = set(re.findall(r'"_(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text()))
    cases = list(exercise.cases("cpu"))
    assert registered == {operator for _, calls in cases for operator in calls}
    assert exercise.main(["--device", "cpu"]) == sum(len(calls) for _, calls in cases)
    bad = {"kl_normal": lambda: torch.tensor(torch.nan)}
    monkeypatch.setattr(exercise, "cases", lambda device: [("case", bad)])
    with pytest.raises(SystemExit, match="kl_normal, case: not all of the result is finite"):
        exercise.main(["--device", "cpu"])


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
    for case in (Case(33, 65, 0, "bfloat16"), Case(33, 65, 3, "tf32"), Case(33, 65, 3, "float32", samples=2)):
        for call in case.calls("cuda").values():
            call()
    torch.cuda.synchronize()
    assert operators.key("cuda").is_cuda
