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


def classes(n: int, centres, seed: int):
    """Points around centres [C, 2], some of which overlap, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(len(centres), (n,), generator=generator)
    return torch.tensor(centres)[y] + torch.randn(n, 2, generator=generator), y


def classifier(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(bf.VariationalLinear(2, 16), nn.ReLU(), bf.VariationalLinear(16, outputs))


def fit(elbo, x, y, steps: int = 150):
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(x, y).backward()
        optimizer.step()


def test_rejecting_at_a_wanted_risk():
    centres = ((0.0, 0.0), (2.0, 0.0), (0.0, 4.0))
    (train_x, train_y), (held_out_x, held_out_y), (x, y) = (classes(600, centres, seed) for seed in (0, 1, 2))
    model = classifier(3)
    fit(bf.ELBO(model, bf.Categorical(), 600), train_x, train_y)
    names = run_readme("Rejecting at a wanted risk", model=model, held_out_x=held_out_x, held_out_y=held_out_y, x=x, wanted=0.05)
    wrong, sure = names["found"].probs.argmax(-1) != y, names["sure"]
    assert wrong.float().mean() > 0.08 and wrong[sure].float().mean() < 0.08 and sure.float().mean() > 0.3
    on_held_out = bf.predict(model, held_out_x, bf.Categorical(), n_samples=50, seed=0).probs
    taken = on_held_out.amax(-1) >= names["threshold"]
    assert (on_held_out.argmax(-1) != held_out_y)[taken].float().mean() <= 0.05


def test_thompson_sampling():
    """Of choices c with the reward 1.6 c - c^2 and noise, which is the highest at 0.8."""
    torch.manual_seed(0)
    at = torch.linspace(-2.0, 2.0, 41)
    candidates = torch.stack([at, at.square()], dim=1)

    def reward(choice):
        return 1.6 * choice[:1] - choice[1:] + 0.1 * torch.randn(1)

    x = candidates[[0, 10]]
    names = run_readme("Thompson sampling", model=bf.VariationalLinear(2, 1, prior=bf.Normal(0.0, 2.0), init_sigma=0.5), candidates=candidates,
                       reward=reward, x=x, y=torch.stack([reward(c) for c in x]), rounds=15,
                       train=lambda model, x, y: fit(bf.ELBO(model, bf.Gaussian(0.1), len(x)), x, y))
    choices = names["x"][:, 0]
    assert len(choices) == 17 and (choices[-5:] - 0.8).abs().mean() < 0.3
    assert len(choices[2:].unique()) > 1  # it does not settle at once


def test_continual_learning():
    tasks = [classes(300, ((-3.0, 0.0), (-3.0, 4.0)), 0), classes(300, ((3.0, 4.0), (3.0, 0.0)), 1)]

    def accuracy(model) -> float:
        x, y = tasks[0]
        return (bf.predict(model, x, bf.Categorical(), 30, seed=0).probs.argmax(-1) == y).float().mean().item()

    def train(elbo, x, y):
        fit(elbo, x, y, 400)

    model, forgetful = classifier(2), classifier(2)
    run_readme("Continual learning", model=model, tasks=tasks, train=train)
    for x, y in tasks:
        train(bf.ELBO(forgetful, bf.Categorical(), n_data=len(x)), x, y)
    assert bf.kl_divergence(model).item() == pytest.approx(0.0, abs=1e-3)
    assert accuracy(model) > accuracy(forgetful) + 0.05


def test_active_learning():
    x, y = classes(400, ((0.0, 0.0), (5.0, 0.0), (0.0, 5.0), (5.0, 5.0)), 0)
    model, labelled = classifier(4), (y < 2).nonzero().squeeze(1)[:6]    # two classes have not been seen
    names = run_readme("Active learning", model=model, x=x, y=y, labelled=labelled, rounds=4, few=6,
                       train=lambda model, x, y: fit(bf.ELBO(model, bf.Categorical(), len(x)), x, y, 150))
    asked = names["labelled"][6:]
    assert len(names["labelled"].unique()) == 30 and set(y[asked].tolist()) >= {2, 3}
