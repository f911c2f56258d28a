"""Judging measurements: what a robot reports is used only as far as it can be true."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite

import numpy as np

from mbctrl.base.numbers import all_finite, some
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import RobotState


class Verdict(Enum):
    """What to make of a measurement."""

    GOOD = "good"
    HELD = "held"  # the last good one serves, as it was or extrapolated, for a few periods
    FAULTY = "faulty"  # nothing to control by


@dataclass(frozen=True)
class SensorSettings:
    """How much is believed; periods are the robot's control periods.

    Args:
        jump: how many times the velocity limit a joint may seem to move at.
        slack: by how much a joint's position may jump besides [rad].
        stale: age of the robot's stamp up to which a measurement is fresh [periods].
        hold: calls in a row that are bridged with the last good measurement when one is not finite or jumps.
        extrapolate: calls in a row that are bridged by extrapolation when none arrives.
        misordered: calls in a row without one in order until it counts as stale.
        gap: pause between two calls from which on the clock, or the process, is taken to have been away [periods].
    """

    jump: float = 1.5
    slack: float = 2e-3
    stale: float = 3.0
    hold: int = 2
    extrapolate: int = 5
    misordered: int = 20
    gap: float = 50.0


@dataclass(frozen=True)
class Reading:
    """What to go by.

    ``state``: the new measurement, or the last good one as it was or extrapolated; None before the first good one.
    ``count``: how many calls in a row it has been held. ``fault``: its number in the fault table, 0 when GOOD; ``reason``
    says what was found and what was expected. ``lasting``: for how long the verdict has been FAULTY [s].
    """

    state: RobotState | None
    verdict: Verdict
    count: int = 0
    fault: int = 0
    reason: str = ""
    lasting: float = 0.0


class SensorCheck:
    """Judges one measurement a control period; ``counts`` has the kinds of what was wrong, and of lost packets.

    - not finite, or farther from the last good one than the joints can move: held, then faulty (fault 2); a jump that was
      held and stays is faulty until ``reset``: which of the two positions is true is not for the passing of time to decide;
    - older than a few periods by the robot's own stamp, or from the future: extrapolated, then faulty (4);
    - a sequence number that goes back is dropped, none in order for long is faulty (5);
    - a status that takes no commands is faulty at once (17), and so is a pause of the caller's clock (18).
    """

    def __init__(self, robot: Robot, settings: SensorSettings | None = None) -> None:
        self.settings, self._joints = settings or SensorSettings(), robot.joints
        self._period, self._speed = 1 / robot.control.rate, np.array(robot.limits.velocity)
        self._fast = self.settings.jump * self._speed
        self._low, self._high = np.array(robot.limits.position_lower), np.array(robot.limits.position_upper)
        self._sizes = {"q": robot.nq, "v": robot.nq, "tau": robot.nu, "gravity": robot.nu}
        self.counts: Counter[str] = Counter()
        self.reset()

    def reset(self) -> None:
        """Forget the past, as before a person re-arms: the next good measurement is taken wherever the arm then is."""
        self._good: RobotState | None = None
        self._now: float | None = None
        self._held = self._misordered = 0
        self._since: float | None = None
        self._jumped = ""

    def __call__(self, state: RobotState, now: float) -> Reading:
        """Judge the newest measurement at ``now`` [s], the clock its stamp is on; once a control period."""
        reading = self._judged(state, now)
        if reading.verdict is not Verdict.FAULTY:
            self._since = None
            return reading
        self._since = now if self._since is None else self._since
        return replace(reading, lasting=now - self._since)

    def _judged(self, state: RobotState, now: float) -> Reading:
        paused = 0.0 if self._now is None else now - self._now
        self._now = now
        limit = self.settings.gap * self._period
        if not 0 <= paused <= limit:
            self.counts["gap"] += 1
            self._held = 0
            return self._faulty(18, f"the clock went on by {paused:.3f} s between two periods, expected 0 to {limit:.3f} s")
        if not state.status.usable:
            self.counts["status"] += 1
            return self._faulty(17, f"the robot reports {state.status.value}")
        if self._good is not None and state.seq <= self._good.seq:
            return self._no_news(state, now)
        wrong = self._incomplete(state)
        late = "" if wrong else self._late(state, now)
        if late:
            return self._bridged(4, late, self.settings.extrapolate, self._extrapolated(now))
        jumped = "" if wrong else self._jumped or self._impossible(state)
        if wrong or jumped:
            self.counts["unbelievable"] += 1
            reading = self._bridged(2, wrong or jumped, self.settings.hold, self._good)
            self._jumped = jumped if reading.verdict is Verdict.FAULTY else self._jumped
            return reading
        if self._good is not None:
            self.counts["lost"] += state.seq - self._good.seq - 1
        self._good, self._held, self._misordered = state, 0, 0
        return Reading(state, Verdict.GOOD)

    def _no_news(self, state: RobotState, now: float) -> Reading:
        """The last good one again, or one from before it."""
        good = self._good
        self._misordered += 1
        if state.seq < good.seq:
            self.counts["reordered"] += 1
        late = self._late(good, now)
        if late:
            return self._bridged(4, late, self.settings.extrapolate, self._extrapolated(now))
        if self._misordered > self.settings.misordered:
            return self._faulty(5, f"no measurement after number {good.seq} in {self._misordered} periods")
        return Reading(good, Verdict.GOOD)

    def _late(self, state: RobotState, now: float) -> str:
        age, most = now - state.stamp, self.settings.stale * self._period
        if -most <= age <= most + 1e-9:
            return ""
        self.counts["stale"] += 1
        return f"the newest measurement is {1e3 * age:.1f} ms old, expected at most {1e3 * most:.1f} ms"

    def _incomplete(self, state: RobotState) -> str:
        """Return what is not a number, or not one of this robot's, or nothing."""
        for name, size in self._sizes.items():
            part = np.asarray(getattr(state, name))
            if part.shape != (size,):
                return f"{name} has shape {part.shape}, expected ({size},)"
            if not all_finite(part):
                return f"{name} is not finite"
        return "" if isfinite(state.stamp) else f"the stamp is {state.stamp}"

    def _impossible(self, state: RobotState) -> str:
        """Return the joint that moves faster than it can, or nothing."""
        over = np.abs(state.v) - self._fast
        if some(over > 0):
            joint = int(over.argmax())
            return f"{self._joints[joint]} moves at {state.v[joint]:.3g} rad/s, its limit is {self._speed[joint]:g} rad/s"
        if self._good is None:
            return ""
        moved = np.abs(state.q - self._good.q)
        elapsed = max(state.stamp - self._good.stamp, 0.0)
        most = self._fast * elapsed + self.settings.slack
        if some(moved > most):
            joint = int((moved - most).argmax())
            found, expected = f"{moved[joint]:.3g} rad in {1e3 * elapsed:.1f} ms", f"{most[joint]:.3g} rad"
            return f"{self._joints[joint]} jumped by {found}, expected at most {expected}"
        return ""

    def _bridged(self, fault: int, reason: str, most: int, state: RobotState | None) -> Reading:
        self._held += 1
        verdict = Verdict.HELD if state is not None and self._held <= most else Verdict.FAULTY
        return Reading(state, verdict, self._held, fault, reason)

    def _faulty(self, fault: int, reason: str) -> Reading:
        return Reading(self._good, Verdict.FAULTY, self._held, fault, reason)

    def _extrapolated(self, now: float) -> RobotState | None:
        """Return the last good measurement moved on to ``now`` with its velocity, for as long as bridging is allowed."""
        if self._good is None:
            return None
        most = (self.settings.stale + self.settings.extrapolate) * self._period
        ahead = min(max(now - self._good.stamp, 0.0), most)
        low, high = np.minimum(self._low, self._good.q), np.maximum(self._high, self._good.q)
        return replace(self._good, stamp=now, q=(self._good.q + self._good.v * ahead).clip(low, high))
