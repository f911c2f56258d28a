"""iCEM: a cross-entropy method made for few samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from mbctrl.base.config import Count
from mbctrl.planning.arrays import Array
from mbctrl.planning.rules.base import Distribution, Factor, Rule, ShareOrNone, ranked
from mbctrl.planning.rules.cem import Cem


@dataclass(frozen=True)
class ICem(Rule):
    """CEM that carries elites into the next draw and, time-shifted, into the next plan, and executes the best sequence.

    Use it with ``noise: coloured``. Source: Pinneri et al., "Sample-efficient Cross-Entropy Method for Real-time
    Planning" (2020).

    Args:
        elites, smoothing, floor: as ``Cem``.
        keep: elites carried over.
    """

    executes: ClassVar[str] = "best"
    elites: Count = 32
    smoothing: ShareOrNone = 0.1
    floor: Factor = 0.05
    keep: Annotated[int, Field(ge=0, strict=True)] = 8

    def update(self, old: Distribution, knots: Array, costs: Array) -> tuple[Distribution, Array]:
        """Return CEM's update with the cheapest candidates kept."""
        new, weights = Cem(self.elites, self.smoothing, self.floor).update(old, knots, costs)
        return replace(new, kept=knots[:, :, ranked(costs, self.keep)]), weights
