"""Random shooting and predictive sampling: follow the cheapest candidate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mbctrl.planning.arrays import Array
from mbctrl.planning.rules.base import Distribution, Rule, equal_weights, ranked


@dataclass(frozen=True)
class PredictiveSampling(Rule):
    """The cheapest of the nominal sequence and its perturbations becomes the nominal one.

    Source: Howell et al., "Predictive Sampling: Real-time Behaviour Synthesis with MuJoCo" (2022).
    """

    def update(self, old: Distribution, knots: Array, costs: Array) -> tuple[Distribution, Array]:
        """Return the distribution centred on the cheapest candidate."""
        index = ranked(costs, 1)
        best = knots[:, :, index[0]]
        return replace(old, mean=best, best=best), equal_weights(costs, index)


@dataclass(frozen=True)
class RandomShooting(PredictiveSampling):
    """The cheapest of independent draws; nothing is learnt from one draw to the next (the mean stays where it began).

    Source: Nagabandi et al., "Neural Network Dynamics for Model-Based Deep Reinforcement Learning" (2018).
    """

    includes_mean: ClassVar[bool] = False
    executes: ClassVar[str] = "best"

    def update(self, old: Distribution, knots: Array, costs: Array) -> tuple[Distribution, Array]:
        """Return the old distribution with the cheapest candidate noted."""
        index = ranked(costs, 1)
        return replace(old, best=knots[:, :, index[0]]), equal_weights(costs, index)
