"""The parts of a planning step as torch modules, flat where the horizon is not: what comes before, one step, what comes after."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.export.rules import BIG, update
from mbctrl.planning.objective import FeatureMap
from mbctrl.planning.planner import Parameters, Planner
from mbctrl.planning.policy import Policy
from mbctrl.planning.rules.base import Rule
from mbctrl.tasks.task import Task


@dataclass(frozen=True)
class Shapes:
    """K knots, nu commands, N samples, H steps, nx states, candidates kept from the last draw and, 0 or 1, proposed by a policy."""

    knots: int
    commands: int
    samples: int
    steps: int
    states: int
    kept: int
    proposed: int = 0


class Draw(nn.Module):
    """From belief and white noise to candidates, commands and the states they start from."""

    def __init__(self, planner: Planner, rule: Rule, shapes: Shapes, colour: np.ndarray | None, bounds: tuple) -> None:
        super().__init__()
        self.shapes, self.includes_mean = shapes, rule.includes_mean
        self.basis = torch.tensor(planner.knots.basis, dtype=torch.float32)
        self.colour = None if colour is None else torch.tensor(colour, dtype=torch.float32)
        self.low, self.high = (torch.tensor(b, dtype=torch.float32)[None, :, None] for b in bounds)

    def forward(
        self, x: Tensor, mean: Tensor, spread: Tensor, noise: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return candidates (K, nu, N), commands (H, nu, N) and the state (nx, N) from ``x`` (nx,) and noise (K, nu, N)."""
        s = self.shapes
        if self.colour is not None:
            noise = (self.colour @ noise.reshape(s.knots, -1)).reshape(noise.shape)
        drawn = mean[:, :, None] + spread[:, :, None] * noise
        fixed = [] if kept is None else [kept]
        if self.includes_mean:
            fixed.append(mean[:, :, None])
        given = sum(part.shape[2] for part in fixed)
        candidates = torch.cat((*fixed, drawn[:, :, given:]), 2) if given else drawn
        candidates = torch.minimum(torch.maximum(candidates, self.low), self.high)
        commands = (self.basis @ candidates.reshape(s.knots, -1)).reshape(s.steps, s.commands, s.samples)
        commands = torch.minimum(torch.maximum(commands, self.low), self.high)
        return candidates, commands, x[:, None].expand(-1, s.samples).clone()


class Propose(nn.Module):
    """A policy's knots for a state and what is asked."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, given: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return knots (K, nu) for the goal's inputs and ``x`` (nx,)."""
        p, r = given.get("p_target"), given.get("r_target")
        if r is not None:  # a target without an orientation: the tool's own
            sees = self.policy.sees
            n = len(sees.revolute)
            own = sees.chain.pose(x[:n] - torch.tensor(sees.reference, dtype=x.dtype))[0]
            r = torch.where(given["rotation"] > 0.5, r, own[:, :, None])
        parameters = Parameters(
            u_before=x[:0],
            p_target=None if p is None else p[:, :, None],
            r_target=None if r is None else r[..., None],
            q_target=given.get("q_target"),
            obstacles=tuple(given["obstacles"][k][:, :, None] for k in range(self.policy.sees.asked.obstacles)),
        )
        return self.policy(x, parameters)


class Step(nn.Module):
    """One step of the arm: (nx, N) under (nu, N); ``dt`` [s] is an input where it is not the planner's."""

    def __init__(self, dynamics: RigidBodyDynamics | HybridDynamics) -> None:
        super().__init__()
        self.dynamics = dynamics

    def forward(self, x: Tensor, u: Tensor, dt: Tensor | None = None) -> Tensor:
        """Return the state after the step."""
        return (self.dynamics if dt is None else self.dynamics.with_dt(dt)).step(x, u)


class Score(nn.Module):
    """From states and commands to costs, the update, and what a person wants to know of it."""

    def __init__(
        self, features: FeatureMap, task: Task, rule: Rule, planner: Planner, bounds: tuple, obstacles: tuple[Obstacle, ...]
    ):
        super().__init__()
        self.features, self.task, self.rule, self.obstacles = features, task, rule, obstacles
        knots, kinematics = planner.knots, features.kinematics
        times = np.arange(knots.steps + 1) * knots.dt
        self.spread_out = torch.tensor(knots.weights(times), dtype=torch.float32)
        self.low, self.high = (torch.tensor(b, dtype=torch.float32) for b in bounds)
        self.least = torch.tensor(getattr(rule, "floor", 0.0) * np.asarray(planner.sigma), dtype=torch.float32)
        self.nq = kinematics.nq

    def forward(
        self, given: dict[str, Tensor], states: Tensor, commands: Tensor, candidates: Tensor, mean: Tensor, spread: Tensor
    ) -> tuple[Tensor, ...]:
        """Return costs (N,), mean, spread, best (K, nu), plan (H+1, nu), path (H+1, 3), states (H+1, nx), figures (4,), weights
        (N,) and, for iCEM, the candidates kept (K, nu, F)."""
        position, costs = self._costs(states, commands, given)
        good = torch.isfinite(costs)
        costs = torch.where(good, costs, costs.new_tensor(BIG))
        some = good.to(costs.dtype).sum()
        new = update(self.rule, mean, spread, candidates, costs, good)
        any_good = some > 0.5
        new_mean = torch.where(any_good, new.mean, mean)
        floored = spread if new.spread is spread else torch.maximum(new.spread, self.least)
        new_spread = torch.where(any_good, floored, spread)
        best = torch.where(any_good, new.best, mean)
        follow = best if self.rule.executes == "best" else new_mean
        plan = torch.minimum(torch.maximum(self.spread_out @ follow, self.low), self.high)
        of = new.weights
        if self.rule.executes == "best":
            of = torch.nn.functional.one_hot(torch.argmin(costs), costs.shape[0]).to(costs.dtype)
        nothing = costs.new_tensor(0.0)  # nothing times what is not a number is not nothing
        path = torch.where(good, position, nothing) @ of
        expected = torch.where(good, states, nothing) @ of
        weight = torch.where(good, costs, nothing)
        figures = torch.stack(
            (costs.min(), weight.sum() / some.clamp(min=1.0), 1.0 / (new.weights @ new.weights), some / costs.shape[0])
        )
        out = (costs, new_mean, new_spread, best, plan, path, expected, figures, new.weights)
        return out if new.kept is None else (*out, new.kept)

    def _costs(self, states: Tensor, commands: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the tool's positions (H+1, 3, N) [m] and the costs (N,)."""
        p, r = given.get("p_target"), given.get("r_target")
        parameters = Parameters(
            u_before=given["u_before"],
            p_target=None if p is None else p[:, :, None],
            q_target=given.get("q_target"),
            obstacles=tuple(given["obstacles"][k][:, :, None] for k in range(len(self.obstacles))),
        )
        f = self.features(states, commands, parameters)
        if r is not None:  # a target without an orientation: the tool's own, whose error is none
            f = replace(f, R_world_target=torch.where(given["rotation"] > 0.5, r[:, :, :, None], f.R_world_tcp))
        total: Tensor | float = 0.0
        terms = [name for name, term in self.task.terms.items() if term.weight > 0]
        for k, name in enumerate(terms):
            row = self.task.terms[name].cost(f, self.task.robot)
            if not isinstance(row, Tensor):  # a number where a term has nothing to look at
                row = torch.full_like(f.q[0], float(row))
            total = total + given["weights"][:, k] @ row.expand(len(commands), states.shape[2])
        return self._tool(states, f.p_world_tcp), total

    def _pose(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tool's rotation (3, 3, T N) and position (3, T N) at states (T, nx, N)."""
        model = self.features.kinematics
        q = states[:, : self.nq].movedim(0, 1).reshape(self.nq, -1)
        return model.frame(model.poses(q), self.features.tool)

    def _tool(self, states: Tensor, after: Tensor | None) -> Tensor:
        horizon, _, samples = states.shape
        if after is None:
            return self._pose(states)[1].reshape(3, horizon, samples).movedim(0, 1)
        first = self._pose(states[:1, :, :1])[1].reshape(1, 3, 1).expand(-1, -1, samples)
        return torch.cat((first, after.movedim(0, 1)), 0)
