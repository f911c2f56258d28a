"""Costs of command sequences in torch: roll out, look, sum the task's terms; and the search over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.robot import Robot
from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.actuation import Impedance
from mbctrl.dynamics.contact import mount_of
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import Frame
from mbctrl.planning.arrays import like
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise
from mbctrl.planning.planner import Parameters, Search
from mbctrl.planning.risk import Risk
from mbctrl.planning.rules.base import Distribution
from mbctrl.tasks.distance import capsule_box, capsule_plane, capsule_sphere
from mbctrl.tasks.features import Features
from mbctrl.tasks.task import Task

Objective = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (nx,), commands (H, nu, N), parameters) -> costs (N,)."""


class FeatureMap:
    """Turns states and commands into the features terms look at, all steps and samples in one wide pass.

    Args:
        robot: its tool and gains.
        kinematics: poses of the arm's links; the analytic model also where MuJoCo is the dynamics.
        obstacles: their shapes.
        thing: the frame of what the goal is for where that is not the tool.
    """

    def __init__(
        self, robot: Robot, kinematics: RigidBodyDynamics, obstacles: tuple[Obstacle, ...] = (), thing: Frame | None = None
    ) -> None:
        self.kinematics, self.obstacles, self.thing = kinematics, obstacles, thing
        tree = kinematics.tree
        self.tool = tree.frames[robot.tool]
        self._pick = slice(None) if kinematics.commanded == list(range(kinematics.nq)) else kinematics.commanded
        actuation = kinematics.actuation
        self._gains: tuple[Tensor, Tensor] | None = None
        if isinstance(actuation, Impedance):
            self._gains = (self._column(actuation.stiffness), self._column(actuation.damping))
        self._mount = None if kinematics.contact is None else mount_of(kinematics.contact, tree)
        self._ends = [(c.link, np.stack([c.a, c.b])) for c in tree.capsules]
        self._radius = self._column([c.radius for c in tree.capsules])

    def _column(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, float), dtype=self.kinematics.dtype, device=self.kinematics.device)[:, None, None]

    def __call__(self, states: Tensor, commands: Tensor, parameters: Parameters) -> Features:
        """Return the features of ``states`` (H+1, nx, N) after the first, each reached under ``commands`` (H, nu, N).

        Rows are (H, N).
        """
        nq, model = self.kinematics.nq, self.kinematics
        horizon, _, samples = commands.shape
        x, u = states.to(model.dtype).movedim(0, 1), commands.movedim(0, 1)
        q, v = x[:nq, 1:], x[nq:, 1:]
        first = parameters.u_before[:, None, None].expand(-1, 1, samples)
        position = rotation = gap = rate = place = turn = None
        clearances: tuple[Tensor, ...] = ()
        if parameters.p_target is not None or self.obstacles or model.contact is not None:
            poses = model.poses(q.reshape(nq, -1))
            r, p = model.frame(poses, self.tool)
            rotation, position = r.reshape(3, 3, horizon, samples), p.reshape(3, horizon, samples)
            if self.thing is not None:
                r, p = model.frame(poses, self.thing)
                turn, place = r.reshape(3, 3, horizon, samples), p.reshape(3, horizon, samples)
            if self.obstacles:
                clearances = self.clearances(poses, parameters.obstacles, (horizon, samples))
            if model.contact is not None:
                gap = self._gap(poses).reshape(horizon, samples)
                first_gap = self._gap(model.poses(x[:nq, 0])).reshape(1, samples)
                rate = (gap - torch.cat((first_gap, gap[:-1]))) * (1.0 / model.dt)
        pick = self._pick
        return Features(
            q=q,
            v=v,
            a=(v - x[nq:, :-1]) * (1.0 / model.dt),
            u=u,
            u_before=torch.cat((first, u[:, :-1]), 1),
            effort=u if self._gains is None else self._gains[0] * (u - q[pick]) - self._gains[1] * v[pick],
            p_world_tcp=position,
            R_world_tcp=rotation,
            p_world_target=parameters.p_target,
            R_world_target=parameters.r_target,
            q_target=None if parameters.q_target is None else parameters.q_target[:, None, None],
            clearances=clearances,
            p_world_object=place,
            R_world_object=turn,
            contact_gap=gap,
            contact_rate=rate,
            contact_force=None if self._mount is None else self._mount.force(q, v),
        )

    def _gap(self, poses: Any) -> Tensor:
        """Return the declared contact's gap [m], a row of samples."""
        model, contact = self.kinematics, self.kinematics.contact
        tip = model.point(poses, contact.tip.link, contact.tip.position)
        return -contact.depth(tip, *model.frame(poses, contact.surface))

    def clearances(self, poses: Any, positions: tuple[Tensor, ...], shape: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return for each obstacle at ``positions`` (3, H, 1) the capsules' distances (C, H, N) [m]."""
        ends = [self.kinematics.points(poses, link, pair) for link, pair in self._ends]  # (2, 3, H * N) each
        both = torch.stack(ends, 2).view(2, 3, len(ends), *shape)
        distances = []
        for obstacle, position in zip(self.obstacles, positions):
            center = position[:, None]
            if obstacle.shape == "sphere":
                distances.append(capsule_sphere(both[0], both[1], self._radius, center, obstacle.size[0]))
            elif obstacle.shape == "box":
                distances.append(capsule_box(both[0], both[1], self._radius, center, obstacle.size))
            else:
                distances.append(capsule_plane(both[0], both[1], self._radius, center, obstacle.normal))
        return tuple(distances)


class RolloutObjective:
    """The planner's objective: discounted running cost plus terminal cost of rolled-out command sequences.

    Args:
        dynamics: the model; anything with ``rollout``, ``dt``, ``nx``.
        features: what the terms see.
        task: the terms.
        discount: factor a step, (0, 1].
    """

    def __init__(self, dynamics: Any, features: FeatureMap, task: Task, discount: float = 1.0) -> None:
        self.dynamics, self.features, self.task = dynamics, features, task
        self.discount = discount

    def __call__(self, x: Tensor, commands: Tensor, parameters: Parameters) -> Tensor:
        """Return costs (N,) of ``commands`` (H, nu, N) from state ``x`` (nx,)."""
        dynamics = self.dynamics if parameters.payload is None else self.dynamics.carrying(parameters.payload.cpu().numpy())
        states = dynamics.rollout(x[:, None].expand(-1, commands.shape[-1]), commands)
        return self.cost(states, commands, parameters)

    def cost(self, states: Tensor, commands: Tensor, parameters: Parameters) -> Tensor:
        """Return costs (N,) of ``states`` (H+1, nx, N) reached under ``commands`` (H, nu, N)."""
        horizon = len(commands)
        rows = self.task.costs(self.features(states, commands, parameters))
        when = self.dynamics.dt * self.discount ** torch.arange(horizon, dtype=states.dtype, device=states.device)
        total = torch.zeros(states.shape[-1], dtype=self.features.kinematics.dtype, device=states.device)
        for name, row in rows.items():
            row = torch.as_tensor(row, dtype=total.dtype, device=total.device)  # a number where a term has nothing to look at
            weights = when.to(row.dtype)
            if self.task.terms[name].terminal:
                weights = weights.clone()
                weights[-1] += self.task.terms[name].terminal * self.discount**horizon
            total = total + weights @ row.expand(horizon, len(total))
        return total


class MemberwiseObjective:
    """Every member of an ensemble rolls all commands out by itself.

    Args:
        members: an objective each.
        risk: makes one cost of theirs.
    """

    def __init__(self, members: Sequence[Objective], risk: Risk) -> None:
        self.members, self.risk = members, risk

    def __call__(self, x: Tensor, commands: Tensor, parameters: Parameters) -> Tensor:
        """Return costs (N,) of ``commands`` (H, nu, N) from state ``x`` (nx,)."""
        return self.risk(torch.stack([member(x, commands, parameters) for member in self.members]))


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
        self._basis = like(knots.basis, lower)

    def __call__(
        self, belief: Distribution, fixed: Tensor, seed: int, draw: int, x: Tensor, parameters: Any
    ) -> tuple[Tensor, Tensor]:
        """Return candidates and their costs."""
        drawn = belief.mean[..., None] + belief.spread[..., None] * self.noise.draw(seed, draw)
        candidates = torch.cat((fixed, drawn[..., fixed.shape[-1] :]), -1).clamp(self._low, self._high)
        commands = (self._basis @ candidates.flatten(1)).view(self.knots.steps, *candidates.shape[1:])
        return candidates, self.objective(x, commands.clamp(self._low, self._high), parameters)
