"""The reference limiter: what a plan asks of the joints, made into what they can do and still stop before a limit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.extras import need
from mbctrl.base.numbers import all_finite, some
from mbctrl.base.robot import Robot
from mbctrl.runtime.brake import MotionLimits, Stop

_ROUNDING = 1e-9  # share of a limit that differences of rounded numbers may be off
_INSIDE = 1e-8  # [rad] targets keep to the limits, so that a stop planned onto one does not end beyond it by rounding
_TARGET_SPEED = 0.99  # share of the velocity limit up to which a moving target is followed: some has to be left to catch up
_KINDS = ("non-finite", "position", "velocity", "acceleration", "jerk", "stopping distance")
_TARGET_SHARE = 0.5  # share of the acceleration a moving target is expected to stop with before a position limit


@dataclass(frozen=True)
class LimiterSettings:
    """When limiting counts as persistent.

    Args:
        persistent: for how long without a break it may last [s].
        deviation: what the output may be off from what was asked without being counted [rad]: rounding the corners of an
            interpolated plan is what a limiter is for.
    """

    persistent: float = 0.5
    deviation: float = 0.01


@dataclass(frozen=True)
class Limited:
    """A reference that can be followed: ``q`` (nu,) [rad], ``v`` (nu,) [rad/s].

    ``limited`` (nu,) says which joints are off what was asked, ``kinds`` which limits are why (empty: none), and
    ``lasting`` for how long the worst joint has been far off without a break [s]; ``persistent``: longer than allowed.
    """

    q: np.ndarray
    v: np.ndarray
    limited: np.ndarray
    kinds: tuple[str, ...]
    lasting: float
    persistent: bool


class Limiter:
    """Keeps a stream of joint references within position, velocity, acceleration and jerk limits, one call a period.

    A reference is passed on bit for bit while its differences are within the limits and the arm could still stop before a
    position limit. A joint that asks for more leaves the stream, moves towards it as fast as its limits allow, and joins
    it again where position, velocity and acceleration meet. Each step is taken only if a stop within the limits exists
    after it, else the stop that is known to exist is followed: so no reference can lead past a limit.

    Differences are backward ones of the output, ``v = (q - q_before) / dt`` and so on; robot.yaml's missing acceleration
    and jerk limits are not enforced, but a joint off the stream uses an acceleration of its own (``MotionLimits``).

    The motion of a joint off the stream begins from ``(q, v + a dt / 2, a)``: the motion of constant acceleration through
    the last three outputs. Every difference of what follows is then an average of that motion's derivative, hence bounded.

    ``counts``: periods in which each kind of limit was active.
    """

    def __init__(self, robot: Robot, settings: LimiterSettings | None = None) -> None:
        ruckig = need("ruckig", "deploy", "limiting references")
        self.limits, self._settings = MotionLimits.of(robot), settings or LimiterSettings()
        self._dt, self._n = 1 / robot.control.rate, robot.nu
        self._ruckig, self._solver, self._input = ruckig, ruckig.Ruckig(self._n), ruckig.InputParameter(self._n)
        self._input.synchronization = ruckig.Synchronization.No
        self._input.max_acceleration = self.limits.acceleration.tolist()
        self._input.max_jerk = self.limits.jerk.tolist()
        self._input.target_position = self._input.target_velocity = self._input.target_acceleration = [0.0] * self._n
        limits = self.limits
        self._smooth = all_finite(limits.jerk)
        self._bounds = np.array([limits.velocity, limits.allowed, limits.jerk]) * (1 + _ROUNDING)  # of v, a and jerk
        self._half_per_jerk, self._per_acceleration = 0.5 / limits.jerk, 1 / limits.acceleration
        self._firm = _TARGET_SHARE * limits.acceleration
        self._ramp = self._firm**2 * self._half_per_jerk  # speed given away while the acceleration is brought up
        self._zero, self._none = np.zeros(self._n), np.zeros(self._n, bool)
        self._trajectory = ruckig.Trajectory(self._n)
        self.counts: Counter[str] = Counter()
        self._q: np.ndarray | None = None

    def reset(self, q: np.ndarray, v: np.ndarray | None = None) -> None:
        """Begin at ``q`` (nu,) [rad] with ``v`` (nu,) [rad/s] (None: at rest); the first output is the step after it."""
        limits, self._q = self.limits, np.array(q, float)
        speed = np.zeros(self._n) if v is None else np.clip(v, -limits.velocity, limits.velocity)
        if not all_finite(self._q, speed):
            raise DriverError("a limiter cannot begin at a number that is not finite", key="limiter")
        self._v, self._a = speed, np.zeros(self._n)
        self._off, self._ticks = np.zeros(self._n, bool), np.zeros(self._n, int)  # off the stream, and far off for how many periods
        self._motion = self._q.copy(), speed.copy(), np.zeros(self._n)  # position, velocity, acceleration of the joints off it
        self._asked, self._asked_v = self._q.clip(limits.low, limits.high), speed.copy()

    def motion(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return position [rad], velocity [rad/s] and acceleration [rad/s²] (nu,) in force, to brake from."""
        if self._q is None:
            raise DriverError("the limiter was not reset to where the arm is", key="limiter")
        on = self._after(self._q, self._v, self._a)
        if not some(self._off):
            return on
        return tuple(np.where(self._off, mine, theirs) for mine, theirs in zip(self._motion, on))

    def __call__(self, reference: np.ndarray) -> Limited:
        """Return the reference of the next period, from what the plan asks for: (nu,) [rad], finite or not."""
        start, limits, dt = self.motion(), self.limits, self._dt
        finite = np.isfinite(reference)
        inside = np.where(finite, reference, self._asked).clip(limits.low, limits.high)
        asked_v = (inside - self._asked) / dt
        v = (inside - self._q) / dt
        a = (v - self._v) / dt
        wrong = self._wrong(reference, finite, inside, v, a)
        off = np.logical_or.reduce(wrong)
        joining = self._off & ~off
        if some(joining):
            off |= joining & ~self._meets(v, a, asked_v)
        kinds: tuple[str, ...] = ()
        q, speed = inside, v
        if some(off):
            kinds = tuple(kind for kind, joints in zip(_KINDS, wrong.tolist()) if True in joints) or ("catching up",)
            self._motion = self._move(start, off, inside, np.where(wrong[0] | wrong[1], 0.0, asked_v))
            q, speed = np.where(off, self._motion[0], inside), np.where(off, self._motion[1], v)
            v = (q - self._q) / dt
            a = (v - self._v) / dt
        self._asked, self._asked_v = inside, asked_v
        self._q, self._v, self._a, self._off = q, v, a, off
        far = off & ~(np.abs(q - reference) <= self._settings.deviation)  # what is not finite is far from everything
        self._ticks = (self._ticks + 1) * far
        self.counts.update(kinds)
        lasting = float(self._ticks.max() * dt)
        return Limited(q, speed, off, kinds, lasting, lasting > self._settings.persistent)

    def _after(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the motion that outputs with these last differences stand for."""
        return (q, v + a * (self._dt / 2), a) if self._smooth else (q, v, self._zero)

    def _wrong(self, reference: np.ndarray, finite: np.ndarray, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return (_KINDS, nu) what is wrong with which joint, with the way to a stop that is left after the step."""
        motion, wrong = self._after(q, v, a), np.empty((len(_KINDS), self._n), bool)
        wrong[0], wrong[1] = ~finite, q != reference
        wrong[2:5] = np.abs(np.array([v, a, (a - self._a) / self._dt])) > self._bounds
        wrong[2] |= self._too_fast(motion)
        hopeless = np.logical_or.reduce(wrong[2:5])
        wrong[5] = ~hopeless & self._too_far(motion, hopeless)
        wrong[1:] &= finite
        return wrong

    def _too_fast(self, motion: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the joints whose speed passes its limit before the acceleration can be taken back."""
        _, v, a = motion
        peak = v + a * np.abs(a) * self._half_per_jerk
        return np.maximum(np.abs(v), np.abs(peak)) > self._bounds[0]

    def _too_far(self, motion: tuple[np.ndarray, np.ndarray, np.ndarray], ignored: np.ndarray) -> np.ndarray:
        """Return the joints that cannot stop before a position limit; ``ignored`` ones are not looked at."""
        q, v, a = motion
        limits = self.limits
        # Most steps are far from every limit; there a bound does: never faster than the peak, never longer than the three parts.
        half = self._half_per_jerk
        peak = np.abs(v) + a * a * half
        bound = peak * (peak * self._per_acceleration + (4 * np.abs(a) + 2 * limits.acceleration) * half)
        if not some(~((q - bound > limits.low) & (q + bound < limits.high) | ignored)):
            return self._none
        low, high = self._stop((q, np.where(ignored, 0.0, v), np.where(ignored, 0.0, a))).reach()
        return ((low < limits.low) & (low < q)) | ((high > limits.high) & (high > q))

    def _stop(self, motion: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Stop:
        return Stop.plan(*motion, self.limits.acceleration, self.limits.jerk)

    def _meets(self, v: np.ndarray, a: np.ndarray, asked_v: np.ndarray) -> np.ndarray:
        """Return the joints that can follow the stream from here on, should it go on as it does: the next two steps."""
        limits, dt = self.limits, self._dt
        asked_a = (asked_v - self._asked_v) / dt
        next_a = (asked_v + dt * asked_a - v) / dt
        rates = np.maximum(np.abs(next_a - a), np.abs(asked_a - next_a)) / dt
        return (np.maximum(np.abs(next_a), np.abs(asked_a)) <= limits.acceleration) & (rates <= limits.jerk)

    def _move(
        self, start: tuple[np.ndarray, np.ndarray, np.ndarray], off: np.ndarray, target: np.ndarray, speed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the motion one period on: towards the target where a stop is left after it, else along the stop."""
        step = self._towards(start, off, target, speed)
        if step is not None:
            fine = ~(self._too_fast(step) | self._too_far(step, ~off))
            if not some(off & ~fine):
                return step
        stop = self._stop(start).at(self._dt)
        return stop if step is None else tuple(np.where(fine, a, b) for a, b in zip(step, stop))

    def _towards(
        self, start: tuple[np.ndarray, np.ndarray, np.ndarray], off: np.ndarray, target: np.ndarray, speed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return the time-optimal motion to where a moving target will be met, one period on; None where there is none.

        Planned in the frame that moves with the target, which is at rest there.
        """
        limits, given, out, ramp = self.limits, self._input, self._trajectory, self._ramp
        target = target.clip(limits.low + _INSIDE, limits.high - _INSIDE)
        left = np.where(speed > 0, limits.high - target, target - limits.low)
        most = np.minimum(np.sqrt(ramp * ramp + 2 * self._firm * left) - ramp, _TARGET_SPEED * limits.velocity)
        speed = speed.clip(-most, most)
        given.enabled = off.tolist()
        given.current_position = (start[0] - target + speed * self._dt).tolist()
        given.current_velocity, given.current_acceleration = (start[1] - speed).tolist(), start[2].tolist()
        given.max_velocity, given.min_velocity = (limits.velocity - speed).tolist(), (-limits.velocity - speed).tolist()
        try:
            if self._solver.calculate(given, out).value < 0:
                return None
        except self._ruckig.RuckigError:
            return None
        q, v, a = (np.array(part) for part in out.at_time(self._dt))
        return target + q, v + speed, a
