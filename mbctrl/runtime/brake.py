"""Coming to rest: the shortest stop within acceleration and jerk limits, or damping where an arm takes torques only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import JointCommand

_DECELERATION = 10.0  # [rad/s²] chosen, for a robot without a limit of its own; the simulated arms brake with the same
_JERK = 1e9  # [rad/s³], of a robot without a limit: none to speak of


@dataclass(frozen=True)
class MotionLimits:
    """What a reference may do, (nu,) each: [rad], [rad/s], [rad/s²], [rad/s³].

    ``acceleration`` is what a planned motion uses, always finite; ``allowed`` what a reference from outside may have,
    infinite where robot.yaml says nothing. ``jerk`` is infinite where robot.yaml says nothing.
    """

    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    allowed: np.ndarray
    jerk: np.ndarray

    @classmethod
    def of(cls, robot: Robot) -> MotionLimits:
        """Return the limits of the actuated joints."""

        def picked(values: tuple[float, ...] | None, otherwise: np.ndarray | float = np.inf) -> np.ndarray:
            return np.array(values)[robot.command_index] if values else np.broadcast_to(otherwise, robot.nu).copy()

        limits = robot.limits
        velocity, jerk = picked(limits.velocity), picked(limits.jerk)
        # A jerk limit alone implies one: the acceleration at which the speed has gone from one limit to the other.
        implied = np.sqrt(2 * velocity * jerk)
        allowed = picked(limits.acceleration, implied)
        used = np.where(np.isfinite(allowed), allowed, _DECELERATION)
        return cls(picked(limits.position_lower), picked(limits.position_upper), velocity, used, allowed, jerk)


@dataclass(frozen=True)
class Stop:
    """A stop, every joint for itself and as short as its limits allow: the acceleration is brought to a peak, held, and
    brought back to 0, all at the jerk limit.

    ``q``, ``v``, ``a`` (n,) are where it begins, ``times`` (3, n) how long the three parts last [s], ``jerks`` (3, n).
    """

    q: np.ndarray
    v: np.ndarray
    a: np.ndarray
    times: np.ndarray
    jerks: np.ndarray

    @classmethod
    def plan(cls, q: np.ndarray, v: np.ndarray, a: np.ndarray, acceleration: np.ndarray, jerk: np.ndarray) -> Stop:
        """Return the stop from ``q`` [rad], ``v`` [rad/s] and ``a`` [rad/s²] (n,), all finite, within limits (n,).

        With a peak p of the acceleration against the motion, u the speed to lose and a the acceleration in that direction
        to begin with, ``u = (2 p² - a²) / (2 jerk)``; where p is more than allowed the rest of u is lost while it is held.
        """
        jerk = np.minimum(jerk, _JERK)
        way = np.where(v + a * np.abs(a) / (2 * jerk) > 0, -1.0, 1.0)  # against the speed that is left when a is taken back
        lose, given = -way * v, way * a
        peak = np.minimum(np.sqrt(np.maximum(jerk * lose + given**2 / 2, 0.0)), acceleration)
        hold = (lose - (peak**2 - given**2 / 2) / jerk) / acceleration
        times = np.maximum([(peak - given) / jerk, hold, peak / jerk], 0.0)
        return cls(q, v, a, times, np.array([way * jerk, np.zeros_like(q), -way * jerk]))

    @property
    def duration(self) -> float:
        """How long it takes [s]."""
        return float(self.times.sum(0).max())

    def at(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return position [rad], velocity [rad/s] and acceleration [rad/s²] (n,) at ``t`` [s] after the beginning."""
        q, v, a, left = self.q, self.v, self.a, t
        for time, jerk in zip(self.times, self.jerks):
            part = np.minimum(time, left)
            q = q + part * (v + part * (a / 2 + part * jerk / 6))
            v = v + part * (a + part * jerk / 2)
            a = a + part * jerk
            left = left - part
        rest = left > 0
        return q, np.where(rest, 0.0, v), np.where(rest, 0.0, a)

    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest position (n,) [rad] on the way."""
        end = self.at(np.inf)[0]
        # The speed changes sign only while an acceleration is taken back that is too much: in the first part.
        inner = self.a**2 - 2 * self.jerks[0] * self.v
        turn = np.clip((np.abs(self.a) - np.sqrt(np.maximum(inner, 0.0))) / np.abs(self.jerks[0]), 0.0, self.times[0])
        turn = np.where((self.a * self.v < 0) & (self.a * self.jerks[0] < 0), turn, 0.0)
        between = self.q + turn * (self.v + turn * (self.a / 2 + turn * self.jerks[0] / 6))
        ways = np.array([self.q, between, end])
        return ways.min(0), ways.max(0)


class Brake:
    """One stop: ``start`` once, then ``command`` every control period until ``duration`` has passed, and after it to hold.

    An arm under joint impedance follows a planned stop. One that takes torques only is damped: with robot.yaml's damping,
    or where that is 0 with full effort at the velocity limit; how long that takes nobody knows in advance.
    """

    def __init__(self, robot: Robot) -> None:
        self._torque_mode = robot.control.mode == "torque"
        self._stiffness, damping = np.array(robot.control.stiffness), np.array(robot.control.damping)
        limits = MotionLimits.of(robot)
        self._damping = np.where(damping > 0, damping, np.array(robot.limits.effort) / limits.velocity)
        self._limits, self._n = limits, robot.nu
        self._stop: Stop | None = None
        self._started = 0.0

    def start(self, t: float, q: np.ndarray, v: np.ndarray, a: np.ndarray | None = None) -> None:
        """Brake from the reference in force at ``t`` [s]: (nu,) [rad], [rad/s], [rad/s²].

        Errors:
            DriverError: for numbers that are not finite.
        """
        limits, zero = self._limits, np.zeros(self._n)
        a = zero if a is None or not np.isfinite(limits.jerk).all() else a
        if not all(np.isfinite(part).all() for part in (q, v, a)):
            raise DriverError("a stop cannot begin at a number that is not finite", key="brake")
        # Beyond a limit there is no admissible stop; clipped, the reference brakes harder than it could and the arm follows.
        v, a = np.clip(v, -limits.velocity, limits.velocity), np.clip(a, -limits.acceleration, limits.acceleration)
        self._stop, self._started = Stop.plan(np.array(q, float), v, a, limits.acceleration, limits.jerk), t

    @property
    def active(self) -> bool:
        """Whether a stop was started."""
        return self._stop is not None

    @property
    def duration(self) -> float:
        """Time from ``start`` to rest [s]; NaN where the arm is only damped, or before ``start``."""
        return float("nan") if self._stop is None or self._torque_mode else self._stop.duration

    def at(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the reference (nu,) [rad] and its velocity [rad/s] at ``t`` [s]; at rest after the stop.

        Errors:
            DriverError: before ``start``.
        """
        if self._stop is None:
            raise DriverError("no stop was started", key="brake")
        return self._stop.at(max(t - self._started, 0.0))[:2]

    def command(self, t: float, gravity: np.ndarray | None = None, compliant: bool = False) -> JointCommand:
        """Return the law to apply at ``t`` [s].

        Args:
            gravity: (nu,) torque that holds the arm against gravity [N·m] where it does not hold itself; None: zeros.
            compliant: give way after a contact: damped only, whatever the mode.
        """
        zero = np.zeros(self._n)
        torque = zero if gravity is None else np.asarray(gravity, float)
        if self._torque_mode or compliant:
            return JointCommand(zero, zero, zero, self._damping, torque)
        return JointCommand(*self.at(t), self._stiffness, self._damping, zero)

    def release(self) -> None:
        """Forget the stop."""
        self._stop = None
