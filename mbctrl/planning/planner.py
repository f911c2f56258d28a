"""The planner: draws, costs, updates; a pure function of its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise
from mbctrl.planning.rules.base import Distribution, Figures, Rule, effective_sample_size

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


class Planner:
    """Samples command sequences around a belief, rolls them out through an objective and refits.

    Args:
        objective: costs of command sequences.
        rule: the update rule.
        knots: the action parametrisation.
        noise: draws (K, nu, N) standard normals.
        sigma: (nu,) or (K, nu) initial spread in units of the command.
        lower, upper: (nu,) command bounds; knots are clipped to them (cubic curves between may overshoot and are
            clipped again).
        iterations: updates a plan.
        growth: factor by which a learnt spread widens from plan to plan, up to ``sigma``; None: wide again at once.
    """

    def __init__(
        self,
        objective: Objective,
        rule: Rule,
        knots: Knots,
        noise: Noise,
        *,
        sigma: Tensor,
        lower: Tensor,
        upper: Tensor,
        iterations: int = 1,
        growth: float | None = None,
    ) -> None:
        self.objective, self.rule, self.knots, self.noise, self.iterations = objective, rule, knots, noise, iterations
        self.growth = growth
        self._sigma = sigma.expand(knots.count, -1)
        self._low, self._high = lower[None, :, None], upper[None, :, None]

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
        kept = (move @ old.kept.flatten(1)).view(old.kept.shape)
        return replace(state, belief=Distribution(move @ old.mean, spread, move @ old.best, kept), start=t)

    def iterate(self, state: PlannerState, x: Tensor, parameters: Any) -> tuple[PlannerState, Result]:
        """Draw, cost and update once; k calls are k iterations of one plan."""
        candidates = self._candidates(state)
        costs = self.objective(x, self.commands(candidates), parameters)
        finite = torch.isfinite(costs)
        costs = torch.where(finite, costs, torch.full_like(costs, torch.inf))
        count = int(finite.sum())
        belief, weights = state.belief, torch.zeros_like(costs)
        if count:
            belief, weights = self.rule.update(state.belief, candidates, costs)
            floor = getattr(self.rule, "floor", 0.0)
            belief = replace(belief, spread=torch.maximum(belief.spread, floor * self._sigma))
        figures = Figures(
            best=float(costs.min()),
            mean=float(costs[finite].mean()) if count else torch.inf,
            ess=float(effective_sample_size(weights)) if count else 0.0,
            nonfinite=len(costs) - count,
        )
        state = replace(state, belief=belief, draws=state.draws + 1)
        return state, Result(getattr(belief, self.rule.executes), figures, candidates, weights)

    def commands(self, knots: Tensor) -> Tensor:
        """Return the commands (H, nu, N) that ``knots`` (K, nu, N) stand for, within their bounds."""
        return self.knots.commands(knots).clamp(self._low, self._high)

    def _candidates(self, state: PlannerState) -> Tensor:
        """Return (K, nu, N): draws around the mean, the first replaced by the kept candidates and the mean itself."""
        belief = state.belief
        seed = (state.seed * 1_000_003 + state.draws) % (2**63)
        drawn = belief.mean[..., None] + belief.spread[..., None] * self.noise.draw(seed)
        kept = belief.kept[..., : drawn.shape[-1] // 2]  # the best come first; at least half of every draw is new
        fixed = [kept] if kept.shape[-1] else []
        if self.rule.includes_mean:
            fixed.append(belief.mean[..., None])
        count = sum(part.shape[-1] for part in fixed)
        return torch.cat((*fixed, drawn[..., count:]), -1).clamp(self._low, self._high)
