"""What README recommends, run as it stands there."""
from __future__ import annotations

import copy
import pathlib
import re

import pytest
import torch
from torch import nn

import bnn_fast as bf

README = (pathlib.Path(__file__).resolve().parents[1] / "README.md").read_text()


def run_readme(heading: str, **names) -> dict:
    """Executes the code under a heading of README's with these names; returns all names after it."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ [A-Z]|\Z)", README, re.MULTILINE | re.DOTALL)[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names |= {"bf": bf, "torch": torch, "nn": nn}
    exec(compile(code, f"README.md, {heading}", "exec"), names)
    return names


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(bf.VariationalLinear(3, 5), nn.Tanh(), bf.VariationalLinear(5, 2))


def test_what_loss_to_expect_at_first():
    torch.manual_seed(0)
    model = nn.Sequential(bf.VariationalLinear(64, 256), nn.ReLU(), bf.VariationalLinear(256, 10))
    assert bf.kl_divergence(model).item() == pytest.approx(86_778, rel=0.001)
    assert bf.kl_divergence(model, "mean").item() == pytest.approx(4.5, abs=0.05)


def test_weight_decay_leaves_rho_alone(model):
    optimizer = run_readme("Two traps", model=model)["optimiser"]
    without, decayed = (group["params"] for group in optimizer.param_groups)
    rhos = {name: p for name, p in model.named_parameters() if "rho" in name}
    assert len(without) == len(rhos) == len(decayed) == 4 and {id(p) for p in without} == {id(p) for p in rhos.values()}
    nn.init.ones_(model[0].bias_mu), nn.init.ones_(model[2].bias_mu)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (name, old), new in zip(before.named_parameters(), model.parameters()):
        assert torch.equal(old, new) == ("rho" in name), name


def test_decay_on_rho_and_a_tiny_sigma_are_traps():
    def sigma(rho: float, decay: float, steps: int) -> float:
        torch.manual_seed(0)
        x = torch.rand(256, 8)
        model = bf.VariationalLinear(8, 1)
        with torch.no_grad():
            model.weight_rho.fill_(rho)
        elbo = bf.ELBO(model, bf.Gaussian(0.1), 256)
        optimizer = torch.optim.AdamW(elbo.parameters(), lr=0.1, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            elbo(x, x.sum(1, keepdim=True)).backward()
            optimizer.step()
        return model.weight_sigma.mean().item()

    assert sigma(-5.0, 0.5, 50) > 4 * sigma(-5.0, 0.0, 50)
    assert sigma(-12.0, 0.0, 30) < 0.1 * sigma(-5.0, 0.0, 30)


def test_ensembles(model, tmp_path):
    """Averaged predictions, averaged parameters, a saved draw."""
    x = torch.randn(7, 3)
    draws = [bf.draw(model, seed=1, first_sample=s) for s in range(300)]
    torch.testing.assert_close(bf.predict(model, x, n_samples=300, seed=1).mean, sum(network(x) for network in draws) / 300)
    averaged = torch.optim.swa_utils.AveragedModel(draws[0])
    for network in draws:
        averaged.update_parameters(network)
    means = bf.draw(model, mean=True)
    for name, parameter in averaged.module.named_parameters():
        at, kind = name.split(".")
        bound = 5 * getattr(model[int(at)], f"{kind}_sigma") / 300 ** 0.5
        assert ((parameter - means.get_parameter(name)).abs() <= bound).all()
    latest = torch.optim.swa_utils.AveragedModel(model)
    latest.update_parameters(model)
    torch.testing.assert_close(bf.kl_divergence(latest), bf.kl_divergence(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        network = run_readme("Ensembles", model=model)["network"]
    plain = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    plain.load_state_dict(torch.load(tmp_path / "draw.pt"))
    assert torch.equal(plain(x), network(x)) and torch.equal(plain(x), bf.draw(model, seed=7)(x))


@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx(model, tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    run_readme("Export", model=model, x=torch.randn(4, 3))
    x = torch.randn(9, 3)  # another number of rows
    for file, expected in (("draws.onnx", bf.mc_forward(model, x, 20, seed=0)), ("means.onnx", bf.draw(model, mean=True)(x))):
        session = runtime.InferenceSession(file)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected.detach())
