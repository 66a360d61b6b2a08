"""Schedules of the KL's weight: saved, resumed and compiled with the ELBO that has them."""
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from common import needs_extension, network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import bnn_fast as bf

SCHEDULES = [bf.linear_warmup(7), bf.blundell_weights(3)]
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
Y = torch.zeros(6, 2, dtype=torch.float64)


def elbo_of(kl_weight, model=None):
    return bf.ELBO(network() if model is None else model, bf.Gaussian(0.5), 100, kl_weight)


def weight_of(elbo, loss):
    """The weight that the KL had in a loss."""
    return ((loss.detach() - elbo.nll) / elbo.kl * 100).item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_compare_print_and_pickle(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == copy.deepcopy(schedule) and again is not schedule
    assert eval(repr(schedule), vars(bf)) == schedule != bf.linear_warmup(8)
    with pytest.raises(AttributeError):
        schedule.steps = 1


@pytest.mark.parametrize("schedule", [*SCHEDULES, bf.blundell_weights(10 ** 6)], ids=repr)
def test_schedules_on_tensors(schedule):
    steps = torch.arange(2500)
    expected = torch.tensor([schedule(int(step)) for step in steps], dtype=torch.float64)
    torch.testing.assert_close(schedule(steps), expected, rtol=1e-15, atol=1e-300)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_whole_elbo_is_saved(schedule):
    elbo = elbo_of(schedule)
    for _ in range(5):
        elbo(X, Y)
    buffer = io.BytesIO()
    torch.save(elbo, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), copy.deepcopy(elbo)):
        assert again.step == 5 and weight_of(again, again(X, Y)) == pytest.approx(schedule(5))
        assert again.step == 6
    assert elbo.step == 5, "each counts by itself"


def test_training_resumes_at_the_step_where_it_stopped(tmp_path):
    elbo = elbo_of(bf.linear_warmup(100))
    for _ in range(80):
        elbo(X, Y)
    torch.save(elbo.state_dict(), tmp_path / "elbo.pt")
    other = elbo_of(bf.linear_warmup(100))
    other.load_state_dict(torch.load(tmp_path / "elbo.pt", weights_only=True), strict=True)
    assert other.step == 80 and weight_of(other, other(X, Y)) == pytest.approx(0.81)
    whole = nn.ModuleDict({"elbo": elbo_of(bf.linear_warmup(100))})  # as a submodule, as under Lightning
    state = whole.state_dict()
    state["elbo.step"] = torch.tensor(7)
    assert not any(whole.load_state_dict(state)) and whole["elbo"].step == 7
    assert state["elbo.step"] == 7, "what was given is left as it was"


def test_the_steps_number_is_a_tensor_for_safetensors(tmp_path):
    torch_format = pytest.importorskip("safetensors.torch")
    elbo = elbo_of(bf.linear_warmup(10))
    elbo.step = 4
    torch_format.save_file(elbo.state_dict(), tmp_path / "elbo.safetensors")
    other = elbo_of(bf.linear_warmup(10))
    other.load_state_dict(torch_format.load_file(tmp_path / "elbo.safetensors"))
    assert other.step == 4


def test_checkpoints_without_a_step_load():
    elbo = elbo_of(bf.linear_warmup(10))
    elbo.step = 3
    state = elbo.state_dict()
    assert state.pop("step").dtype == torch.int64
    assert not any(elbo.load_state_dict(state, strict=True)) and elbo.step == 3


def test_step_may_be_set():
    elbo = elbo_of(bf.linear_warmup(10))
    elbo.step = 5
    assert weight_of(elbo, elbo(X, Y)) == pytest.approx(0.6) and elbo.step == 6 and type(elbo.step) is int
    for bad, error in ((1.5, TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="step: expected"):
            elbo.step = bad
    assert elbo.to(torch.float64).step == 6 and "step" not in dict(elbo.named_buffers())


@needs_extension
@pytest.mark.parametrize("kl_weight", [*SCHEDULES, lambda step: 0.1 * (step + 1)], ids=["warmup", "blundell", "own"])
def test_a_compiled_step_compiles_once(kl_weight):
    torch._dynamo.reset()
    elbo = elbo_of(kl_weight)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(elbo, backend=backend, fullgraph=True)
    for step in range(12):
        loss = compiled(X, Y)
        loss.backward()
        assert loss.dtype == torch.float64 and weight_of(elbo, loss) == pytest.approx(kl_weight(step), abs=1e-6)
    assert backend.frame_count == 1 and elbo.step == 12
    assert weight_of(elbo, elbo(X, Y)) == pytest.approx(kl_weight(12), abs=1e-6), "eager goes on from there"
    elbo.step = 1
    assert weight_of(elbo, compiled(X, Y)) == pytest.approx(kl_weight(1), abs=1e-6) and backend.frame_count == 1


@needs_extension
def test_a_compiled_step_of_float32_stays_float32():
    torch._dynamo.reset()
    elbo = elbo_of(bf.blundell_weights(4), network(dtype=torch.float32))
    loss = torch.compile(elbo, backend="aot_eager", fullgraph=True)(X.float(), Y.float())
    assert loss.dtype == torch.float32


@needs_extension
def test_predict_of_a_compiled_model_over_many_sizes():
    """Each number of draws in a call is compiled anew: there are few of them, and the draws do not change."""
    torch._dynamo.reset()
    model = network()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (7, 8, 1, 30, 100, 900, 5000, 64):
        for n_samples in (100, 3, 20):
            x = torch.randn(rows, 3, dtype=torch.float64)
            found = bf.predict(compiled, x, n_samples=n_samples, seed=1)
            torch.testing.assert_close(found.samples, bf.predict(model, x, n_samples=n_samples, seed=1).samples)
    assert backend.frame_count <= 6
    model.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    assert bf.predict(model, x, n_samples=19, seed=1).samples.shape == (19, 64, 2)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_an_elbo_is_copied_after_a_transform(transform):
    """What it keeps of the pass is not a wrapper that died with the transform."""
    elbo = elbo_of(bf.linear_warmup(10))
    parameters = {name: p.detach() for name, p in elbo.named_parameters()}

    def loss(parameters, x=X):
        return torch.func.functional_call(elbo, parameters, (x, Y))

    if transform == "grad":
        torch.func.grad(loss)(parameters)
    elif transform == "vmap":
        torch.vmap(lambda x: loss(parameters, x), randomness="different")(torch.stack([X, X]))
    else:
        try:
            torch.func.jvp(lambda x: loss(parameters, x), (X,), (torch.ones_like(X),))
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"no forward mode: {str(error)[:60]}")
    assert elbo.nll.isfinite().all() and not torch._C._functorch.is_functorch_wrapped_tensor(elbo.nll)
    again = copy.deepcopy(elbo)
    assert again.step == elbo.step == 1
    torch.testing.assert_close((again.nll, again.kl), (elbo.nll, elbo.kl))
    pickle.dumps(elbo)
