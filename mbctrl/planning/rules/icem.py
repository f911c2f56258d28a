"""iCEM: a cross-entropy method made for few samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from mbctrl.planning.rules.base import Distribution, Rule
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
    elites: int = 32
    smoothing: float = 0.1
    floor: float = 0.05
    keep: int = 8

    def update(self, old: Distribution, knots: Tensor, costs: Tensor) -> tuple[Distribution, Tensor]:
        """Return CEM's update with the cheapest candidates kept."""
        new, weights = Cem(self.elites, self.smoothing, self.floor).update(old, knots, costs)
        best = costs.topk(min(self.keep, len(costs)), largest=False).indices
        return replace(new, kept=knots[:, :, best]), weights
