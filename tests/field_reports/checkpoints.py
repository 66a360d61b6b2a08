"""What saved numbers mean: the scale and the priors of numbers travel with the parameters."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from common import network
from torch import nn

import bnn_fast as bf


def test_numbers_of_another_scale_or_prior_are_refused():
    state = network(scale="exp").state_dict()
    with pytest.raises(ValueError, match=r"0\.meaning: expected parameters of a layer with scale='softplus'(.|\n)*scale='exp'"):
        network().load_state_dict(state)
    state = network(prior=bf.Normal(0.0, 0.5)).state_dict()
    with pytest.raises(ValueError, match=r"prior N\(0, 1\^2\)(.|\n)*prior N\(0, 0\.5\^2\)"):
        network().load_state_dict(state)


@pytest.mark.parametrize("assign", [True, False])
def test_the_same_meaning_loads(assign):
    options = dict(scale="sqrt_exp", prior=bf.Normal(0.1, 2.0))
    saved, other = network(**options), network(seed=1, **options)
    keys = other.load_state_dict(saved.state_dict(), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(bf.kl_divergence(saved), bf.kl_divergence(other))


def test_checkpoints_without_their_meaning_still_load():
    saved = network()
    old = {name: value for name, value in saved.state_dict().items() if not name.endswith("meaning")}
    other = network(seed=1)
    other.load_state_dict(old, strict=True)
    assert torch.equal(bf.kl_divergence(saved), bf.kl_divergence(other))


@pytest.mark.parametrize("change", [lambda t: t.half() if t.is_floating_point() else t, lambda t: t.clone(), lambda t: t.float()])
def test_a_state_in_another_type_is_the_same(change):
    saved = network(dtype=torch.float32, prior=bf.Normal(0.25, 0.3))
    state = {name: change(value) for name, value in saved.state_dict().items()}
    network(dtype=torch.float32, seed=1, prior=bf.Normal(0.25, 0.3)).load_state_dict(state)
    with pytest.raises(ValueError, match="meaning"):
        network(dtype=torch.float32, prior=bf.Normal(0.25, 0.4)).load_state_dict(state)


def test_it_is_no_parameter_and_no_buffer():
    model = network()
    assert not any("meaning" in name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half()):
        assert [name for name in other.state_dict() if name.endswith("meaning")] == ["0.meaning", "2.meaning", "4.meaning"]
        assert other.state_dict()["0.meaning"].dtype == torch.float64


def test_tensor_priors_are_their_own_meaning():
    def layer(scale):
        prior = bf.Normal(torch.zeros(2, 3), torch.full((2, 3), scale))
        return bf.VariationalLinear(3, 2, prior=prior, bias_prior=bf.Normal(0.0, 1.0))

    saved, other = layer(0.5), layer(2.0)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.prior.scale, saved.prior.scale)


def test_safetensors_takes_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = network()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    network(seed=1).load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="meaning"):
        network(scale="exp").load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))


def test_a_prior_that_is_set_later_is_saved():
    model = nn.Sequential(bf.VariationalLinear(3, 2))
    model[0].prior = bf.Normal(0.0, 3.0)
    other = nn.Sequential(bf.VariationalLinear(3, 2))
    with pytest.raises(ValueError, match="meaning"):
        other.load_state_dict(model.state_dict())
    other[0].prior = bf.Normal(0.0, 3.0)
    other.load_state_dict(model.state_dict())
