"""The whole models of the benchmarks, small."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf
from benchmarks import models, providers
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
    found = models.measure(Run(providers.available(["bnn_fast"])[0], seconds=0.01, rounds=1), batch=2, lstm=(8, 3, 2), draws=5)
    assert [setting.split(",")[0] for setting in found] == ["ResNet-20", "LSTM 2 x 8", "ResNet-20"]
    for cases in found.values():
        assert set(cases) == {"nn.Linear", "bnn_fast"} and all(t["median"] > 0 for t in cases.values())
        assert cases["bnn_fast"]["ratio"] > 0
