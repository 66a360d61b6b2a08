"""The timings of `make gpu-check` without a GPU: formulas, timer, record and tables."""
from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import floors, instructions, report, timer, timings
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
    ("variational_linear_backward", 4 * (15 + 15 + 14 * 3 + 14 * 5 + 15 + 15 + 14 * 3), 4 * 15 * 14),
    ("estimated_linear", 4 * (15 + 15 + 14 * 3 + 14 * 5), 4 * 15 * 14),
    ("estimated_linear_backward", 4 * (15 + 15 + 14 * 3 + 14 * 5 + 15 + 15 + 14 * 3), 8 * 15 * 14)])
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
                      "8192 x 8192, batch 16, float32": step(3.1),
                      "8192 x 8192, batch 1, float32, local": {"bnn_fast local": {"ratio": 2.1}}},
             "network": {"a, batch 3, eager": step(1.4), "a, batch 3, CUDA graph": step(0.6), "a, batch 3: predict, 9 draws": step(2.0)},
             "operators": {"a": {"kl_normal": {"fraction": 0.74}, "sample_normal": {"fraction": 0.9}}}}
    rows = floors.targets(found)
    assert [row["met"] for row in rows] == [True, False, None, None, True, None, False, True, False]
    assert rows[-1]["found"] == 0.74 and "1 of them below: kl_normal, a" in rows[-1]["name"]
    shown = [row[-1] for row in report.target_rows(rows)]
    assert shown[1:] == ["met", "missed", "not measured", "not measured", "met", "not measured", "missed", "met", "missed"]


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
LAYERS = [Case(4, 6, 3, "tf32"), Case(4, 6, 3, "float32", samples=2), Case(4, 6, 3, "float32", estimator="local")]
SWEEP = [Case(4, 6, 2, "float32")]


@pytest.fixture
def measured(monkeypatch):
    """Timings on the CPU, of tiny shapes, by a watch that always tells the same; they know their ceilings."""
    monkeypatch.setattr(timings, "captured", lambda run: run)
    monkeypatch.setattr(timings, "NETWORKS", [((2, 3, 1), 4), ((2, 5, 3), 4)])
    monkeypatch.setattr(timings, "PREDICTIONS", [((2, 3, 1), 4, 5)])
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
    assert len(saves) == 1 + 1 + 2 + 2 * 3 + 1 + 1  # after every case
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
    assert set(found["step"]["4 x 6, batch 3, float32, local"]) == {"nn.Linear", "bnn_fast local", "plain PyTorch"}
    for where, seconds in (("step", 2e-3), ("step on the GPU", 1e-3)):
        t = found[where]["4 x 6, batch 3, tf32"]["bnn_fast"]
        assert t["median"] == seconds and t["ratio"] == 2.0
    steps = [f"{sizes}, batch 4, {how}" for sizes in ("2-3-1", "2-5-3") for how in ("eager", "CUDA graph")]
    assert list(found["network"]) == [*steps, "2-3-1, batch 4: predict, 5 draws"]
    assert all(of["bnn_fast"]["ratio"] == 2.0 for of in found["network"].values())

    shown = report.show(record)
    assert re.search(r"kl_normal +1000.0 +900.0 to 2000.0 .* 10 .* bytes", shown)
    assert re.search(r"4 x 6, batch 3, tf32 +nn.Linear +1.000 ms .*\n +bnn_fast +2.000 ms +"
                     r"1.800 to 4.000 +2.00", shown)
    assert "not counted" in shown and "not measured" in shown and "built" in shown


@needs_extension
def test_a_case_that_fails_and_one_that_is_late_leave_the_others(measured, monkeypatch):
    run, _ = measured
    monkeypatch.setattr(run, "network", lambda *_: 1 / 0)
    broken = run.operators

    def operators(case):
        if case.type == "tf32":
            raise RuntimeError("out of something")
        broken(case)

    monkeypatch.setattr(run, "operators", operators)
    run.run(100.0, ELEMENTWISE, LAYERS, sweep=[])
    assert run.found["errors"] == {**{f"network, {sizes}, batch 4": "ZeroDivisionError: division by zero" for sizes in ("2-3-1", "2-5-3")},
                                   "operators, 4 x 6, batch 3, tf32": "RuntimeError: out of something"}
    assert len(run.found["operators"]) == 3 and len(run.found["step"]) == 3
    assert "out of something" in report.show(run.record)

    late = timings.Timings(new_record(), lambda r: None, device="cpu", watch=fake_watch)
    late.run(-1.0, ELEMENTWISE, [], sweep=[])
    assert late.found["left_out"] == [
        "ceilings", "operators, 8 x 6, bfloat16", "network, 2-3-1, batch 4", "network, 2-5-3, batch 4", "predict, 2-3-1, batch 4"]


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
