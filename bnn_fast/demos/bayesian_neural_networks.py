"""Bayesian neural networks for iris and for a sine, by the tutorial's recipe.

Iris: a plain 4-100-3 classifier beside the Bayesian one, with raw inputs and few steps, where it does badly,
and with standardised inputs. A sine: ten draws of a 1-100-1 network and their band. Then what freeze does,
and whether to average the predictions of many draws or their parameters.

--epochs counts the steps of the classifiers with standardised inputs; raw inputs have a quarter of them,
the sine five times as many.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import bnn_fast as bf
from bnn_fast import metrics

from . import iris, sine
from .common import perceptron, table

EPOCHS = 200
SEEDS = 5           # classifiers trained, from --seed on
DRAWS = 100         # averaged


def bayesian(*sizes: int) -> nn.Sequential:
    return perceptron(*sizes, layer=lambda n_in, n_out: bf.VariationalLinear(
        n_in, n_out, prior=bf.Normal(0.0, 0.1), scale="exp", init="adv_bnn"))


def averaged_parameters(networks: list[nn.Module]) -> nn.Module:
    """The network whose parameters are the mean of those of `networks`."""
    averaged = AveragedModel(networks[0])
    for network in networks:
        averaged.update_parameters(network)
    return averaged


@torch.no_grad()
def both_averages(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities [N, 3]: the mean of the draws', and those of the draws' mean parameters."""
    networks = [bf.draw(model, seed) for seed in range(DRAWS)]
    return (torch.stack([network(x).softmax(-1) for network in networks]).mean(0),
            averaged_parameters(networks)(x).softmax(-1))


@torch.no_grad()
def frozen_and_free(model: nn.Module, x: Tensor) -> list[float]:
    """How far two calls of `model` are apart: as it is, frozen, and unfrozen again."""
    found = []
    for change in (lambda model: None, bf.freeze, bf.unfreeze):
        change(model)
        found.append((model(x) - model(x)).abs().max().item())
    return found


def history_table(history: Tensor, seed: int) -> str:
    """About ten of the steps."""
    steps = len(history)
    shown = sorted({1, steps, *range(max(1, steps // 10), steps, max(1, steps // 10))})
    rows = [(step, *history[step - 1].tolist()) for step in shown]
    return table(f"Iris, standardised: training with seed {seed}", [
        ("step", "KL a weight", "NLL", "loss", "accuracy"),
        *((step, f"{kl:.4f}", f"{nll:.4f}", f"{loss:.4f}", f"{accuracy:.1%}")
          for step, nll, kl, loss, accuracy in rows)])


def run(epochs: int | None = None, seed: int = 0, device: str = "cpu", out: str = "figures") -> dict:
    """Train all, draw, print; returns the numbers of the tables."""
    steps = epochs or EPOCHS
    few, many, seeds = -(-steps // 4), 5 * steps, range(seed, seed + SEEDS)
    centimetres = iris.data(device)
    flowers, y = centimetres.standardised(), centimetres.test_y
    raw = iris.classify(lambda: bayesian(4, 100, 3), centimetres, few, seeds, "raw")
    good = iris.classify(lambda: bayesian(4, 100, 3), flowers, steps, seeds, "standardised")
    raw_hits, good_hits = ([iris.hits(probs, y) for probs in found.probs] for found in (raw, good))
    print(history_table(good.histories[0], seed))
    print(table(f"Iris: right of {len(y)} held-out flowers, {iris.DRAWS} draws, seeds from {seed}", [
        ("inputs", "steps", "plain", "Bayesian, by seed", ""),
        ("raw", few, raw.plain_hits, " ".join(map(str, raw_hits)),
         f"{sum(raw_hits) / SEEDS / len(y):.0%} on average; expected: about 70 %"),
        ("standardised", steps, good.plain_hits, " ".join(map(str, good_hits)),
         "expected: at least 36 each")]))
    freeze = frozen_and_free(good.models[0], flowers.test_x)
    print("\nTwo calls of one classifier differ by at most {:.3g}; after freeze by {:.3g}; after unfreeze by "
          "{:.3g}.".format(*freeze))

    torch.manual_seed(seed)
    wave_x, wave_y = sine.data(device)
    wave = bayesian(1, 100, 1).to(device)
    best = sine.train(wave, wave_x, wave_y, many)
    band, wide = (sine.measure(wave, wave_x, wave_y, draws, seed) for draws in (sine.DRAWS, DRAWS))
    print(table(f"Sine: {sine.DRAWS} draws, the parameters of step {best} of {many}", [
        ("RMSE of the mean to the sine", f"{band['rmse']:.3f}", "expected: at most 0.2"),
        ("points inside mean +- 3 sd", f"{band['inside']:.1%}", "expected: at least 95 %"),
        ("mean width of that band", f"{band['width']:.3f}", "")]))

    averages = [[(iris.hits(probs, y), metrics.nll(probs, y).item())
                 for probs in both_averages(model, flowers.test_x)] for model in good.models]
    (hits, nll), (hits_one, nll_one) = averages = torch.tensor(averages).mean(0).tolist()
    with torch.no_grad():
        one = averaged_parameters([bf.draw(wave, number) for number in range(DRAWS)])(wave_x)
    print(table(f"What to average over {DRAWS} draws: predictions or parameters", [
        ("", "predictions", "parameters"),
        (f"iris, right of {len(y)}, mean of the seeds", f"{hits:.1f}", f"{hits_one:.1f}"),
        ("iris, NLL", f"{nll:.4f}", f"{nll_one:.4f}"),
        ("sine, RMSE", f"{wide['rmse']:.3f}", f"{metrics.rmse(one, wave_x.sin()).item():.3f}"),
        ("sine, mean width of the +- 3 sd band", f"{wide['width']:.3f}", "0: one network")]))
    print("Averaged parameters are nearly the posterior means: one network, about as good a guess for the "
          "price of one\nforward, but the disagreement of the draws, and with it the band, is gone.")
    print("figures:", iris.draw_training(good.histories[0], out),
          iris.draw_flowers(centimetres.test_x, y, good.probs[0].argmax(-1), out),
          sine.draw(wave, wave_x, wave_y, seed, out), sep="\n  ")
    return {"raw": raw_hits, "standardised": good_hits, "sine": band, "freeze": freeze, "averages": averages}
