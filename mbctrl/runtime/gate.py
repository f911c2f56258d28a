"""The safety gate: the last thing every command passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import isfinite

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.numbers import all_finite, some
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import JointCommand, RobotState

# Clamping exactly at a limit would leave rounding and the driver's own interpolation on the wrong side of it.
_RATE_SHARE = 0.95
_ROUNDING = 1e-9  # share of the effort limit that the law's torque may be off by rounding


class SafetyGate:
    """Lets a command through, bounded to the robot's limits; counts every clamp in ``counts``.

    - a non-finite command is replaced by holding the last measured position;
    - a position reference is bounded to the joint limits;
    - a joint at its speed limit takes no torque that speeds it up further;
    - a joint beyond its position limit takes no torque that drives it further;
    - total torque and its rate of change are bounded;
    - a law whose terms are so large that its torque is lost in their rounding becomes a plain torque.

    An arm that ``follows`` positions by a servo of its own has the finite and position rules only; its references are what
    ``mbctrl.runtime.limiter`` keeps within speed and acceleration.

    Where the rules disagree the torque rate comes before speed and position: a torque can only be taken back so fast.

    Measurements that are not finite, or a gravity torque beyond all reason, raise DriverError: there is nothing safe to
    compute from them, the loop stops the robot.
    """

    def __init__(self, robot: Robot, follows: str = "law") -> None:
        self.follows = follows
        limits, self._pick = robot.limits, robot.command_index
        self._low = np.asarray(limits.position_lower)[self._pick]
        self._high = np.asarray(limits.position_upper)[self._pick]
        self._speed = np.asarray(limits.velocity)[self._pick]
        self._effort = np.asarray(limits.effort)
        rate = limits.effort_rate
        self._rate = np.full(robot.nu, np.inf) if rate is None else np.asarray(rate) * _RATE_SHARE
        self.gains = np.asarray(robot.control.stiffness), np.asarray(robot.control.damping)
        self._period = 1 / robot.control.rate
        self._last: JointCommand | None = None
        self._total = np.zeros(robot.nu)
        self._last_stamp = self._measured = 0.0
        self.counts: Counter[str] = Counter()

    def hold(self, state: RobotState) -> JointCommand:
        """Return the command that holds the measured position and damps, with the robot's own gains."""
        zero = np.zeros(len(self._pick))
        return JointCommand(state.q[self._pick], zero, *self.gains, zero)

    def __call__(self, state: RobotState, command: JointCommand, now: float | None = None) -> tuple[JointCommand, bool]:
        """Return the command to send and whether anything was clamped; ``now`` [s], None: the measurement is of now."""
        if not (isfinite(state.stamp) and all_finite(state.q, state.v, state.tau, state.gravity)):
            name = next(name for name in ("q", "v", "tau", "gravity", "stamp") if not np.isfinite(getattr(state, name)).all())
            raise DriverError("the robot reports a number that is not finite", key=f"state.{name}")
        before = self.counts.total()
        if not command.finite():
            self.counts["non-finite"] += 1
            command = self.hold(state)
        reference = command.q_ref.clip(self._low, self._high)
        if some(reference != command.q_ref) and some(command.stiffness):
            self.counts["position"] += 1
            command = replace(command, q_ref=reference)
        if self.follows == "position":  # the torque is the robot's own affair, and there is none to bound
            return command, self.counts.total() > before
        q, v = state.q[self._pick], state.v[self._pick]
        wanted = _torque(command, q, v, state)
        if not all_finite(wanted):  # finite numbers whose product is not
            self.counts["non-finite"] += 1
            command = self.hold(state)
            wanted = np.nan_to_num(_torque(command, q, v, state))
        now = state.stamp if now is None else now
        total = self._within(q, v, wanted, state, now)
        if total is not wanted:
            command = self._shifted(command, q, v, state, total)
        self._last, self._total, self._last_stamp, self._measured = command, total, now, state.stamp
        return command, self.counts.total() > before

    def _shifted(self, command: JointCommand, q: np.ndarray, v: np.ndarray, state: RobotState, total: np.ndarray) -> JointCommand:
        """Return the command with its torque changed so that the law gives ``total`` now."""
        with np.errstate(over="ignore", invalid="ignore"):
            shifted = replace(command, torque=command.torque + (total - (command.at(q, v) + state.gravity)))
        slack = _ROUNDING * self._effort
        if (np.abs(_torque(shifted, q, v, state) - total) <= slack).all():
            return shifted
        # Gains or errors so large that a torque cannot be told from their rounding: nothing of such a law is worth keeping.
        self.counts["ill-conditioned"] += 1
        zero = np.zeros(len(q))
        plain = JointCommand(zero, zero, zero, zero, total - state.gravity)
        if not (np.abs(plain.torque + state.gravity - total) <= slack).all():
            raise DriverError("the robot reports a torque no joint of it can have", key="state.gravity")
        return plain

    def _within(self, q: np.ndarray, v: np.ndarray, wanted: np.ndarray, state: RobotState, now: float) -> np.ndarray:
        """Return the total torque within every limit; the same array if nothing was clamped."""
        total = wanted
        fast = ((v >= self._speed) & (total > state.gravity)) | ((v <= -self._speed) & (total < state.gravity))
        out = ((q <= self._low) & (total < state.gravity)) | ((q >= self._high) & (total > state.gravity))
        for kind, mask in (("velocity", fast), ("position", out)):
            if some(mask):
                self.counts[kind] += 1
                total = np.where(mask, state.gravity, total)
        bounded = total.clip(-self._effort, self._effort)
        if some(bounded != total):
            self.counts["torque"] += 1
            total = bounded
        elapsed = 0.0 if self._last is None else now - self._last_stamp
        news = state.stamp - self._measured  # as much as elapsed where every measurement is of now
        if self._last is None:  # the first command: nothing is known of the time before
            last = state.tau
        elif elapsed < 1.5 * self._period and (news == elapsed or 0.5 * self._period < news < 1.5 * self._period):
            last = self._total
        else:
            # The robot's law went on while the loop, or the measurements, were away; a jump from where it is now is felt at
            # once. What only the measurements caught up with is none, and must not be made one by taking it back.
            last = np.nan_to_num(_torque(self._last, q, v, state))
        last = last.clip(-self._effort, self._effort)
        step = self._rate * min(max(elapsed, 1e-4), self._period)
        limited = total.clip(last - step, last + step)
        if some(limited != total):
            self.counts["torque rate"] += 1
            total = limited
        return total


def _torque(command: JointCommand, q: np.ndarray, v: np.ndarray, state: RobotState) -> np.ndarray:
    """Return the total torque (nu,) [N·m] a law gives; infinite or NaN where its terms are too large."""
    with np.errstate(over="ignore", invalid="ignore"):
        return command.at(q, v) + state.gravity
