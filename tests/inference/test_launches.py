"""What a training step launches on a GPU: counted as the operators that a CPU runs, each of which would be a kernel there; in
tests/test_cuda.py by a GPU's own profiler.
"""
from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from common import needs_nodes
from torch import nn

import bnn_fast as bf
from benchmarks.launches import Log

SIZES = (1, 20, 20, 20, 20, 1)
LAYERS = len(SIZES) - 1
OF_A_SMALL_LAYER = {"forward": 1, "backward": 2}    # README, On CUDA
OF_A_CHAIN = {"forward": 2, "backward": 2}    # tests/ptx/test_chain.py


def step(layer) -> tuple[Counter, Counter]:
    """Operators of the forward and of the backward."""
    layers = []
    for sizes in zip(SIZES, SIZES[1:]):
        layers += [layer(*sizes), nn.ReLU()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elbo = bf.ELBO(nn.Sequential(*layers[:-1]), bf.Gaussian(1.0), 100)
    x, y = torch.randn(8, 1), torch.randn(8, 1)
    elbo(x, y).backward()
    for parameter in elbo.parameters():
        parameter.grad = None
    with Log() as forward:
        loss = elbo(x, y)
    with Log() as backward:
        loss.backward()
    return forward.names, backward.names


@needs_nodes
def test_at_most_two_a_layer_each_way():
    """Beside what the deterministic network launches, whose layers are an operator forward and two or more backward."""
    (forward, backward), (plain_forward, plain_backward) = step(bf.VariationalLinear), step(nn.Linear)
    assert forward.pop("_variational_linear") == LAYERS and backward.pop("_variational_linear_backward") == LAYERS
    assert plain_forward.pop("addmm") == LAYERS
    for name in ("mm", "sum", "zeros"):
        plain_forward.pop(name, None), plain_backward.pop(name, None)
    keys_and_kls = forward - plain_forward
    keys_and_kls.pop("sum", None)  # the likelihood's
    assert keys_and_kls.pop("randint") == 1
    assert keys_and_kls == Counter(_sum_values=1)
    beside = 2
    assert LAYERS * OF_A_SMALL_LAYER["forward"] + beside <= 2 * LAYERS
    assert backward - plain_backward == Counter(mul=1)  # the KL's weight, of the loss
    assert LAYERS * OF_A_SMALL_LAYER["backward"] <= 2 * LAYERS


@needs_nodes
def test_at_most_three_each_way_of_a_network_that_is_one_chain():
    """Of keys, KL and layers together; no dispatch mode may see them, so that here torch's profiler counts the operators."""
    layers = [part for pair in zip(SIZES, SIZES[1:]) for part in (bf.VariationalLinear(*pair), nn.ReLU())]
    elbo = bf.ELBO(nn.Sequential(*layers[:-1]), bf.Gaussian(1.0), 100)
    x, y = torch.randn(8, 1), torch.randn(8, 1)

    def own(run) -> Counter:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        return Counter(event.name.split("::_")[1] for event in profile.events() if event.name.startswith("bnn_fast::"))

    losses = []
    assert own(lambda: losses.append(elbo(x, y))) == Counter(variational_chain=1)
    assert own(losses[0].backward) == Counter(variational_chain_backward=1)
    keys, weight_of_the_kl = 1, 1
    assert OF_A_CHAIN["forward"] + keys <= 3 and OF_A_CHAIN["backward"] + weight_of_the_kl <= 3


def test_pinned_draws_take_one_for_all_keys():
    model = nn.Sequential(*(bf.VariationalLinear(3, 3) for _ in range(7)))
    with Log() as log, bf.sampling(model, pinned=True):
        pass
    assert log.names == Counter(randint=1)


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_keys_of_a_model_are_those_of_its_layers_one_by_one(layers):
    model, x = nn.Sequential(*(bf.VariationalLinear(3, 3) for _ in range(layers))), torch.randn(2, 3)
    torch.manual_seed(4)
    one_by_one = model(x)
    torch.manual_seed(4)
    with bf.sampling(model, pinned=True):
        assert torch.equal(model(x), one_by_one)
    torch.manual_seed(4)
    assert torch.equal(bf.mc_forward(model, x, 1)[0], one_by_one)
