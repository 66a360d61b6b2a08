"""The classifiers of the demo bayesian_neural_networks: the flowers, the tutorial's recipe, the pictures."""
from __future__ import annotations

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnn_fast as bf
from bnn_fast import plotting

from .common import minimise, panels, perceptron, save

KL_WEIGHT = 0.01    # of the KL averaged over the weights
DRAWS = 100
CLASSES = (("setosa", plotting.BLUE, "o"), ("versicolor", plotting.ORANGE, "s"),
           ("virginica", plotting.GREEN, "^"))
FEATURES = {2: "petal length, cm", 3: "petal width, cm"}  # those drawn


class Flowers(NamedTuple):
    train_x: Tensor     # [112, 4], in centimetres or standardised
    test_x: Tensor      # [38, 4]
    train_y: Tensor     # [112], 0 to 2
    test_y: Tensor

    def standardised(self) -> Flowers:
        """Every feature with mean 0 and standard deviation 1 over the training flowers."""
        mean, sd = self.train_x.mean(0), self.train_x.std(0)
        return self._replace(train_x=(self.train_x - mean) / sd, test_x=(self.test_x - mean) / sd)


class Classified(NamedTuple):
    models: list[nn.Module]     # the Bayesian networks, one for each seed
    histories: list[Tensor]     # [steps, 4]: NLL, KL a weight, loss and accuracy of every step
    probs: list[Tensor]         # [38, 3] of the test flowers, of 100 draws
    plain_hits: int             # test flowers that the plain network gets right


def data(device: str) -> Flowers:
    from sklearn.datasets import load_iris
    from sklearn.model_selection import train_test_split

    x, y = load_iris(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=38, random_state=0)
    return Flowers(*(torch.tensor(x, dtype=torch.float32, device=device) for x in (train_x, test_x)),
                   *(torch.tensor(y, device=device) for y in (train_y, test_y)))


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, label: str) -> Tensor:
    """The history of a network; accuracy is that of the step's one draw on the training flowers.

    Bayes' rule would weight the sum of the KL by 1 / 112. The tutorial's 0.01 / 803 is some 700 times less,
    and the posterior far surer than the data warrant.
    """
    bayesian = any(isinstance(module, bf.VariationalLinear) for module in model.modules())

    def objective():
        logits = model(x)
        # cross_entropy takes the softmax over the classes. The tutorial's runs over dimension 0, the batch,
        # by mistake: what it gives compares flowers, not classes.
        nll = F.cross_entropy(logits, y)
        kl = bf.kl_divergence(model, "mean") if bayesian else nll.new_zeros(())
        return {"nll": nll, "kl": kl, "loss": nll + KL_WEIGHT * kl,
                "accuracy": (logits.argmax(-1) == y).float().mean()}

    return torch.stack([torch.stack(list(parts.values())) for _, parts in minimise(
        objective, model.parameters(), steps=steps, lr=0.01, label=label)]).cpu()


def classify(network: Callable[[], nn.Module], flowers: Flowers, steps: int, seeds: range,
             label: str) -> Classified:
    """Train one Bayesian network for each seed, and a plain one."""
    models, histories, probs = [], [], []
    for seed in seeds:
        torch.manual_seed(seed)
        model = network().to(flowers.train_x.device)
        histories.append(train(model, flowers.train_x, flowers.train_y, steps, f"{label}, seed {seed}"))
        probs.append(bf.predict(model, flowers.test_x, bf.Categorical(), DRAWS, seed=seed).probs)
        models.append(model)
    plain = perceptron(4, 100, 3).to(flowers.train_x.device)
    train(plain, flowers.train_x, flowers.train_y, steps, f"{label}, plain")
    return Classified(models, histories, probs, hits(plain(flowers.test_x), flowers.test_y))


def hits(scores: Tensor, y: Tensor) -> int:
    """How many of the classes y [N] have the largest of the scores [N, 3]."""
    return (scores.argmax(-1) == y).sum().item()


def draw_training(history: Tensor, out: str) -> str:
    nll, kl, loss, accuracy = history.T
    axes = panels(3, 13.0, 4.0)
    steps = range(1, len(history) + 1)
    axes[0].plot(steps, loss, color=plotting.VERMILION, label="loss")
    axes[0].plot(steps, nll, color=plotting.BLUE, linestyle="--", label="NLL")
    axes[0].legend(frameon=False)
    axes[1].plot(steps, kl, color=plotting.GREEN)
    axes[2].plot(steps, accuracy, color=plotting.BLUE)
    for ax, label in zip(axes, ("NLL, loss", "KL a weight", "accuracy of the step's draw")):
        ax.set(xlabel="step", ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    return save(axes[0], out, "bayesian_neural_networks_training.png")


def draw_flowers(x: Tensor, real: Tensor, predicted: Tensor, out: str) -> str:
    axes = panels(2, 12.0, 5.0)
    (across, xlabel), (up, ylabel) = FEATURES.items()
    x, real, predicted = x.cpu(), real.cpu(), predicted.cpu()
    wrong = real != predicted
    for ax, title, classes in zip(axes, ("REAL", "PREDICTED"), (real, predicted)):
        for number, (name, colour, marker) in enumerate(CLASSES):
            some = x[classes == number]
            ax.scatter(some[:, across], some[:, up], color=colour, marker=marker, label=name)
        ax.scatter(x[wrong, across], x[wrong, up], s=150, facecolors="none", edgecolors="black",
                   label=f"predicted wrong ({wrong.sum()})")
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return save(axes[0], out, "bayesian_neural_networks_iris.png")
