"""Coming to rest: the shortest stop within acceleration and jerk limits, or damping where an arm takes torques only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.extras import need
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import JointCommand

_DECELERATION = 10.0  # [rad/s²], of a robot without a limit of its own: what arms of this size publish and more than they need


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


class Stopping:
    """Plans stops, every joint for itself and as short as its limits allow.

    Source: Berscheid and Kröger, "Jerk-limited real-time trajectory generation with arbitrary target states" (2021), by
    their library ruckig.

    Errors:
        ExtraError: without ruckig.
    """

    def __init__(self, limits: MotionLimits) -> None:
        self._ruckig = need("ruckig", "deploy", "braking")
        n = len(limits.low)
        self._solver, self._input = self._ruckig.Ruckig(n), self._ruckig.InputParameter(n)
        self._input.control_interface = self._ruckig.ControlInterface.Velocity
        self._input.synchronization = self._ruckig.Synchronization.No
        self._input.target_velocity = self._input.target_acceleration = [0.0] * n
        self._input.max_velocity = limits.velocity.tolist()
        self._input.max_acceleration, self._input.max_jerk = limits.acceleration.tolist(), limits.jerk.tolist()
        self._n = n

    def plan(self, q: np.ndarray, v: np.ndarray, a: np.ndarray):
        """Return the ruckig trajectory from ``q`` (n,) [rad], ``v`` [rad/s], ``a`` [rad/s²] to rest.

        Errors:
            DriverError: for numbers that are not finite.
        """
        given, out = self._input, self._ruckig.Trajectory(self._n)
        given.current_position, given.current_velocity, given.current_acceleration = q.tolist(), v.tolist(), a.tolist()
        try:
            failed = self._solver.calculate(given, out).value < 0
        except self._ruckig.RuckigError as error:
            raise DriverError(f"no stop could be planned: {error}", key="brake") from None
        if failed:
            raise DriverError("no stop could be planned", key="brake")
        return out

    def reach(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return the lowest and highest position (2, n) [rad] on the way to rest."""
        return np.array([(bound.min, bound.max) for bound in self.plan(q, v, a).position_extrema]).T


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
        self._stopping, self._limits, self._n = Stopping(limits), limits, robot.nu
        self._plan = None
        self._started = 0.0

    def start(self, t: float, q: np.ndarray, v: np.ndarray, a: np.ndarray | None = None) -> None:
        """Brake from the reference in force at ``t`` [s]: (nu,) [rad], [rad/s], [rad/s²].

        Errors:
            DriverError: for numbers that are not finite.
        """
        limits = self._limits
        zero = np.zeros(self._n)
        # Beyond a limit there is no admissible stop to plan; clipped, the reference only brakes harder.
        v = np.clip(v, -limits.velocity, limits.velocity)
        a = zero if a is None or not np.isfinite(limits.jerk).all() else np.clip(a, -limits.acceleration, limits.acceleration)
        self._plan, self._started = self._stopping.plan(np.asarray(q, float), v, a), t

    @property
    def active(self) -> bool:
        """Whether a stop was started."""
        return self._plan is not None

    @property
    def duration(self) -> float:
        """Time from ``start`` to rest [s]; NaN where the arm is only damped, or before ``start``."""
        return float("nan") if self._plan is None or self._torque_mode else self._plan.duration

    def at(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the reference (nu,) [rad] and its velocity [rad/s] at ``t`` [s]; at rest after the stop.

        Errors:
            DriverError: before ``start``.
        """
        if self._plan is None:
            raise DriverError("no stop was started", key="brake")
        elapsed = t - self._started
        if elapsed >= self._plan.duration:
            return np.array(self._plan.at_time(self._plan.duration)[0]), np.zeros(self._n)
        q, v, _ = self._plan.at_time(max(elapsed, 0.0))
        return np.array(q), np.array(v)

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
        self._plan = None
