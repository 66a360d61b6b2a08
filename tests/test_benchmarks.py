from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bnn_fast as bf
from benchmarks import (compare, harness, measure, memory, plot, predict, providers, scaling, step, suite,
                        threads, train)
from benchmarks.__main__ import main
from benchmarks.measure import Run, extra_memory
from bnn_fast.demos.plain import PlainLinear
from bnn_fast.demos.timing import interleaved


def test_a_sleeping_case_takes_as_long_as_it_sleeps():
    cases = {"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.012)}
    times = interleaved(cases, seconds=0.0, rounds=9)
    assert 0.004 <= times["short"].median < 0.008
    assert 0.012 <= times["long"].median < 0.018
    for t in times.values():
        assert t.low <= t.median <= t.high


def test_cases_are_timed_in_turn_and_the_device_waited_for():
    order = []

    def case(name):
        return lambda: (order.append(name), time.sleep(0.002))

    cases = {"a": case("a"), "b": case("b")}
    interleaved(cases, seconds=0.0, rounds=3, synchronize=lambda: order.append("wait"))
    turns = ["a", "wait", "a", "wait", "b", "wait", "b", "wait"]  # each once before its time is taken
    assert order == turns * 5  # twice to warm up, three rounds


def test_a_case_that_takes_long_is_not_called_beforehand():
    calls = []
    interleaved({"long": lambda: (calls.append(1), time.sleep(0.11))}, seconds=0.0, rounds=2)
    assert len(calls) == 2 + 2  # once with a call before it, two rounds


def test_long_rounds_are_few(monkeypatch):
    monkeypatch.setattr("bnn_fast.demos.timing.SLOW", 0.15)
    calls = []
    interleaved({"long": lambda: (calls.append(1), time.sleep(0.2))}, seconds=0.0, rounds=7)
    assert len(calls) == 2 + 3


def test_a_quick_case_is_called_several_times_a_round():
    calls = []
    times = interleaved({"quick": lambda: calls.append(1)}, seconds=0.0, rounds=5)
    assert len(calls) > 100 and times["quick"].median < 1e-4


def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)

    result, source = tmp_path / "benchmarks" / "results" / "a.json", tmp_path / "setup.py"
    result.parent.mkdir(parents=True)
    for file in (result, source):
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    clean = harness.commit()
    assert len(clean) == 12
    result.write_text("2")
    assert harness.commit() == clean
    source.write_text("2")
    assert harness.commit() == clean + "-dirty"


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_the_plain_layer_is_a_fair_twin(kl):
    torch.manual_seed(0)
    layer = bf.VariationalLinear(6, 5, kl=kl, init="blundell", dtype=torch.float64)
    plain = PlainLinear(layer)
    x = torch.randn(7, 6, dtype=torch.float64)
    ys, kls = zip(*[(plain(x), plain.kl) for _ in range(1000)])
    with torch.no_grad():
        exact = (bf.functional.kl_normal(layer.weight_mu, layer.weight_rho)
                 + bf.functional.kl_normal(layer.bias_mu, layer.bias_rho))
    # The sampled KL of a weight has a standard deviation of about 1/sqrt(2).
    tolerance = 1e-9 if kl == "analytic" else 5 * (35 / 2 / 1000) ** 0.5
    assert torch.stack(kls).mean().item() == pytest.approx(exact.item(), abs=tolerance)
    drawn, ours = torch.stack(ys).std(0), bf.mc_forward(layer, x, 1000).std(0)
    torch.testing.assert_close(drawn, ours, rtol=0.15, atol=0.0)


QUICK = ("nn.Linear", "bnn_fast", "plain PyTorch")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(step, "POINTS", 50)
    return Run(providers.available(QUICK)[0], seconds=0.0, rounds=2)


def test_memory_is_what_a_call_holds_at_its_peak_beyond_what_it_leaves():
    def case():
        first, second = torch.empty(3 * 2 ** 18), torch.empty(2 ** 18)  # 3 and 1 MiB
        del first
        return second

    def smaller():
        torch.empty(2 ** 18)
        torch.empty(2 ** 19)

    assert extra_memory(case) == 3 * 2 ** 20
    assert extra_memory(smaller) == 2 * 2 ** 20
    assert extra_memory(lambda: torch.empty(2 ** 18)) == extra_memory(lambda: None) == 0


class Sleeper(nn.Linear):
    """Takes 50 ms and 4 MiB more than nn.Linear."""

    def forward(self, x):
        buffer = torch.empty(2 ** 20)
        time.sleep(0.05)
        del buffer
        return super().forward(x)


def test_a_provider_that_sleeps_and_allocates_is_measured_as_such(run):
    named = {"nn.Linear": run.providers["nn.Linear"], "sleeper": providers.Provider(Sleeper, None)}
    found = measure.compare({name: partial(step.layer, provider, (3, 4, 5), run)
                             for name, provider in named.items()}, run._replace(rounds=9))
    assert 0.050 <= found["sleeper"]["median"] < 0.075
    assert found["sleeper"]["ratio"] == found["sleeper"]["median"] / found["nn.Linear"]["median"]
    assert found["nn.Linear"]["extra"] < 2 ** 10
    assert found["sleeper"]["extra"] == pytest.approx(2 ** 22, abs=2 ** 10)


def test_a_case_that_fails_leaves_the_others_alone(run):
    def broken(n_in, n_out):
        raise ValueError("no layer today")

    named = {**run.providers, "broken": providers.Provider(broken, None)}
    found = step.measure(run._replace(providers=named), [(3, 4, 5)], [(3, 4, 5)])
    assert all(cases["broken"] == {"error": "ValueError: no layer today"}
               for name, cases in found.items() if "KL" not in name)
    assert found["3 x 4, batch 5"]["bnn_fast"]["median"] > 0


def test_a_provider_that_is_not_installed_is_told_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchbnn", None)
    found, absent = providers.available(["torchbnn", "plain PyTorch"])
    assert list(found) == ["nn.Linear", "plain PyTorch"]
    assert list(absent) == ["torchbnn"] and "ModuleNotFoundError" in absent["torchbnn"]


@pytest.mark.parametrize("name", [name for name in providers.MAKERS if name != "torch.compile"])
def test_every_provider_begins_with_the_same_posterior(name):
    found, absent = providers.available([name])
    if name in absent:
        pytest.skip(absent[name])
    torch.manual_seed(0)
    provider = found[name]
    model, x = provider.model((30, 40, 50)), torch.randn(20, 30)
    assert model(x).shape == (20, 50)
    if provider.kl is None:
        return
    kl = provider.kl(model)
    assert kl.numel() == 1
    (model(x).sum() + provider.kl(model).sum()).backward()
    assert sum(p.grad is not None for p in model.parameters()) == 8
    first = model[0]
    with torch.no_grad():
        ys = torch.stack([first(torch.eye(30)) - first(torch.zeros(30, 30)) for _ in range(30)])
    assert ys.mean(0).std().item() == pytest.approx(0.1, rel=0.3)


def test_sections_of_a_run(run):
    found = step.measure(run, [(3, 4, 5)], [(3, 4, 5)])
    assert list(found) == ["3 x 4, batch 5", step.TUTORIAL, *(
        f"3 x 4, batch 5: {which} alone" for which in ("forward", "KL", "backward"))]
    assert all(list(cases) == list(QUICK) for name, cases in found.items() if "KL" not in name)
    assert not any("error" in t for cases in found.values() for t in cases.values())
    found = predict.measure(run, [((3, 4), 5, 6)])
    assert found["3-4, batch 5, 6 draws"]["bnn_fast"]["ratio"] > 0
    found = memory.measure(run, [(64, 64, 2)], [1, 8])
    one, eight = (found[f"64 x 64, batch 2, {samples} draws"] for samples in (1, 8))
    assert eight["plain PyTorch"]["extra"] > 4 * one["plain PyTorch"]["extra"] > 0
    found = threads.measure(run, [(3, 4, 5)])
    assert list(found)[0] == "3 x 4, batch 5, 1 threads" and len(found) == len(threads.counts()) + 2
    assert list(found)[-1] == f"784 x 400, batch 128, {threads.counts()[-1]} busy neighbours"
    assert scaling.floor(1000, 1000, 1, 1e9, 1e12) == pytest.approx(0.024)
    assert scaling.floor(1000, 1000, 8192, 1e9, 1e12) == pytest.approx(0.049152)


def test_a_training_ends_at_its_goal(run):
    task = train.tutorial(points=200)._replace(goal=float("inf"), chunk=3)
    found = train.measure(run, {"at once": task, "never": task._replace(goal=0.0, chunks=2)})
    for name in QUICK:
        once, never = found["at once"][name], found["never"][name]
        assert once["reached"] and once["steps"] == 3 and once["seconds"] >= 3 * once["median"] * 0.99
        assert not never["reached"] and never["steps"] == 6


def test_results_of_all_sections_are_one_file(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "SECTIONS", {"step": SimpleNamespace(measure=lambda run: step.measure(
        run, [(3, 4, 5)], [])), "predict": SimpleNamespace(measure=lambda run: predict.measure(
            run, [((3, 4), 5, 6)]))})
    suite.measure(["predict"], run, {}, tmp_path)
    record, path = suite.measure(["step"], run, {"blitz": "ModuleNotFoundError: none"}, tmp_path)
    assert path.parent == tmp_path and json.loads(path.read_text()) == record
    assert set(record["sections"]) == {"step", "predict"}
    where = record["sections"]["step"]["environment"]
    assert where.keys() == {"date", "commit", "torch", "cpu", "threads", "load"}
    cases = record["sections"]["step"]["settings"]["3 x 4, batch 5"]
    shown = suite.show(record)
    assert re.search(rf"step: 3 x 4, batch 5 .* ms +{cases['bnn_fast']['ratio']:.2f} ", shown)
    assert "absent: blitz: ModuleNotFoundError: none" in shown
    assert f"{1e3 * cases['bnn_fast']['median']:.3f} ms" in harness.show(record["sections"]["step"])


def record(**ratios: tuple[float, float, float]) -> dict:
    """Of one setting: (median, low, high) of each case, nn.Linear's being about 1; 1 MiB extra."""
    ratios["nn.Linear"] = (1.0, 0.98, 1.02)
    cases = {name: {"median": m, "low": low, "high": high, "ratio": m, "extra": 2 ** 20}
             for name, (m, low, high) in ratios.items()}
    return {"sections": {"step": {"environment": {"cpu": "X", "threads": 2},
                                  "settings": {"3 x 4, batch 5": cases}}}}


def test_compare_finds_what_is_beyond_the_noise():
    old = record(ours=(2.0, 1.9, 2.1), peer=(3.0, 2.9, 3.1))
    assert compare.compare(old, old) == []
    within = record(ours=(2.15, 2.05, 2.25), peer=(2.9, 2.8, 2.95))
    assert compare.compare(old, within) == []
    rows = compare.compare(old, record(ours=(2.4, 2.3, 2.5), peer=(2.4, 2.3, 2.5)))
    assert [(row[0].split(": ")[-1], row[3]) for row in rows] == [
        ("ours", "20 % slower"), ("peer", "20 % faster")]
    assert compare.worse(rows) and not compare.worse(rows[1:])
    base = record(ours=(2.2, 2.1, 2.3))
    base["sections"]["step"]["settings"]["3 x 4, batch 5"]["nn.Linear"]["high"] = 1.3
    assert compare.compare(record(ours=(1.8, 1.7, 1.9)), record(ours=(2.2, 2.1, 2.3))) != []
    assert compare.compare(record(ours=(1.8, 1.7, 1.9)), base) == []  # nn.Linear's noise is the ratio's too
    more = record(ours=(2.0, 1.9, 2.1))
    more["sections"]["step"]["settings"]["3 x 4, batch 5"]["ours"]["extra"] *= 2
    assert [row[3] for row in compare.compare(old, more)] == ["more memory"]


def test_compare_finds_a_planted_slowdown(run, tmp_path, capsys):
    for name, seconds in (("old", 0.005), ("again", 0.005), ("new", 0.03)):
        cases = measure.compare({"nn.Linear": lambda: lambda: time.sleep(0.005),
                                 "ours": lambda: lambda: time.sleep(seconds)}, run._replace(rounds=9))
        found = harness.results("step", {"asleep": cases}, "nn.Linear", {})
        harness.save({"sections": {"step": found}}, tmp_path / name)
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "again")]) == 0
    assert "nothing got faster or slower" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert re.search(r"step: asleep: ours .* % slower", capsys.readouterr().out)


def test_plots_of_a_file(run, tmp_path, monkeypatch):
    assert all(rate > 1e5 for rate in scaling.rates(run, size=64, elements=2 ** 16))
    monkeypatch.setattr(scaling, "rates", lambda run: (1e10, 1e11))
    pytest.importorskip("matplotlib")
    sections = {"step": step.measure(run, [(3, 4, 5)], []),
                "memory": memory.measure(run, [(3, 4, 5)], [1, 2]),
                "scaling": scaling.measure(run, [(32, 32, 32), (64, 64, 32), (1024, 1024, 1)])}
    assert sections["scaling"]["32 x 32, batch 32"]["floor"]["floor"] > 0
    found = {"sections": {name: harness.results(name, settings, "nn.Linear", {})
                          for name, settings in sections.items()}}
    harness.save(found, tmp_path / "machine.json")
    assert main(["plot", str(tmp_path / "machine.json")]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "machine_memory.png", "machine_scaling.png", "machine_step.png"]
    harness.save({"benchmark": "gpu"}, tmp_path / "other.json")
    assert plot.draw(tmp_path / "other.json") == []


def test_the_command_line(tmp_path, capsys):
    assert main(["step", "--providers", "nobody"]) == 1
    assert "given nobody" in capsys.readouterr().err


def test_the_step_leaves_all_gradients():
    layer = bf.VariationalLinear(3, 4)
    run = step.step(layer, bf.kl_divergence, 3, 4, 5)
    run()
    first = layer.weight_mu.grad
    run()
    assert layer.weight_mu.grad is not first  # set to None in between, not added to
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
