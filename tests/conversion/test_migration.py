"""README's migration table: each line of another library and the line that stands beside it are run and compared."""
from __future__ import annotations

import copy
import importlib
import re

import pytest
import torch
from test_recipes import README, run_readme
from torch import nn

import bnn_fast as bf

from .peers import fill, library

HEADING = "From another library"
X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.randn(6, 2, generator=torch.Generator().manual_seed(1))


def rows() -> dict[tuple[str, str], str]:
    """{(library, their line): our line}."""
    section, found, name = re.search(rf"^### {HEADING}\n(.*?)^###? ", README, re.MULTILINE | re.DOTALL)[1], {}, ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and "`" in cells[0]:
            new = re.match(r"\*\*(.*?)\*\*", cells[0])
            name = new[1] if new else name
            found[name, re.search("`(.*?)`", cells[0])[1]] = re.search("`(.*?)`", cells[1])[1]
    return found


ROWS = rows()
PEERS = {"bayesian-torch": "bayesian_torch", "torchbnn": "torchbnn", "blitz": "blitz", "torch-uncertainty": "torch_uncertainty"}


def names(peer: str) -> dict:
    """What their lines take from their library, and a model of 4 inputs and 2 outputs."""
    lib = library(PEERS[peer])
    make = {"bayesian-torch": lambda i, o: lib.LinearReparameterization(i, o), "torchbnn": lambda i, o: lib.BayesLinear(0.0, 1.0, i, o),
            "blitz": lambda i, o: lib.BayesianLinear(i, o, prior_sigma_1=1.0), "torch-uncertainty": lambda i, o: lib.BayesLinear(i, o)}[peer]
    torch.manual_seed(0)

    class Model(nn.Sequential):
        pass

    found = {"model": Model(make(4, 3), nn.Tanh(), make(3, 2)), "x": X, "y": Y, "n": 6, "torch": torch, "nn": nn,
             "criterion": nn.MSELoss(reduction="mean"), "likelihood": bf.Gaussian(1.0)}
    for layer in (found["model"][0], found["model"][2]):
        fill(layer)
        layer.dnn_to_bnn_flag = True
    if peer == "bayesian-torch":
        conversion = importlib.import_module("bayesian_torch.models.dnn_to_bnn")
        found |= {"LinearReparameterization": lib.LinearReparameterization, "get_kl_loss": conversion.get_kl_loss, "layer": make(4, 3),
                  "dnn_to_bnn": conversion.dnn_to_bnn, "parameters": {
                      "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0,
                      "type": "Reparameterization", "moped_enable": True, "moped_delta": 0.5}}
    if peer == "torchbnn":
        found |= {"BayesLinear": lib.BayesLinear, "BKLLoss": lib.BKLLoss,
                  "freeze": importlib.import_module("torchbnn.utils.freeze_model").freeze}
    if peer == "blitz":
        found["BayesianLinear"] = lib.BayesianLinear
        importlib.import_module("blitz.utils").variational_estimator(Model)
    if peer == "torch-uncertainty":
        found["BayesLinear"] = lib.BayesLinear
    return found


def both(peer: str, line: str) -> tuple[dict, dict]:
    """The names after their line has been run, and after ours; the result is called `_`."""
    theirs = names(peer)
    model = theirs["model"] if "dnn_to_bnn" not in line else nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    ours = {**theirs, "bf": bf, "model": copy.deepcopy(model) if "dnn_to_bnn" in line else bf.import_from(model)}
    if "layer" in theirs:
        ours["layer"] = bf.import_from(theirs["layer"])
    theirs["model"] = model
    for code, found in ((line, theirs), (ROWS[peer, line], ours)):
        exec(code if " = " in code.partition("(")[0] else f"_ = {code}", found)
    return theirs, ours


def a_new_layer(theirs: dict, ours: dict) -> None:
    found, expected = ours["_"], bf.import_from(theirs["_"])
    assert found.prior == expected.prior == found.bias_prior == expected.bias_prior and found.scale == expected.scale
    assert found.weight_mu.shape == expected.weight_mu.shape
    torch.testing.assert_close(found.weight_sigma.mean(), expected.weight_sigma.mean(), rtol=0.05, atol=0.0)
    torch.testing.assert_close(found.weight_mu.std(), expected.weight_mu.std(), rtol=0.2, atol=0.0)


def mean_of_each(theirs: dict, ours: dict) -> None:
    expected = sum(kl.mean() for kl in bf.kl_divergence(ours["model"], "none").values())
    torch.testing.assert_close(theirs["_"], expected)
    torch.testing.assert_close(ours["_"], bf.kl_divergence(ours["model"]))


def a_loss(theirs: dict, ours: dict) -> None:
    assert theirs["_"].shape == ours["_"].shape == () and theirs["_"].isfinite() and ours["_"].isfinite()


def the_means(theirs: dict, ours: dict) -> None:
    with ours["_"], torch.no_grad():
        torch.testing.assert_close(ours["model"](X), theirs["model"](X))


def one_draw(theirs: dict, ours: dict) -> None:
    for model in (theirs["model"], ours["model"]):
        assert torch.equal(model(X), model(X))
    bf.unfreeze(ours["model"])
    assert not torch.equal(ours["model"](X), ours["model"](X))


def moped(theirs: dict, ours: dict) -> None:
    found, expected = ours["_"][0], bf.import_from(theirs["model"])[0]
    assert torch.equal(found.weight_mu, expected.weight_mu) and found.prior == bf.Normal(0.0, 1.0) == expected.prior
    torch.testing.assert_close(found.weight_sigma, expected.weight_sigma, rtol=1e-4, atol=1e-6)


def predictions(theirs: dict, ours: dict) -> None:
    mean, std = theirs["_"]
    found = ours["found"]
    assert mean.shape == found.mean.shape and ((mean - found.mean).abs() < 6 * found.std / 10 ** 0.5).all()
    torch.testing.assert_close(std, found.std, rtol=0.5, atol=0.0)


def without_kl(theirs: dict, ours: dict) -> None:
    assert theirs["y"].shape == ours["y"].shape == (6, 3) and theirs["kl"].shape == ()


CHECKS = {"LinearReparameterization": a_new_layer, "y, kl": without_kl, "get_kl_loss": mean_of_each, "dnn_to_bnn": moped,
          "BayesLinear": a_new_layer, "BKLLoss": lambda theirs, ours: torch.testing.assert_close(theirs["_"][0], ours["_"]),
          "freeze": one_draw,
          "BayesianLinear": a_new_layer, "model.sample_elbo": a_loss, "model.freeze_": the_means, "model.mfvi_forward": predictions,
          "ELBOLoss": None}


@pytest.mark.parametrize("peer, line", ROWS, ids=str)
def test_each_row(peer, line):
    check = next(check for start, check in CHECKS.items() if re.match(rf"{re.escape(start)}\b", line))
    if check is None:
        pytest.skip("their loss needs lightning, which the tests do not install")
    check(*both(peer, line))


def test_every_library_has_rows():
    assert {peer for peer, _ in ROWS} == set(PEERS) and len(ROWS) == 13


def test_the_two_lines(tmp_path, monkeypatch):
    theirs = names("torchbnn")["model"]
    monkeypatch.chdir(tmp_path)
    torch.save(theirs.state_dict(), "theirs.pt")
    model = run_readme(HEADING, theirs=theirs)["model"]
    assert torch.equal(model[2].weight_mu, theirs[2].weight_mu)
