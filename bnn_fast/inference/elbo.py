"""The training objective: the evidence lower bound."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from .. import checks
from .divergence import kl_of_pass
from .sampling import Draws, checked_seed, repeated, single

__all__ = ["ELBO"]


class ELBO(nn.Module):
    """The negative ELBO per row, as a loss:  mean NLL + kl_weight * KL / n_data.

    Args:
        model: any module, its variational layers giving the KL.
        likelihood: Gaussian, HeteroscedasticGaussian, Bernoulli or Categorical, or a module like them.
        n_data: rows of the whole training set, not of a batch: the KL belongs to all of them.
        kl_weight: 1 is the ELBO itself. A number, or a callable of the step (0, 1, 2, ...; `linear_warmup`,
            `blundell_weights`). The step counts the calls made with gradients on; `step` may be set.
        seed: pins the draws of every call to those of `mc_forward(..., seed=seed)`, as L-BFGS and line searches need, whose
            loss must be a function; `elbo.seed` may be set. None draws anew at every call, or as a context around says.
        vectorized: False makes one call of the model a draw, as `mc_forward` does.

    `elbo(x, y, n_samples=1)`: x [B, ...], y the targets [B, ...] -> scalar. The NLL is summed over the
    outputs of a row and averaged over rows and draws; one draw (of each sample) holds for a whole call.
    Afterwards `elbo.nll` and `elbo.kl` are the two parts, the KL undivided and unweighted, without their
    gradients. `elbo.parameters()` has those of the likelihood too.

    ValueError if outputs and targets differ in shape (they are not broadcast).
    """

    def __init__(self, model: nn.Module, likelihood: nn.Module, n_data: int,
                 kl_weight: float | Callable[[int], float] = 1.0, *, seed: int | None = None,
                 vectorized: bool = True):
        super().__init__()
        if isinstance(n_data, bool) or not isinstance(n_data, (int, float)) or not n_data > 0:
            raise ValueError("n_data: expected the positive number of training rows, "
                             f"given {checks.describe(n_data)}")
        is_number = isinstance(kl_weight, (int, float)) and not isinstance(kl_weight, bool)
        if not callable(kl_weight) and not is_number:
            raise TypeError("kl_weight: expected a number or a callable of the step, "
                            f"given {checks.describe(kl_weight)}")
        self.model, self.likelihood, self.n_data, self.kl_weight = model, likelihood, n_data, kl_weight
        seed = checked_seed(seed)
        self.seed, self.vectorized = seed, vectorized
        self.step = 0
        self.nll = self.kl = None

    def forward(self, x: Tensor, y: Tensor, n_samples: int = 1) -> Tensor:
        outputs, kl = self._pass(x, n_samples)
        nll = self.likelihood(outputs, y).mean()
        self.nll, self.kl = nll.detach(), kl.detach()
        return nll + kl * (self._weight() / self.n_data)

    def _pass(self, x: Tensor, n_samples: int) -> tuple[Tensor, Tensor]:
        """(outputs [S, B, ...] of the draws, the KL)."""
        checks.positive_int("n_samples", n_samples)
        checks.batch("x", x)
        with Draws(self.model, n_samples, self.seed) as draws:
            if self.vectorized:
                return repeated(self.model, x, n_samples), kl_of_pass(self.model)
            outputs, kls = [], []
            for s in range(n_samples):
                outputs.append(single(self.model, x, draws, s))
                kls.append(kl_of_pass(self.model))  # a sampled one is that of this draw
            return torch.stack(outputs), sum(kls) / n_samples

    def _weight(self) -> float:
        if not callable(self.kl_weight):
            return self.kl_weight
        weight = self.kl_weight(self.step)
        if torch.is_grad_enabled():
            self.step += 1
        return weight

    def extra_repr(self) -> str:
        return f"n_data={self.n_data}, kl_weight={self.kl_weight}"
