"""A plan as it travels from the planner to the control loop, and the follower that turns it into commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_JOINT_BLEND = 3.0


@dataclass(frozen=True)
class Plan:
    """A time-indexed plan; times are the control loop's monotonic clock [s].

    Args:
        seq: sequence number, counting from 1.
        stamp: when the state it was planned from was measured [s].
        t0: time of the first command sample [s].
        dt: spacing of the samples [s].
        u: (H+1, nu) commands at ``t0 + k dt``: joint references [rad] or torques [N·m].
        x: (H+1, nq + nv) planned states at the same times, or None.
        info: figures of the planning step (cost, ess, nonfinite, cpu [s], …).
        fan: (F, H+1, 3) tool paths of some samples, for display, or None.
    """

    seq: int
    stamp: float
    t0: float
    dt: float
    u: np.ndarray
    x: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    fan: np.ndarray | None = None

    @property
    def end(self) -> float:
        """Time of the last sample [s]; after it the plan is exhausted."""
        return self.t0 + (len(self.u) - 1) * self.dt

    def command(self, t: float) -> np.ndarray:
        """Return the command (nu,) at time ``t``, linear between samples and held at both ends."""
        return _interpolate(self.u, (t - self.t0) / self.dt)

    def state(self, t: float) -> np.ndarray | None:
        """Return the planned state (nx,) at time ``t``, or None."""
        return None if self.x is None else _interpolate(self.x, (t - self.t0) / self.dt)

    def joints(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Return planned positions and velocities (n,) at time ``t``: cubic between samples, so that velocity has no steps.

        Held at both ends, at rest after the last. Errors: ValueError where the plan has no states.
        """
        if self.x is None:
            raise ValueError("the plan has no states")
        n, h = self.x.shape[1] // 2, self.dt
        index = min(max((t - self.t0) / h, 0.0), len(self.x) - 1.0)
        low = min(int(index), len(self.x) - 2)
        a, b, s = self.x[low], self.x[low + 1], index - low
        q0, v0, q1, v1 = a[:n], h * a[n:], b[:n], h * b[n:]
        c2, c3 = 3 * (q1 - q0) - 2 * v0 - v1, 2 * (q0 - q1) + v0 + v1
        q = q0 + s * (v0 + s * (c2 + s * c3))
        v = (v0 + s * (2 * c2 + 3 * s * c3)) / h
        return q, v if t < self.end else np.zeros(n)


def _interpolate(rows: np.ndarray, index: float) -> np.ndarray:
    index = min(max(index, 0.0), len(rows) - 1.0)
    low = min(int(index), len(rows) - 2) if len(rows) > 1 else 0
    part = index - low
    return rows[low] if part == 0.0 else rows[low] * (1 - part) + rows[low + 1] * part


@dataclass(frozen=True)
class Following:
    """What a follower is doing, as a value: the plan in force and the jump it is still smoothing out."""

    seq: int
    switched: float
    offset: np.ndarray | None


class PlanFollower:
    """Turns successive plans into one continuous command signal.

    A new plan takes over at once; the jump between the two command signals decays linearly over ``blend`` seconds,
    because stepwise references make arms stutter and would trip the torque-rate limit.
    """

    def __init__(self, blend: float) -> None:
        self.blend = blend
        self.plan: Plan | None = None
        self._switched = 0.0
        self._offset: np.ndarray | None = None
        self._joints: tuple[np.ndarray, np.ndarray] | None = None  # the jump of planned positions and velocities

    @property
    def following(self) -> Following | None:
        """The follower's state, to be handed to a predictor."""
        return None if self.plan is None else Following(self.plan.seq, self._switched, self._offset)

    def resume(self, plan: Plan, following: Following) -> None:
        """Take up the state another follower reported for ``plan``."""
        self.plan, self._switched, self._offset = plan, following.switched, following.offset

    def switch(self, plan: Plan, t: float) -> None:
        """Put ``plan`` in force at time ``t`` [s]."""
        smooth = self.plan is not None and self.blend > 0
        self._offset = self.command(t) - plan.command(t) if smooth else None
        jump = None
        if smooth and plan.x is not None and self.plan.x is not None:
            before, after = self.joints(t), plan.joints(t)
            jump = before[0] - after[0], before[1] - after[1]
        self._joints = jump
        self.plan, self._switched = plan, t

    def command(self, t: float) -> np.ndarray:
        """Return the command (nu,) at time ``t`` [s].

        Errors:
            ValueError: before the first plan.
        """
        if self.plan is None:
            raise ValueError("no plan in force")
        u = self.plan.command(t)
        if self._offset is None:
            return u
        left = 1 - (t - self._switched) / self.blend
        return u + self._offset * left if left > 0 else u

    def joints(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Return planned positions and velocities (n,) at time ``t`` [s] for an arm that follows positions.

        The jump between two plans decays over three times ``blend`` with continuous velocity.

        Errors:
            ValueError: before the first plan, or where plans have no states.
        """
        if self.plan is None:
            raise ValueError("no plan in force")
        q, v = self.plan.joints(t)
        span = _JOINT_BLEND * self.blend
        s = (t - self._switched) / span if self._joints is not None and span > 0 else 1.0
        if s >= 1:
            return q, v
        dq, dv = self._joints
        rest = (1 - s) ** 2  # the cubic from (dq, dv) to rest at nothing
        q = q + rest * ((1 + 2 * s) * dq + s * span * dv)
        return q, v + (1 - s) * (-6 * s / span * dq + (1 - 3 * s) * dv)

    def restart(self, t: float, q: np.ndarray, v: np.ndarray) -> None:
        """Take the jump to smooth out to be from ``q`` and ``v`` (n,) instead: what was sent before the plan in force."""
        if self.plan is not None and self.plan.x is not None:
            to = self.plan.joints(t)
            self._joints = q - to[0], v - to[1]


@dataclass(frozen=True)
class PlanRequest:
    """What the control loop tells the planner; times are the loop's clock [s].

    Args:
        stamp: when the state was measured.
        x: (nq + nv) the state.
        latency: how long a plan is expected to take [s]; the plan starts that much after ``stamp``. 0: no prediction.
        following: what the control side is doing, or None before the first plan.
        goal: index of the goal's current target.
        goal_time: time since the goal's reference started [s].
        target: a tool pose that overrides the goal's, as position (3,) and rotation (3, 3) or None, or None.
        obstacles: position and velocity of each obstacle at ``stamp``.
        fan: how many sampled tool paths to send back, for display.
        payload: (10,) what the arm carries in the frame of its tool's link: mass [kg], mass times centre of mass [kg·m] and
            inertia xx, xy, yy, xz, yz, zz about the frame's origin [kg·m²]; None: nothing.
        command: (nu,) what led to ``x`` since the request before, as planners mean it: torques' mean, the last of references;
            None: not known.
    """

    stamp: float
    x: np.ndarray
    latency: float = 0.0
    following: Following | None = None
    goal: int = 0
    goal_time: float = 0.0
    target: tuple[np.ndarray, np.ndarray | None] | None = None
    obstacles: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    fan: int = 0
    payload: np.ndarray | None = None
    command: np.ndarray | None = None
