"""The planner: draws, costs, updates; a pure function of its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise
from mbctrl.planning.rules.base import Distribution, Figures, Rule

Objective = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (nx,), commands (H, nu, N), parameters) -> costs (N,)."""


@dataclass(frozen=True)
class PlannerState:
    """All a planner remembers: its belief, the time [s] the belief starts at, and the random stream (seed, draws)."""

    belief: Distribution
    start: float
    seed: int
    draws: int


@dataclass(frozen=True)
class Result:
    """One planning step: ``knots`` (K, nu) to follow, figures of the last iteration, its candidates and weights."""

    knots: Tensor
    figures: Figures
    candidates: Tensor
    weights: Tensor


class Search(ABC):
    """Draws candidates around a belief and costs them."""

    @abstractmethod
    def __call__(
        self, belief: Distribution, fixed: Tensor, seed: int, draw: int, x: Tensor, parameters: Any
    ) -> tuple[Tensor, Tensor]:
        """Return candidates (K, nu, N) within their bounds and their costs (N,), which need not be finite.

        Args:
            belief: mean and spread to draw around.
            fixed: (K, nu, F) candidates that take the place of the first F draws.
            seed, draw: which random numbers.
            x: (nx,) the state to roll out from.
            parameters: the objective's.
        """


class TorchSearch(Search):
    """Any objective over command sequences, in torch.

    Args:
        objective: costs of command sequences.
        knots: the action parametrisation.
        noise: draws (K, nu, N) standard normals.
        lower, upper: (nu,) command bounds; knots are clipped to them (cubic curves between may overshoot and are
            clipped again).
    """

    def __init__(self, objective: Objective, knots: Knots, noise: Noise, lower: Tensor, upper: Tensor) -> None:
        self.objective, self.knots, self.noise = objective, knots, noise
        self._low, self._high = lower[None, :, None], upper[None, :, None]

    def __call__(
        self, belief: Distribution, fixed: Tensor, seed: int, draw: int, x: Tensor, parameters: Any
    ) -> tuple[Tensor, Tensor]:
        """Return candidates and their costs."""
        drawn = belief.mean[..., None] + belief.spread[..., None] * self.noise.draw(seed, draw)
        candidates = torch.cat((fixed, drawn[..., fixed.shape[-1] :]), -1).clamp(self._low, self._high)
        return candidates, self.objective(x, self.knots.commands(candidates).clamp(self._low, self._high), parameters)


class Planner:
    """Samples command sequences around a belief, costs them and refits.

    Args:
        search: draws and costs.
        rule: the update rule.
        knots: the action parametrisation.
        samples: candidates an iteration, N.
        sigma: (nu,) or (K, nu) initial spread in units of the command.
        iterations: updates a plan.
        growth: factor by which a learnt spread widens from plan to plan, up to ``sigma``; None: wide again at once.
    """

    def __init__(
        self,
        search: Search,
        rule: Rule,
        knots: Knots,
        *,
        samples: int,
        sigma: Tensor,
        iterations: int = 1,
        growth: float | None = None,
    ) -> None:
        self.search, self.rule, self.knots, self.samples, self.iterations = search, rule, knots, samples, iterations
        self.growth = growth
        self._sigma = sigma.expand(knots.count, -1).contiguous()

    def initial(self, command: Tensor, t: float = 0.0, seed: int = 0) -> PlannerState:
        """Return the state before the first plan: ``command`` (nu,) held from time ``t`` [s]."""
        mean = command.expand(self.knots.count, -1)
        return PlannerState(Distribution(mean, self._sigma, mean, mean[..., None][..., :0]), t, seed, 0)

    def plan(self, state: PlannerState, x: Tensor, parameters: Any, t: float) -> tuple[PlannerState, Result]:
        """Plan from state ``x`` (nx,) at time ``t`` [s]: shift the belief to ``t``, then iterate."""
        state = self.shifted(state, t)
        for _ in range(self.iterations):
            state, result = self.iterate(state, x, parameters)
        return state, result

    def shifted(self, state: PlannerState, t: float) -> PlannerState:
        """Return the belief as seen from time ``t`` [s], its spread widened."""
        move = self.knots.shift(t - state.start)
        old = state.belief
        spread = self._sigma
        if self.growth is not None:
            spread = torch.minimum(self.growth * (move.abs() @ old.spread), self._sigma)
        every = torch.cat((old.mean[..., None], old.best[..., None], old.kept), -1)
        every = (move @ every.flatten(1)).view(every.shape)
        return replace(state, belief=Distribution(every[..., 0], spread, every[..., 1], every[..., 2:]), start=t)

    def iterate(self, state: PlannerState, x: Tensor, parameters: Any) -> tuple[PlannerState, Result]:
        """Draw, cost and update once; k calls are k iterations of one plan."""
        candidates, costs = self.search(state.belief, self._fixed(state.belief), state.seed, state.draws, x, parameters)
        costs = torch.nan_to_num(costs, nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        values = costs.cpu().numpy()
        finite = values[np.isfinite(values)]
        belief, weights = state.belief, torch.zeros_like(costs)
        if len(finite):
            belief, weights = self.rule.update(state.belief, candidates, costs)
            if belief.spread is not state.belief.spread:
                floor = getattr(self.rule, "floor", 0.0)
                belief = replace(belief, spread=torch.maximum(belief.spread, floor * self._sigma))
        figures = Figures(
            best=float(finite.min()) if len(finite) else np.inf,
            mean=float(finite.mean()) if len(finite) else np.inf,
            ess=_effective(weights.cpu().numpy()) if len(finite) else 0.0,
            nonfinite=len(values) - len(finite),
        )
        state = replace(state, belief=belief, draws=state.draws + 1)
        return state, Result(getattr(belief, self.rule.executes), figures, candidates, weights)

    def _fixed(self, belief: Distribution) -> Tensor:
        """Return (K, nu, F) candidates that are not drawn: those kept, best first, at most half of all, and the mean."""
        fixed = [belief.kept[..., : self.samples // 2]]
        if self.rule.includes_mean:
            fixed.append(belief.mean[..., None])
        return torch.cat(fixed, -1)


def _effective(weights: np.ndarray) -> float:
    """Return Kish's effective sample size of normalised weights, 1 / sum w²."""
    return float(1.0 / (weights @ weights))
