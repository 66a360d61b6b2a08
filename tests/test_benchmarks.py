from __future__ import annotations

import json
import time

import pytest
import torch

import bnn_fast as bf
from benchmarks import harness, step
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


def test_a_quick_case_is_called_several_times_a_round():
    calls = []
    times = interleaved({"quick": lambda: calls.append(1)}, seconds=0.0, rounds=5)
    assert len(calls) > 100 and times["quick"].median < 1e-4


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


def test_step_results_and_file(tmp_path):
    found = harness.results("step", step.measure([(3, 4, 5)], seconds=0.0), base="nn.Linear")
    harness.save(found, str(tmp_path / "new" / "step.json"))
    read = json.loads((tmp_path / "new" / "step.json").read_text())
    assert read["environment"].keys() == {"date", "commit", "torch", "cpu", "threads"}
    cases = read["settings"]["3 x 4, batch 5"]
    assert list(cases) == ["nn.Linear", "VariationalLinear", "plain PyTorch"]
    for t in cases.values():
        assert t["ratio"] == pytest.approx(t["median"] / cases["nn.Linear"]["median"])
    shown = harness.show(found)
    assert "3 x 4, batch 5" in shown and f"{1e3 * cases['plain PyTorch']['median']:.3f} ms" in shown


def test_the_step_leaves_all_gradients():
    layer = bf.VariationalLinear(3, 4)
    run = step.step(layer, lambda: bf.kl_divergence(layer), 3, 4, 5)
    run()
    first = layer.weight_mu.grad
    run()
    assert layer.weight_mu.grad is not first  # set to None in between, not added to
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
