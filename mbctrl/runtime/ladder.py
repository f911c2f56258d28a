"""The safety ladder: RUN, HOLD, STOP, SAFE. Down by itself, up only by hand; which fault leads where is one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import RobotState, Status


class Mode(IntEnum):
    """What the arm does, from the best to the worst."""

    RUN = 0  # follows plans
    HOLD = 1  # follows the last plan's tail to rest and stays there
    STOP = 2  # brakes and stays there, until re-armed
    SAFE = 3  # the driver's own stop, until re-armed


@dataclass(frozen=True)
class Conditions:
    """What a control period found; everything at its default is a period in which all is well.

    Args:
        plan: whether a valid plan is in force (not exhausted, not too old).
        planner: whether the planner's process lives and answers.
        bad_plans: plans in a row that were not finite.
        bad_planning: plans in a row all of whose samples diverged.
        sensor: why measurements are FAULTY, empty when they are not; ``sensor_fault`` its number in the fault table.
        sensor_lasting: for how long they have been [s].
        status: what the robot says of itself.
        clamped: for how long references or torques have been limited without a break [s].
        contact: the joint an unexpected contact was felt at, empty without one.
        clearance: smallest distance to itself or the scene [m], on the state and the plan.
        braking: by how much a stop is overdue [s]: the arm still moves although its brake has ended.
        robot: whether the driver's process lives and takes commands.
    """

    plan: bool = True
    planner: bool = True
    bad_plans: int = 0
    bad_planning: int = 0
    sensor: str = ""
    sensor_fault: int = 0
    sensor_lasting: float = 0.0
    status: Status = Status.OK
    clamped: float = 0.0
    contact: str = ""
    clearance: float = float("inf")
    braking: float = 0.0
    robot: bool = True


@dataclass(frozen=True)
class LadderSettings:
    """When a condition is one too many.

    Args:
        bad_plans, bad_planning: how many in a row.
        sensor_lasting: after how long without measurements a stop gives way to the driver's own [s].
        clamped: for how long limiting may last [s].
        clearance: distance below which to stop [m].
        braking: by how much a stop may be overdue [s].
        rest_speed: joint speed below which the arm may be re-armed [rad/s].
    """

    bad_plans: int = 3
    bad_planning: int = 3
    sensor_lasting: float = 0.2
    clamped: float = 0.5
    clearance: float = 0.0
    braking: float = 0.5
    rest_speed: float = 0.02


@dataclass(frozen=True)
class Reaction:
    """Where to go and why; ``fault`` is the number in the fault table, ``compliant`` whether a stop is to give way."""

    mode: Mode
    reason: str = ""
    fault: int = 0
    compliant: bool = False


@dataclass(frozen=True)
class _Rule:
    fault: int | Callable[[Conditions], int]
    mode: Mode
    holds: Callable[[Conditions, LadderSettings], bool]
    reason: Callable[[Conditions], str]
    compliant: bool = False


# The fault table's rows that the control process sees; of those that hold the worst mode wins, then the first.
# "not <=" and "not >" so that a figure that is not a number counts as the fault.
RULES = (
    _Rule(17, Mode.SAFE, lambda c, s: not c.status.usable, lambda c: f"the robot reports {c.status.value}"),
    _Rule(9, Mode.SAFE, lambda c, s: not c.robot, lambda c: "the driver no longer answers"),
    _Rule(
        lambda c: c.sensor_fault,
        Mode.SAFE,
        lambda c, s: bool(c.sensor) and not c.sensor_lasting < s.sensor_lasting,
        lambda c: f"{c.sensor}, for {c.sensor_lasting:.2f} s",
    ),
    _Rule(13, Mode.SAFE, lambda c, s: not c.braking <= s.braking, lambda c: f"still moving {c.braking:.2f} s after a stop's end"),
    _Rule(lambda c: c.sensor_fault, Mode.STOP, lambda c, s: bool(c.sensor), lambda c: c.sensor),
    _Rule(16, Mode.STOP, lambda c, s: bool(c.contact), lambda c: f"contact felt at {c.contact}", compliant=True),
    _Rule(15, Mode.STOP, lambda c, s: not c.clearance > s.clearance, lambda c: f"{c.clearance:.3f} m from a collision"),
    _Rule(1, Mode.STOP, lambda c, s: c.bad_plans >= s.bad_plans, lambda c: f"{c.bad_plans} plans in a row were not finite"),
    _Rule(13, Mode.STOP, lambda c, s: not c.clamped <= s.clamped, lambda c: f"limited for {c.clamped:.2f} s without a break"),
    _Rule(
        3,
        Mode.HOLD,
        lambda c, s: c.bad_planning >= s.bad_planning,
        lambda c: f"every sample diverged in {c.bad_planning} plans in a row",
    ),
    _Rule(7, Mode.HOLD, lambda c, s: not c.planner, lambda c: "the planner no longer answers"),
    _Rule(6, Mode.HOLD, lambda c, s: not c.plan, lambda c: "no valid plan"),
)


def reaction(conditions: Conditions, settings: LadderSettings | None = None) -> Reaction:
    """Return the mode that ``conditions`` call for, RUN without a reason when all is well."""
    settings = settings or LadderSettings()
    found = [rule for rule in RULES if rule.holds(conditions, settings)]
    if not found:
        return Reaction(Mode.RUN)
    rule = max(found, key=lambda rule: rule.mode)  # the first of the worst
    fault = rule.fault(conditions) if callable(rule.fault) else rule.fault
    return Reaction(rule.mode, rule.reason(conditions), fault, rule.compliant)


@dataclass(frozen=True)
class Change:
    """A change of mode at ``t`` [s]."""

    t: float
    before: Mode
    after: Mode
    reason: str
    fault: int = 0


class Ladder:
    """The mode in force, SAFE until armed for the first time; ``changes`` is its history.

    ``update`` once a period goes down as far as the conditions call for. The one way up by itself is from HOLD to RUN, when
    they call for RUN. STOP and SAFE last until ``rearm``. A stop once rigid may become compliant, not the reverse.
    """

    def __init__(self, robot: Robot, settings: LadderSettings | None = None) -> None:
        self.settings, self._joints = settings or LadderSettings(), robot.joints
        self.mode, self.compliant = Mode.SAFE, False
        self.changes: list[Change] = []

    @property
    def reason(self) -> str:
        """Why the present mode is in force."""
        return self.changes[-1].reason if self.changes else "not armed"

    def update(self, t: float, conditions: Conditions) -> Mode:
        """Apply the fault table at ``t`` [s]; return the mode in force."""
        found = reaction(conditions, self.settings)
        if found.mode is Mode.RUN:
            if self.mode is Mode.HOLD:
                self._change(t, Mode.RUN, "a valid plan", 0)
            return self.mode
        self.compliant |= found.compliant and found.mode is Mode.STOP
        return self.escalate(t, found.mode, found.reason, found.fault)

    def escalate(self, t: float, mode: Mode, reason: str, fault: int = 0) -> Mode:
        """Go down to ``mode`` at ``t`` [s]; nothing happens where the present one is as bad. Return the mode in force."""
        if mode > self.mode:
            self._change(t, mode, reason, fault)
        return self.mode

    def rearm(self, t: float, state: RobotState | None, refusals: Sequence[str] = ()) -> list[str]:
        """Leave STOP or SAFE for HOLD at ``t`` [s]; a person asked for it.

        Args:
            state: the newest good measurement, None if there is none.
            refusals: what pre-arm checks found (``mbctrl.runtime.arming``).

        Returns: why it was refused, one text each; empty when done, or when there was nothing to re-arm.
        """
        if self.mode < Mode.STOP:
            return []
        found = [*refusals]
        if state is None:
            return [*found, "no good measurement"]
        if not state.status.usable:
            found.append(f"status: found {state.status.value}, expected {Status.OK.value}")
        fast = ~(np.abs(state.v) <= self.settings.rest_speed)
        found += [
            f"{self._joints[joint]}: moves at {state.v[joint]:.3g} rad/s, expected at most {self.settings.rest_speed:g} rad/s"
            for joint in np.flatnonzero(fast)
        ]
        if not found:
            self.compliant = False
            self._change(t, Mode.HOLD, "armed by hand", 0)
        return found

    def _change(self, t: float, mode: Mode, reason: str, fault: int) -> None:
        self.changes.append(Change(t, self.mode, mode, reason, fault))
        self.mode = mode
