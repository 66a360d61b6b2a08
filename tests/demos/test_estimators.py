"""On the bundled digits a network trained and predicted with "local" or "flipout" is as good as with "weight"."""
from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import bnn_fast as bf
from bnn_fast import metrics
from bnn_fast.demos import __main__ as command
from bnn_fast.demos import digits, digits_data

for module in command.EXTRAS:
    pytest.importorskip(module)

SEEDS, T_975 = 10, 2.262  # of Student's t with 9 degrees of freedom


def nll(estimator: str, seed: int) -> float:
    torch.manual_seed(seed)
    x, y, held_x, held_y = digits_data.bundled()[:4]
    model = digits.network(partial(bf.VariationalLinear, estimator=estimator), x.shape[1], 64)
    digits.train(model, x, y, 64, 15, estimator)
    return metrics.nll(digits.predict(model, held_x, 50, 0), held_y).item()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_digits_are_predicted_as_well(estimator):
    """The upper end of the 95 % interval of the difference, of the same initialisation and order of rows."""
    differences = torch.tensor([nll(estimator, seed) - nll("weight", seed) for seed in range(SEEDS)])
    upper = differences.mean() + T_975 * differences.std() / math.sqrt(SEEDS)
    print(f"{estimator}: NLL {differences.mean():+.4f} to that of weight, upper end {upper:+.4f}")
    assert upper < 0.01
