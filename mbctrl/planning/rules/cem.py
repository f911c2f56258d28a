"""The cross-entropy method."""

from __future__ import annotations

from dataclasses import dataclass

from mbctrl.base.config import Count
from mbctrl.planning.arrays import Array
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

    def update(self, old: Distribution, knots: Array, costs: Array) -> tuple[Distribution, Array]:
        """Return mean and spread of the elites, smoothed with the old ones."""
        index, share = ranked(costs, self.elites), self.smoothing
        chosen = knots[:, :, index]
        mean = chosen.mean(-1)
        spread = ((chosen - mean[..., None]) ** 2).mean(-1) ** 0.5
        mean, spread = share * old.mean + (1 - share) * mean, share * old.spread + (1 - share) * spread
        return Distribution(mean, spread, chosen[:, :, 0], old.kept), equal_weights(costs, index)
