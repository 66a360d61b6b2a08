"""Pruning by signal to noise: which weights go, that they stay away, and that what is left still predicts."""
from __future__ import annotations

import copy
import math

import pytest
import torch
from common import network, twin  # noqa: F401
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnn_fast as bf


def pruned_of(model: nn.Module) -> list[torch.Tensor]:
    return [p == -math.inf for name, p in model.named_parameters() if name.endswith("rho")]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(torch.randn(6, 3, dtype=torch.float64)).square().sum() + bf.kl_divergence(model)).backward()
    optimizer.step()


def test_signal_to_noise_is_mu_over_sigma_by_name(twin):
    model = network(scale="exp")
    found = bf.signal_to_noise(model)
    assert list(found) == list(bf.kl_divergence(model, "none")) == ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]
    torch.testing.assert_close(found["2.weight"], model[2].weight_mu.detach().abs() / model[2].weight_rho.detach().exp())
    assert not found["0.weight"].requires_grad


def test_the_lowest_are_pruned_over_the_whole_model(twin):
    model = network()
    before = torch.cat([ratio.flatten() for ratio in bf.signal_to_noise(model).values()])
    count = bf.prune(model, 0.5)
    assert count == round(0.5 * len(before))
    now = torch.cat([ratio.flatten() for ratio in bf.signal_to_noise(model).values()])
    assert (now == 0).sum() == count and now[now > 0].min() >= before[now == 0].max()
    assert torch.equal(now[now > 0], before[now > 0])
    assert bf.prune(model, 0.5) == count, "again changes nothing"
    for layer in model[::2]:
        gone = layer.weight_rho == -math.inf
        assert not layer.weight_mu[gone].any()
        drawn = bf.draw(layer, 1).weight
        assert not drawn[gone].any() and drawn[~gone].all()


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (1.0, 50)])
def test_nothing_and_everything(fraction, count):
    model = network()
    assert bf.prune(model, fraction) == count
    assert model(torch.zeros(2, 3, dtype=torch.float64)).isfinite().all() and bf.kl_divergence(model).isfinite()


@pytest.mark.parametrize("fraction, error", [(-0.1, ValueError), (1.5, ValueError), (math.nan, ValueError), ("half", TypeError),
                                             (True, TypeError), (torch.tensor(0.5), TypeError)])
def test_what_is_no_fraction_is_refused(fraction, error):
    with pytest.raises(error, match="fraction: expected a number from 0 to 1, given"):
        bf.prune(network(), fraction)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "AMSGrad": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("told", [True, False])
def test_pruned_weights_stay_pruned_in_training(make, told):
    model = network()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    bf.prune(model, 0.6, optimizer if told else None)
    expected = pruned_of(model)
    others = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        step(model, optimizer)
        bf.check_parameters(model)
        for found, mask in zip(pruned_of(model), expected):
            assert torch.equal(found, mask)
        for layer in model[::2]:
            assert not layer.weight_mu[layer.weight_rho == -math.inf].any()
    assert not all(torch.equal(p, before) for p, before in zip(model.parameters(), others)), "the others learn"
    if told:
        gone = model[0].weight_rho == -math.inf
        for parameter in (model[0].weight_mu, model[0].weight_rho):
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == gone.shape:
                    assert value.isfinite()[~gone].all()


def test_momentum_is_forgotten_where_a_weight_goes():
    model = network()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    step(model, optimizer)
    bf.prune(model, 0.6, optimizer)
    gone = model[0].weight_rho == -math.inf
    for parameter in (model[0].weight_mu, model[0].weight_rho):
        for name in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[parameter][name]
            assert not value[gone].any() and value[~gone].all()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averaged_parameters_have_no_nan(average):
    model = network()
    bf.prune(model, 0.5)
    averaged = AveragedModel(model, multi_avg_fn=average)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        step(model, optimizer)
        averaged.update_parameters(model)
    assert bf.kl_divergence(averaged).isfinite()
    assert averaged(torch.randn(2, 3, dtype=torch.float64)).isfinite().all()
    state = averaged.state_dict()
    assert not any(value.isnan().any() for name, value in state.items() if name.endswith(("mu", "rho")))
    for found, mask in zip(pruned_of(averaged.module), pruned_of(model)):
        assert torch.equal(found, mask)


@pytest.mark.parametrize("how", ["deepcopy", "load", "load, assign", "pickle"])
def test_copies_and_loaded_models_stay_pruned(how, tmp_path):
    model = network()
    bf.prune(model, 0.5)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = network(seed=1)
        other.load_state_dict(torch.load(tmp_path / "state.pt"), assign=how.endswith("assign"))
    expected = pruned_of(model)
    optimizer = OPTIMIZERS["SGD"](other.parameters())
    for _ in range(2):
        step(other, optimizer)
    for found, mask in zip(pruned_of(other), expected):
        assert torch.equal(found, mask)
    bf.check_parameters(other)


def test_an_unpruned_state_loaded_into_a_pruned_model_is_unpruned():
    model, whole = network(), network()
    bf.prune(model, 0.5)
    model.load_state_dict(whole.state_dict())
    step(model, torch.optim.SGD(model.parameters(), 0.01))
    assert not any(mask.any() for mask in pruned_of(model))


def test_shared_parameters_are_pruned_once():
    layer = bf.VariationalLinear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    assert list(bf.signal_to_noise(model)) == ["0.weight", "0.bias"]
    assert bf.prune(model, 0.5) == 10


def test_pruning_the_digits_costs_little():
    """The bundled digits, trained briefly: half of the weights carry next to nothing."""
    from bnn_fast.demos import digits, digits_data
    train_x, train_y, test_x, test_y = digits_data.bundled()
    torch.manual_seed(0)
    model = digits.network(bf.VariationalLinear, train_x.shape[1], 64)
    digits.train(model, train_x, train_y, 64, 15, "digits")
    errors = digits.pruned_errors(model, test_x, test_y, draws=20, seed=0)
    assert list(errors) == [0.0, 0.5, 0.75, 0.95, 0.98]
    assert errors[0.5] <= errors[0.0] + 0.02 and errors[0.98] > errors[0.5]
    assert not any(mask.any() for mask in pruned_of(model)), "the model itself stays whole"
