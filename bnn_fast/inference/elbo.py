"""The training objective: the evidence lower bound."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.base import named_layers
from .divergence import kl_of_pass
from .mean_nll import mean_nll
from .passes import checked_output, checked_way, drawn
from .sampling import Draws, checked_seed
from .schedules import Steps
from .structure import count_rows, given

__all__ = ["ELBO"]


class ELBO(nn.Module):
    """The negative ELBO per row, as a loss:  mean NLL + kl_weight * KL / n_data.

    Args:
        model: any module, its variational layers giving the KL.
        likelihood: Gaussian, HeteroscedasticGaussian, Bernoulli or Categorical, or a callable like them: of
            (outputs [S, B, ...], targets [B, ...]), giving [S, B].
        n_data: rows of the whole training set, not of a batch: the KL belongs to all of them.
        kl_weight: 1 is the ELBO itself. A number, or a callable of the step (0, 1, 2, ...; `linear_warmup`,
            `blundell_weights`). The step counts the calls made with gradients on, under a callable kl_weight;
            `step` may be set, and is in the state_dict. It is an int, and a 0-d tensor under torch.compile.
        seed: pins the draws of every call to those of `mc_forward(..., seed=seed)`, as L-BFGS and line searches need, whose
            loss must be a function; `elbo.seed` may be set. None draws anew at every call, or as a context around says.
        vectorized, output: as of `mc_forward`: False makes one call of the model a draw; a function that chooses the output among
            what the model gives. Without one, a likelihood of your own is given the dictionary, tuple or dataclass.

    `elbo(x, y, n_samples=1, weights=None)`: x [B, ...] or several inputs, as `mc_forward` takes them, y the targets [B, ...] ->
    scalar. The NLL is summed over the outputs of a row and averaged over rows and draws; one draw (of each sample) holds for a
    whole call. weights [B], not negative, make it a weighted mean over the rows: 0 and 1 are a mask (then n_data counts
    the rows that are not masked). Weights of the targets' shape are those of a row's elements, in its sum.
    Afterwards `elbo.nll` and `elbo.kl` are the two parts, the KL undivided and unweighted, without their
    gradients. `elbo.parameters()` has those of the likelihood too.

    Raises TypeError or ValueError where an argument is of another kind, if outputs and targets differ in shape
    (they are not broadcast), or if the likelihood does not give [S, B]. Warns if `model` has no variational layers.
    """

    def __init__(self, model: nn.Module, likelihood: nn.Module, n_data: int,
                 kl_weight: float | Callable[[int], float] = 1.0, *, seed: int | None = None,
                 vectorized: bool | str = True, output: Callable | None = None):
        super().__init__()
        checks.module("model", model)
        vectorized = checked_way(vectorized)
        checked_output(output)
        if isinstance(likelihood, type) or not callable(likelihood):
            raise TypeError("likelihood: expected one such as Gaussian(), or a callable like it, "
                            f"given {checks.describe(likelihood)}")
        if not checks.is_number(n_data):
            raise TypeError(f"n_data: expected the number of training rows, given {checks.describe(n_data)}")
        if not n_data > 0:
            raise ValueError("n_data: expected the positive number of training rows, "
                             f"given {checks.describe(n_data)}")
        if isinstance(kl_weight, type) or not (callable(kl_weight) or checks.is_number(kl_weight)):
            raise TypeError("kl_weight: expected a number or a callable of the step, "
                            f"given {checks.describe(kl_weight)}")
        checks.any_layers(model, named_layers(model), "there is no KL, and nothing is drawn")
        self.model, self.likelihood, self.n_data, self.kl_weight = model, likelihood, n_data, kl_weight
        self.seed, self.vectorized, self.output = checked_seed(seed), vectorized, output
        self._steps = Steps()
        self.nll = self.kl = None

    @property
    def step(self) -> int:
        """How many calls were made with gradients on, under a callable kl_weight."""
        return self._steps.tensor.clone() if torch.compiler.is_compiling() else self._steps.array.item()

    @step.setter
    def step(self, number: int) -> None:
        self._steps.array[()] = checks.integer("step", number, 0)

    def forward(self, x, y, n_samples: int = 1, weights: Tensor | None = None) -> Tensor:
        outputs, kl = self._pass(x, n_samples)
        nll = mean_nll(self.likelihood, outputs, y, weights)
        object.__setattr__(self, "nll", _value(nll))  # past nn.Module, whose own takes ten times as long
        object.__setattr__(self, "kl", _value(kl))
        weight = self._weight(kl.dtype) / self.n_data
        return nll + kl * weight if isinstance(weight, Tensor) else torch.add(nll, kl, alpha=weight)

    def _pass(self, x, n_samples: int) -> tuple[object, Tensor]:
        """(outputs [S, B, ...] of the draws, the KL)."""
        n_samples = checks.positive_int("n_samples", n_samples)
        x = given(self.model, x)
        count_rows(x, self.vectorized is True)
        with Draws(self.model, n_samples, self.seed) as draws:
            return drawn(self.model, x, n_samples, draws, self.vectorized, self.output, kl_of_pass)

    def _weight(self, dtype: torch.dtype) -> float | Tensor:
        if not callable(self.kl_weight):
            return self.kl_weight
        weight = self.kl_weight(self.step)
        if torch.compiler.is_compiling():
            weight = torch.as_tensor(weight).to(dtype)
            if torch.is_grad_enabled():
                self._steps.tensor.add_(1)
        elif torch.is_grad_enabled():
            self._steps.array += 1
        return weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "step"] = self._steps.tensor.clone()

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        step = state_dict.pop(prefix + "step", None)  # checkpoints of versions before have none
        if step is not None:
            self.step = int(step)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"n_data={self.n_data}, kl_weight={self.kl_weight}"


def _value(loss: Tensor) -> Tensor:
    """loss without its gradient, and without the wrapper of a torch.func transform, dead once that ends."""
    loss = loss.detach()
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return loss
    return torch.func.debug_unwrap(loss, recurse=True)
