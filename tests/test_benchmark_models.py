"""The whole models of the benchmarks, small."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf
from benchmarks import models, networks, providers
from benchmarks.measure import Run
from benchmarks.resnet import ResNet20


def test_resnet20_is_the_papers():
    model = ResNet20()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20 and sum(p.numel() for p in model.parameters()) == 269_722 + 2560
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    variational = ResNet20(conv=bf.VariationalConv2d, linear=bf.VariationalLinear)
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in variational.modules())


@pytest.mark.parametrize("name", ["bnn_fast", "bayesian-torch", "blitz"])
def test_every_library_trains_both_models_and_has_their_kl(name):
    if name in providers.available([name])[1]:
        pytest.skip(f"{name} is not installed")
    for made, x in ((models.networks()[name](), torch.randn(2, 3, 32, 32)), (models.recurrences(8)[name](), torch.randn(2, 3, 8))):
        model, kl = made
        models.step(model, kl, x, lambda model, x: model(x).square().mean())()
        assert kl(model).item() > 0 and sum(p.grad is not None for p in model.parameters()) > 3


def test_the_section():
    found = models.measure(Run(providers.available(["bnn_fast"])[0], seconds=0.01, rounds=1), batch=2, lstm=(8, 3, 2), draws=5,
                           of_tables=((9, False), (7, True)))
    assert [setting.split(",")[0] for setting in found] == ["ResNet-20", "LSTM 2 x 8", "ResNet-20", "Embedding 9 x 64", "Embedding 7 x 64"]
    for setting, cases in found.items():
        others = {"bnn_fast, with the KL"} if setting.startswith("Embedding") else set()
        assert set(cases) == {"nn.Linear", "bnn_fast", *others} and all(t["median"] > 0 for t in cases.values())
        assert cases["bnn_fast"]["ratio"] > 0


REGRESSION, CLASSIFIER = (3, 4, 1), (3, 5, 4, 2)


def small(names: list[str]) -> Run:
    return Run(providers.available(names)[0], seconds=0.01, rounds=1)


def test_networks():
    run = small(["bnn_fast", "plain PyTorch"])
    found = networks.measure(run, [(REGRESSION, 2), (CLASSIFIER, 6)], [(CLASSIFIER, 6)], (3,), [(REGRESSION, 2, 5), (CLASSIFIER, 1, 4)])
    several = "3-5-4-2, batch 6: draws a step, over one draw's"
    assert list(found) == ["3-4-1, batch 2", "3-5-4-2, batch 6", several, "3-4-1, batch 2: predict, 5 draws", "3-5-4-2, batch 1: predict, 4 draws"]
    for setting, cases in found.items():
        expected = {"1 draw", "3 draws"} if setting == several else {"nn.Linear", "bnn_fast", "plain PyTorch"}
        assert set(cases) == expected
        assert not any("error" in t for t in cases.values())
        base = "1 draw" if setting == several else "nn.Linear"
        assert all(t["ratio"] == t["median"] / cases[base]["median"] for t in cases.values())
    found = networks.measure(small([]), [(REGRESSION, 2)], [(REGRESSION, 2)], (3,), [])
    assert list(found) == ["3-4-1, batch 2"]  # several draws are ours alone


@pytest.mark.parametrize("sizes", [REGRESSION, CLASSIFIER])
def test_a_step_of_a_network_trains_it(sizes):
    torch.manual_seed(0)
    for name, provider in small(["bnn_fast"]).providers.items():
        model = provider.model(sizes)
        before = [p.detach().clone() for p in model.parameters()]
        fixed = provider._replace(wrap=lambda _, model=model: model)
        networks.step(fixed, sizes, 6, "cpu")()
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
        drawn = networks.prediction(fixed, sizes, 6, 5, "cpu")()
        if name == "nn.Linear":
            assert (drawn[0] if sizes[-1] == 1 else drawn).shape == (6, sizes[-1])
        else:
            assert drawn.n_samples == 5 and drawn.mean.shape == (6, sizes[-1])


def test_several_draws_a_step_go_through_the_network_together():
    model, rows = nn.Sequential(bf.VariationalLinear(3, 2)), []
    model[0].register_forward_hook(lambda module, inputs, y: rows.append(len(y)))
    provider = small(["bnn_fast"]).providers["bnn_fast"]._replace(wrap=lambda _: model)
    networks.step(provider, (3, 2), 6, "cpu", 5)()
    assert rows == [30]
