"""What stands between a plan and an arm: measurements judged, the ladder, references limited, stops, contacts, clearance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from mbctrl.base.plan import Plan
from mbctrl.base.robot import Robot
from mbctrl.runtime.arming import arming_refusals
from mbctrl.runtime.brake import Brake
from mbctrl.runtime.contact import ContactObserver
from mbctrl.runtime.driver import Driver, JointCommand, RobotState
from mbctrl.runtime.ladder import Conditions, Ladder, LadderSettings, Mode
from mbctrl.runtime.limiter import Limiter
from mbctrl.runtime.loop import Guarding
from mbctrl.runtime.sensors import Reading, SensorCheck, SensorSettings, Verdict
from mbctrl.runtime.watch import ArmWatch, Seen

_REST = 0.02  # [rad/s]
# Of the velocity limits for references: an arm that follows them overshoots a little. A position servo that smooths what it
# follows over 30 ms overshoots by some 20 ms times the acceleration that the reference had when it came to its speed.
_SPEED_SHARE, _SPEED_SHARE_OF_POSITIONS = 0.95, 0.9
_FIRM = 8.0  # [rad/s²], for references to an arm that follows positions and names no limit: none could follow a step of speed
_WAY = 8  # postures on the way to a policy's first reference that are looked at


@dataclass(frozen=True)
class GuardSettings:
    """What is tolerated.

    Args:
        plan_clearance: a plan that comes nearer than this to an obstacle or the arm itself is not followed [m].
        clearance: distance at which to stop [m].
        contact: external torque that counts as contact, as a share of each joint's effort limit; 0: contacts are not looked for.
        hold: how long to hold without a plan before that is a stop [s].
    """

    plan_clearance: float = 0.005
    clearance: float = 0.0
    contact: float = 0.25
    hold: float = 5.0


@dataclass
class Found:
    """What the last period found, for the log."""

    reading: Reading | None = None
    seen: Seen | None = None
    limited: tuple[str, ...] = ()
    external: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Guard(Guarding):
    """Judges every period of a control loop; ``ladder.mode`` is in force, ``furthest`` the largest distance [rad] references
    were ever sent from where plans asked for them.

    The loop calls ``measured`` with each measurement, ``accepts`` with each plan, ``command`` with what it would send.

    Args:
        robot: limits and gains.
        watch: the arm's model; None: contacts, gravity and clearance are not looked at.
        driver: whether it senses torques, and what it follows.
        settings: what is tolerated.
    """

    def __init__(self, robot: Robot, watch: ArmWatch | None, driver: Driver, settings: GuardSettings = GuardSettings()) -> None:
        self.robot, self.watch, self.settings = robot, watch, settings
        self._senses, self._position = driver.senses_torque, driver.follows == "position"
        self.ladder = Ladder(robot, LadderSettings(clearance=settings.clearance))
        self.sensors, self.brake = SensorCheck(robot, _bridging(robot)), Brake(robot)
        self._impedance = robot.control.mode == "impedance"
        self._pick, self._period = robot.command_index, 1 / robot.control.rate
        self._gains = np.asarray(robot.control.stiffness), np.asarray(robot.control.damping)
        self.limiter = Limiter(_modest(robot, self._position)) if self._impedance else None
        self.contact: ContactObserver | None = None
        if watch is not None and self._senses and settings.contact > 0 and robot.nu == robot.nq:
            limits = settings.contact * np.asarray(robot.limits.effort)
            self.contact = ContactObserver(limits, lambda q, v: self._model(q, v).momentum, lambda q, v: self._model(q, v).beta)
        self.counts: Counter[str] = Counter()
        self.found = Found()
        self._plan_faults = self._diverged = 0
        self._before, self._clamped, self._stopped_at = Mode.SAFE, 0.0, 0.0
        self.furthest = 0.0
        self._holding_since: float | None = None
        self._running_since = 0.0
        self._touched = ""
        self._newest: tuple[RobotState, float] | None = None

    def _model(self, q: np.ndarray, v: np.ndarray) -> Seen:
        return self.found.seen if self.found.seen is not None else self.watch(q, v)

    def measured(self, state: RobotState, now: float) -> RobotState | None:
        """Judge a measurement at ``now`` [s]; return the state to go by, None where there never was a good one."""
        reading = self.sensors(state, now)
        self.found.reading, self._newest = reading, (state, now)
        good = reading.state
        if good is None:
            return None
        if reading.verdict is Verdict.GOOD and self.watch is not None:
            self.found.seen = self.watch(good.q, good.v)
            if self.contact is not None:
                felt = self.contact(good.stamp, good.q, good.v, good.tau)
                self.found.external = felt.torque
                self._touched = ", ".join(self.robot.joints[joint] for joint in felt.joints)
        if not self._senses and self.found.seen is not None and self.robot.control.gravity_compensation:
            good = replace(good, gravity=self.found.seen.gravity[self._pick])  # what the robot adds without a word
        return good

    def accepts(self, plan: Plan) -> bool:
        """Return whether a plan may be followed: finite, not of diverged samples only, clear of everything.

        A policy's plan in place of diverged samples counts as diverged, too, but may bridge the time until that is one too many:
        where it says postures, which are as clear, the way there included. Not on arms that follow positions: those are sent the
        positions a plan expects, and a policy's references would be a step from them.
        """
        if not (np.isfinite(plan.u).all() and (plan.x is None or np.isfinite(plan.x).all())):
            self.counts["non-finite plan"] += 1
            self._plan_faults += 1
            return False
        self._plan_faults = 0
        postures = self._postures(plan)
        diverged = not np.isfinite(plan.info.get("best", 0.0))
        self._diverged = self._diverged + 1 if diverged else 0
        if diverged and (not plan.info.get("fallback") or postures is None or self._position):
            self.counts["diverged plan"] += 1
            return False
        if self.watch is not None and postures is not None:
            rows = postures[:: max(1, len(postures) // 16)]
            if not self.watch.clearance(rows[:32]) >= self.settings.plan_clearance:
                self.counts["plan too near"] += 1
                return False
        self.counts["policy's plan followed"] += diverged
        return True

    def _postures(self, plan: Plan) -> np.ndarray | None:
        """Return the postures (T, nq) a plan leads through: as it expects, else from where the arm is to its references and
        along them; None: torques say none."""
        if plan.x is not None:
            return plan.x[:, : self.robot.nq]
        if not self._impedance or self.robot.nu != self.robot.nq or self._newest is None:
            return None
        references = plan.u[:, np.argsort(self._pick)]
        return np.concatenate((np.linspace(self._newest[0].q, references[0], _WAY, endpoint=False), references))

    def refusals(self, joints: tuple[str, ...] | None = None) -> list[str]:
        """Return why the arm may not be armed now, one text each."""
        reading = self.found.reading
        if reading is None or reading.state is None or reading.verdict is not Verdict.GOOD:
            return [reading.reason if reading is not None else "no measurement yet"]
        seen = self.found.seen
        gravity = seen.gravity[self._pick] if seen is not None and self._senses else None
        return arming_refusals(self.robot, reading.state, joints=joints, gravity=gravity)

    def arm(self, t: float) -> list[str]:
        """Leave SAFE or STOP at ``t`` [s], by a person's word; return why not, one text each."""
        if self.ladder.mode < Mode.STOP:
            return []  # armed: to begin anew from the measured position would be a step in the references
        if self._newest is not None:  # the arm is where it now says it is
            self.sensors.reset()
            self.found.reading = self.sensors(*self._newest)
        refused = self.refusals()
        state = self.found.reading.state if self.found.reading is not None else None
        refused = list(dict.fromkeys(self.ladder.rearm(t, state, refused)))
        if not refused and state is not None:
            self._touched, self._holding_since, self._before = "", None, Mode.HOLD
            if self.contact is not None:
                self.contact.reset()
            self.brake.start(t, state.q[self._pick], np.zeros(self.robot.nu))
            if self.limiter is not None:
                self.limiter.reset(state.q[self._pick])
        return refused

    def command(self, t: float, state: RobotState, wanted: JointCommand, holding: bool, planner: bool) -> JointCommand | None:
        """Return what to send at ``t`` [s] in place of ``wanted``; None: the driver's own stop.

        Args:
            state: what ``measured`` gave.
            wanted: the plan's command.
            holding: no valid plan is in force.
            planner: whether the planner answers.
        """
        ladder, before = self.ladder, self._before
        mode = ladder.update(t, self._conditions(t, state, holding, planner))
        if mode is Mode.HOLD:
            self._holding_since = t if self._holding_since is None else self._holding_since
            if t - self._holding_since > self.settings.hold and not planner:
                mode = ladder.escalate(t, Mode.STOP, f"no planner for {self.settings.hold:g} s", 7)
        else:
            self._holding_since = None
        self._before = mode
        if mode is Mode.RUN and before is not Mode.RUN:
            self._running_since = t
        if mode is Mode.SAFE:
            return None
        if mode is not before and mode in (Mode.HOLD, Mode.STOP):
            self._start_braking(t, state)
        if mode is Mode.STOP:
            return self._stopping(t)
        if self.limiter is None:
            return wanted if mode is Mode.RUN else self.brake.command(t, self._gravity())
        reference = wanted.q_ref if mode is Mode.RUN else self.brake.at(t)[0]
        limited = self.limiter(reference)
        self.found.limited = limited.kinds
        if mode is Mode.RUN:
            self.furthest = max(self.furthest, float(np.abs(limited.q - reference).max()))
        self._clamped = min(limited.lasting, t - self._running_since) if limited.persistent else 0.0
        zero = np.zeros(self.robot.nu)
        v_ref = limited.v if self._position else zero  # the plan's spring law damps against rest
        return JointCommand(limited.q, v_ref, *self._gains, wanted.torque if mode is Mode.RUN else zero)

    def _conditions(self, t: float, state: RobotState, holding: bool, planner: bool) -> Conditions:
        reading, seen = self.found.reading, self.found.seen
        clearance = float("inf") if seen is None else min(seen.scene, seen.itself)
        faulty = reading.verdict is Verdict.FAULTY
        return Conditions(
            plan=not holding,
            planner=planner,
            bad_plans=self._plan_faults,
            bad_planning=self._diverged,
            sensor=reading.reason if faulty else "",
            sensor_fault=reading.fault if faulty else 0,
            sensor_lasting=reading.lasting,
            status=self._newest[0].status,  # the state to go by is the last one that was good
            clamped=self._clamped if self.ladder.mode is Mode.RUN else 0.0,
            contact=self._touched,
            clearance=clearance,
            braking=self._overdue(t, state),
        )

    def _overdue(self, t: float, state: RobotState) -> float:
        """Return for how long the arm has been moving after a stop's end [s]."""
        braking = self._before is Mode.STOP and self.ladder.mode is Mode.STOP  # not a stop ordered since: its brake is to come
        if not braking or not self.brake.active or not (np.abs(state.v) > 5 * _REST).any():
            return 0.0
        duration = self.brake.duration
        end = self._stopped_at + (duration if np.isfinite(duration) else 1.0)
        return max(t - end, 0.0)

    def _start_braking(self, t: float, state: RobotState) -> None:
        self._stopped_at = t - self._period  # when the last reference was sent
        t = self._stopped_at
        if self.limiter is not None:
            self.brake.start(t, *self.limiter.motion())
        else:
            self.brake.start(t, state.q[self._pick], state.v[self._pick])

    def _stopping(self, t: float) -> JointCommand:
        # Where positions are followed, giving way has no meaning: its references are none.
        command = self.brake.command(t, self._gravity(), self.ladder.compliant and not self._position)
        # A plan's spring law damps against rest: so does the stop, or its damping torque would jump.
        return command if self._position or not self._impedance else replace(command, v_ref=np.zeros(self.robot.nu))

    def _gravity(self) -> np.ndarray | None:
        seen = self.found.seen
        return None if seen is None or self.robot.control.gravity_compensation else seen.gravity[self._pick]


def _modest(robot: Robot, position: bool) -> Robot:
    """Return the robot with the limits references are kept to, so that the arm keeps to its own."""
    limits = robot.limits
    share = _SPEED_SHARE_OF_POSITIONS if position else _SPEED_SHARE
    changes: dict[str, tuple[float, ...]] = {"velocity": tuple(share * speed for speed in limits.velocity)}
    if position and limits.acceleration is None:
        changes["acceleration"] = (_FIRM,) * robot.nq
    return robot.model_copy(update={"limits": limits.model_copy(update=changes)})


def _bridging(robot: Robot) -> SensorSettings:
    """Return how long measurements may be missing: five periods, and 20 ms at least, which ordinary systems need at times and
    which a Franka arm bridges itself (20 packets)."""
    return SensorSettings(extrapolate=max(5, round(0.02 * robot.control.rate)))
