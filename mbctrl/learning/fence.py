"""Where the tool may be while exploring: a box, kept by looking ahead with the arm's own physics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbctrl.base.errors import SpecError
from mbctrl.base.robot import Robot
from mbctrl.dynamics.gate import gate_capsules
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.learning.loops import BoxSpec

AHEAD = 1.5  # [s] of stopping that is looked at
_STEP = 0.01  # [s] of it, at most
_SERVO = 0.3  # of 1 / dt: how fast arms that take torques are servoed home
_ENDS = 0.03  # of a joint's range, at either end, that is not used: an arm may be too weak to come away from a stop
_STILL = 1e-3  # [rad/s] or [m/s]: as good as at rest
_SETTLED = 0.25  # of the servo's energy may be left in the end
_SPEED, _RATE = 0.3, 0.9  # a Panda's torque rates are met where its references move at three tenths of its speed limits


class Fence:
    """Tells after which commands the tool can still be stopped inside a box.

    The tool is the capsules of its link and its point. A command is safe if the tool stays inside, and joints in their range,
    while it is in force, for ``dt``, and while the arm is stopped after it: its reference stays where it is, or torques servo
    it home. So there is always a stop at hand that was seen to be safe, as far as was looked ahead. A tool that is in the margin
    already must not go further. An arm too weak to hold itself out may end at a joint's stop all the same, and stay there.

    Args:
        model: the arm.
        physics: its analytic model, of the time step ``dt`` at which commands are chosen; what was learnt does not count.
        box: where the tool may be.
        file: named in errors.
        faster: makes the same of it with compiled rollouts.

    Errors:
        SpecError: for a box in which the tool is not at home.
    """

    def __init__(
        self,
        model: Model,
        physics: RigidBodyDynamics,
        box: BoxSpec,
        file: str | Path | None = None,
        faster: Callable[[RigidBodyDynamics], Any] = lambda arm: arm,
    ) -> None:
        robot, dt = model.robot, physics.dt
        self._arm, self._box, self._file, self._n = physics, box, file, robot.nq
        self._pick, self._torque = robot.command_index, robot.control.mode == "torque"
        self._home, self._limit = np.asarray(robot.home, float), np.asarray(robot.limits.effort)
        tool = model.tree.frames[robot.tool]
        shapes = [*gate_capsules(model.tree, tool), (tool.position, tool.position, 0.0, tool.link)]
        self._link = tool.link
        self._ends = np.array([end for a, b, *_ in shapes for end in (a, b)])  # (P, 3)
        self._radius = np.repeat([radius for _, _, radius, _ in shapes], 2)[:, None]
        self._parts = max(1, int(np.ceil(dt / _STEP - 1e-6)))
        self._most = changes(robot, dt)
        limits = robot.limits
        low, high = (np.asarray(side)[:, None] for side in (limits.position_lower, limits.position_upper))
        self._range = low + _ENDS * (high - low), high - _ENDS * (high - low)
        within = 0.5 if self._torque else 1.0  # a reference is compared with the state at a step's end
        self._at = np.ones(self._parts) if stepwise(robot, dt) else (np.arange(self._parts) + within) / self._parts
        self._steps, self._mass = int(np.ceil(AHEAD / dt)), self._felt()
        self._gains = (_SERVO / dt) ** 2 * self._mass, 2 * _SERVO / dt * self._mass  # critically damped, for the arm at home
        self._step = faster(physics).with_dt(dt / self._parts)
        self._started = False
        if self.outside(self._home[:, None])[0] > -box.margin:
            raise SpecError(self._said("the tool at home", self._home), file=file, key="learn.box")

    def safe(self, x: np.ndarray, last: np.ndarray, commands: np.ndarray) -> np.ndarray:
        """Return which ``commands`` (C, nu) may be given next, (C,).

        Args:
            x: (nx,) the state they begin at.
            last: (nu,) the command in force, from which they set out.

        Errors:
            SpecError: the first time, for a state whose tool is not inside.
        """
        start, before = np.repeat(x[:, None], len(commands), 1), np.repeat(last[:, None], len(commands), 1)
        states = self._rolled(start, self._between(before, commands.T))
        whole = np.concatenate([states, self._stopped(states[-1], commands.T)])
        every = whole[:, : self._n]
        out = self.outside(every.transpose(1, 0, 2).reshape(self._n, -1)).reshape(len(every), -1)
        now = float(out[0, 0])
        if not self._started and now > 0:
            raise SpecError(self._said("the tool at the start", x[: self._n]), file=self._file, key="learn.box")
        self._started = True
        over = np.maximum(every - self._range[1], self._range[0] - every).max(1)
        inside = (out.max(0) <= max(-self._box.margin, now)) & (over.max(0) <= max(0.0, over[0, 0]))
        return inside & self._settles(whole) & np.isfinite(out).all(0)

    def stop(self, x: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return the command (nu, ...) that stops the arm from a state (nx, ...); ``last`` (nu, ...) is in force."""
        if not self._torque:
            return last
        shape = (-1, *[1] * (x.ndim - 1))
        home, limit, most, k, d = (one.reshape(shape) for one in (self._home[self._pick], self._limit, self._most, *self._gains))
        q, v = x[: self._n][self._pick], x[self._n :][self._pick]
        return (k * (home - q) - d * v).clip(-limit, limit).clip(last - most, last + most)

    def outside(self, q: np.ndarray) -> np.ndarray:
        """Return how far the tool sticks out of the box at ``q`` (n, N), (N,) [m]; below 0: that far inside."""
        arm = self._arm
        poses = arm.poses(torch.as_tensor(np.ascontiguousarray(q), dtype=arm.dtype))
        points = arm.points(poses, self._link, self._ends).double().numpy().transpose(1, 0, 2)  # (3, P, N)
        low, high = (np.asarray(side)[:, None, None] for side in (self._box.low, self._box.high))
        return np.maximum(points + self._radius - high, low - points + self._radius).max((0, 1))

    def _between(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return the commands (parts, nu, C) of a step in which they go from one to the other, (nu, C)."""
        return first + self._at[:, None, None] * (second - first)

    def _stopped(self, x: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return states (T, nx, C) while the arm is stopped from ``x`` (nx, C); ``last`` (nu, C) is in force."""
        if not self._torque:
            return self._rolled(x, np.repeat(last[None], self._steps * self._parts, 0))[1:]
        states = []
        for _ in range(self._steps):
            command = self.stop(x, last)
            states.append(self._rolled(x, self._between(last, command))[1:])
            x, last = states[-1][-1], command
        return np.concatenate(states)

    def _settles(self, states: np.ndarray) -> np.ndarray:
        """Return where driven joints servoed home come there (C,), by the servo's energy in ``states`` (T, nx, C); holding does.

        Without it arms too weak to hold themselves out are let into swings that no look-ahead tells the end of.
        """
        if not self._torque:
            return np.ones(states.shape[2], bool)
        k, mass = (one[:, None] for one in (self._gains[0], self._mass))
        q, v = (part[:, self._pick] for part in np.split(states, 2, axis=1))
        energy = (k * (q - self._home[self._pick, None]) ** 2 + mass * v**2).sum(1)
        return energy[-1] <= np.maximum(_SETTLED * energy.max(0), _STILL**2 * mass.sum())

    def _rolled(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return states (H+1, nx, C) from ``x`` (nx, C) under ``u`` (H, nu, C)."""
        if not isinstance(self._step, RigidBodyDynamics):
            return np.asarray(self._step.rollout(x, u), float)
        with torch.inference_mode():
            rows = (torch.as_tensor(np.ascontiguousarray(values), dtype=self._arm.dtype) for values in (x, u))
            return self._step.rollout(*rows).double().numpy()

    def _felt(self) -> np.ndarray:
        """Return the mass that each driven joint feels at home, (nu,)."""
        q = torch.as_tensor(self._home, dtype=self._arm.dtype)[:, None]
        inverse = np.linalg.inv(self._arm.terms(q, torch.zeros_like(q)).mass_matrix[:, :, 0].double().numpy())
        return np.diag(np.linalg.inv(inverse[np.ix_(self._pick, self._pick)]))

    def _said(self, what: str, q: np.ndarray) -> str:
        off = float(self.outside(q[:, None])[0])
        where = f"{off:.3f} m outside" if off > 0 else f"{-off:.3f} m from its walls"
        return f"expected {what} inside, {self._box.margin:g} m from its walls, found {where}"


def changes(robot: Robot, dt: float) -> np.ndarray:
    """Return by how much commands may change in ``dt`` [s], (nu,): references at a share of speed limits, torques of their rates.

    Infinite for robots that take one command a step, which is in force at once, and for those without a limit.
    """
    limits = robot.limits
    if robot.control.mode == "impedance":
        return _SPEED * dt * np.asarray(limits.velocity)[robot.command_index]
    if limits.effort_rate is None or stepwise(robot, dt):
        return np.full(robot.nu, np.inf)
    return _RATE * dt * np.asarray(limits.effort_rate)


def stepwise(robot: Robot, dt: float) -> bool:
    """Return whether a robot takes one command a step of ``dt`` [s], not many along it."""
    return round(dt * robot.control.rate) <= 1
