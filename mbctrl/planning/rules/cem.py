"""The cross-entropy method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbctrl.base.config import Count
from mbctrl.planning.rules.base import Distribution, Factor, Rule, ShareOrNone, equal_weights, ranked


@dataclass(frozen=True)
class Cem(Rule):
    """Refit mean and spread to the cheapest candidates.

    Source: Botev, Kroese, Rubinstein and L'Ecuyer, "The cross-entropy method for optimization" (2013).

    Args:
        elites: candidates that are refitted to.
        smoothing: share of the old mean and spread that is kept, [0, 1).
        floor: least spread, as a share of the initial one; keeps the search alive.
    """

    elites: Count = 64
    smoothing: ShareOrNone = 0.1
    floor: Factor = 0.05

    def update(self, old: Distribution, knots: Tensor, costs: Tensor) -> tuple[Distribution, Tensor]:
        """Return mean and spread of the elites, smoothed with the old ones."""
        index = ranked(costs, self.elites)
        chosen = knots.index_select(2, index)
        spread, mean = torch.std_mean(chosen, -1, correction=0)
        mean, spread = (torch.lerp(new, old, self.smoothing) for new, old in ((mean, old.mean), (spread, old.spread)))
        new = replace(old, mean=mean, spread=spread, best=chosen[:, :, 0])
        return new, equal_weights(costs, index)
