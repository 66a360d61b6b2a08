"""Mean and spread of what comes in pieces."""
from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and summed squared deviations of the draws' values, and the mean of their spreads, in float64.

    Blocks are merged by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979), which does not subtract large sums from each other.
    """

    def __init__(self):
        self.count = 0
        self.mean = self.squares = self.spread = 0.0

    def add(self, values: Tensor, spread: Tensor | None) -> None:
        """values [n, ...]; spread [n, ...] or None."""
        values = values.double()
        mean, n = values.mean(0), len(values)
        total = self.count + n
        shift = mean - self.mean
        within = (values - mean).square().sum(0)
        self.squares = self.squares + within + shift.square() * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        if spread is not None:
            self.spread = self.spread + (spread.double().mean(0) - self.spread) * (n / total)
        self.count = total

    @staticmethod
    def joined(pieces: list[Moments]) -> Moments:
        """Those of all the rows."""
        whole = Moments()
        whole.count = pieces[0].count
        for name in ("mean", "squares", "spread"):
            parts = [getattr(piece, name) for piece in pieces]
            if isinstance(parts[0], Tensor):
                setattr(whole, name, torch.cat(parts))
        return whole

    def mapped(self, function) -> Moments:
        """Those with function(tensor) for each tensor."""
        new = Moments()
        new.count = self.count
        for name in ("mean", "squares", "spread"):
            value = getattr(self, name)
            setattr(new, name, function(value) if isinstance(value, Tensor) else value)
        return new
