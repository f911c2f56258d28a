"""The planner: draws, costs, updates; a pure function of its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbctrl.planning.arrays import Array, host, like, namespace
from mbctrl.planning.knots import Knots
from mbctrl.planning.rules.base import Distribution, Figures, Rule


@dataclass(frozen=True)
class Parameters:
    """What changes from plan to plan; times are the ends of the H steps. Absent ones are None.

    Shapes: ``p_target`` (3, H, 1) [m], ``r_target`` (3, 3, H, 1), ``q_target`` (nq,) [rad], ``obstacles`` a (3, H, 1)
    position [m] for each obstacle, ``u_before`` (nu,) the command in force at the start, ``payload`` (10,) what a model that
    may carry one carries (``mbctrl.dynamics.body``), ``proposal`` (K, nu, P) knots that somebody else proposes as candidates.
    """

    u_before: Array
    p_target: Array | None = None
    r_target: Array | None = None
    q_target: Array | None = None
    obstacles: tuple[Array, ...] = ()
    payload: Array | None = None
    proposal: Array | None = None


@dataclass(frozen=True)
class PlannerState:
    """All a planner remembers: its belief, the time [s] the belief starts at, and the random stream (seed, draws)."""

    belief: Distribution
    start: float
    seed: int
    draws: int


@dataclass(frozen=True)
class Result:
    """One planning step.

    ``knots`` (K, nu) to follow, figures of the last iteration, its candidates (K, nu, N), None where they stayed on the
    device, and their weights (N,); ``states`` (H+1, nx) and ``path`` (H+1, 3) [m] expected of the knots, None: not known.
    """

    knots: Array
    figures: Figures
    candidates: Array | None
    weights: Array
    states: Array | None = None
    path: Array | None = None


class Search(ABC):
    """Draws candidates around a belief and costs them; the kind of its arrays is the kind of the belief's."""

    @abstractmethod
    def __call__(self, belief: Distribution, fixed: Array, seed: int, draw: int, x: Array, parameters: Any) -> tuple[Array, Array]:
        """Return candidates (K, nu, N) within their bounds and their costs (N,), which need not be finite.

        Args:
            belief: mean and spread to draw around.
            fixed: (K, nu, F) candidates that take the place of the first F draws.
            seed, draw: which random numbers.
            x: (nx,) the state to roll out from.
            parameters: the objective's.
        """


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
        sigma: Array,
        iterations: int = 1,
        growth: float | None = None,
    ) -> None:
        self.search, self.rule, self.knots, self.samples, self.iterations = search, rule, knots, samples, iterations
        self.growth = growth
        self.sigma = sigma if sigma.ndim == 2 else namespace(sigma).stack([sigma] * knots.count)

    def initial(self, command: Array, t: float = 0.0, seed: int = 0) -> PlannerState:
        """Return the state before the first plan: ``command`` (nu,) held from time ``t`` [s]."""
        mean = namespace(command).stack([command] * self.knots.count)
        return PlannerState(Distribution(mean, self.sigma, mean, mean[..., None][..., :0]), t, seed, 0)

    def plan(self, state: PlannerState, x: Array, parameters: Any, t: float) -> tuple[PlannerState, Result]:
        """Plan from state ``x`` (nx,) at time ``t`` [s]: shift the belief to ``t``, then iterate."""
        state = self.shifted(state, t)
        for _ in range(self.iterations):
            state, result = self.iterate(state, x, parameters)
        return state, result

    def shifted(self, state: PlannerState, t: float) -> PlannerState:
        """Return the belief as seen from time ``t`` [s], its spread widened."""
        old, spread = state.belief, self.sigma
        move = like(self.knots.shift(t - state.start), old.mean)
        if self.growth is not None:
            spread = namespace(spread).minimum(self.growth * (abs(move) @ old.spread), self.sigma)
        kept = old.kept
        if kept.shape[2]:
            kept = (move @ kept.reshape(len(move), -1)).reshape(kept.shape)
        return PlannerState(Distribution(move @ old.mean, spread, move @ old.best, kept), t, state.seed, state.draws)

    def iterate(self, state: PlannerState, x: Array, parameters: Any) -> tuple[PlannerState, Result]:
        """Draw, cost and update once; k calls are k iterations of one plan."""
        belief = state.belief
        candidates, costs = self.search(belief, self.fixed(belief, parameters), state.seed, state.draws, x, parameters)
        values = host(costs)
        good = np.isfinite(values)
        finite = int(np.count_nonzero(good))
        if finite < len(values):
            values = np.where(good, values, np.array(np.inf, values.dtype))
            costs = like(values, costs)
        if finite:
            belief, weights = self.rule.update(state.belief, candidates, costs)
            if belief.spread is not state.belief.spread:
                spread = namespace(belief.spread).maximum(belief.spread, getattr(self.rule, "floor", 0.0) * self.sigma)
                belief = Distribution(belief.mean, spread, belief.best, belief.kept)
            shares = host(weights)
            mean = (values if finite == len(values) else values[good]).mean(dtype=float)
            figures = Figures(float(values.min()), float(mean), float(1.0 / (shares @ shares)), len(values) - finite)
        else:
            weights, figures = like(np.zeros(len(values)), costs), Figures(np.inf, np.inf, 0.0, len(values))
        state = PlannerState(belief, state.start, state.seed, state.draws + 1)
        return state, Result(getattr(belief, self.rule.executes), figures, candidates, weights)

    def fixed(self, belief: Distribution, parameters: Any = None) -> Array:
        """Return (K, nu, F) candidates not drawn: those kept, best first, at most half of all, those proposed, and the mean."""
        parts = [belief.kept[..., : self.samples // 2]]
        if getattr(parameters, "proposal", None) is not None:
            parts.append(parameters.proposal)
        if self.rule.includes_mean:
            parts.append(belief.mean[..., None])
        parts = [part for part in parts if part.shape[2]] or parts[:1]
        return namespace(belief.mean).concatenate(parts, -1) if len(parts) > 1 else parts[0]
