"""The one control loop: read, follow the newest plan, gate, write; planning goes on beside it and is never waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from mbctrl.base.config import LoopSpec
from mbctrl.base.plan import Following, Plan, PlanFollower, PlanRequest
from mbctrl.base.robot import Robot
from mbctrl.runtime.clock import Clock
from mbctrl.runtime.driver import Driver, JointCommand, RobotState
from mbctrl.runtime.gate import SafetyGate


class PlannerPort(ABC):
    """Where plans are asked for and come from."""

    @abstractmethod
    def submit(self, request: PlanRequest) -> None:
        """Ask for a plan; only when ``busy`` is False."""

    @abstractmethod
    def poll(self, t: float) -> Plan | None:
        """Return a plan that is ready at time ``t`` [s], once, or None; never waits."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a plan is under way."""

    @property
    def alive(self) -> bool:
        """Whether the planner answers, as far as this side can tell."""
        return True

    def close(self) -> None:
        """Let go of the planner."""


class Guarding(ABC):
    """What a loop asks of whatever stands between plans and an arm; see ``mbctrl.runtime.guard``."""

    @abstractmethod
    def measured(self, state: RobotState, now: float) -> RobotState | None:
        """Return the state to go by; None: there is none yet, nothing is sent."""

    @abstractmethod
    def accepts(self, plan: Plan) -> bool:
        """Return whether a plan may be followed."""

    @abstractmethod
    def command(self, t: float, state: RobotState, wanted: JointCommand, holding: bool, planner: bool) -> JointCommand | None:
        """Return what to send in place of ``wanted``; None: nothing any more, the driver's own stop."""


class InlinePort(PlannerPort):
    """Plans in the caller's thread and hands the plan over ``latency`` seconds later: lockstep."""

    def __init__(self, plan: Callable[[PlanRequest], Plan], latency: float) -> None:
        self._plan, self._latency = plan, latency
        self._ready: tuple[float, Plan] | None = None

    def submit(self, request: PlanRequest) -> None:
        """Plan now."""
        self._ready = (request.stamp + self._latency, self._plan(request))

    def poll(self, t: float) -> Plan | None:
        """Return the plan once its latency has passed."""
        if self._ready is None or t + 1e-9 < self._ready[0]:
            return None
        plan, self._ready = self._ready[1], None
        return plan

    @property
    def busy(self) -> bool:
        """Whether a plan waits for its latency to pass."""
        return self._ready is not None


@dataclass
class Tick:
    """What one control period saw and did."""

    t: float
    state: RobotState
    command: np.ndarray  # (nu,) what the plan asked for: references or torques
    clamped: bool
    plan: Plan | None  # in force
    arrived: Plan | None  # taken over in this period
    latency: float  # of the arrived plan [s]
    holding: bool  # no valid plan
    sent: JointCommand | None = None  # after guard and gate; None: nothing


@dataclass
class Counts:
    """What went wrong, for the result screen."""

    ticks: int = 0
    missed: int = 0  # control periods that started more than a period late
    held: int = 0  # periods without a valid plan, after the first plan
    plans: int = 0
    late: int = 0  # plans that took longer than the planning period
    latencies: list[float] = field(default_factory=list)  # [s]
    lateness: list[float] = field(default_factory=list)  # of the ticks [s]


class ControlLoop:
    """Runs a robot from plans.

    Args:
        robot, driver, port, clock: what moves, what plans, what time it is.
        spec: rates, prediction, blending.
        request: completes a request: given time and state, returns it without ``latency`` and ``following``.
        observe: called with every Tick; returns False to end the run.
        guard: for an arm; None: a simulation that may do as it likes, within the gate.
    """

    def __init__(
        self,
        robot: Robot,
        driver: Driver,
        port: PlannerPort,
        clock: Clock,
        spec: LoopSpec,
        request: Callable[[float, RobotState], PlanRequest],
        observe: Callable[[Tick], bool],
        guard: Guarding | None = None,
    ) -> None:
        self.driver, self.port, self.clock, self.spec = driver, port, clock, spec
        self.request, self.observe, self.guard = request, observe, guard
        self.gate = SafetyGate(robot, driver.follows)
        self.follower, self.counts = PlanFollower(spec.blend), Counts()
        self.period = 1 / robot.control.rate
        self._pick, self._nq, self._torque_mode = robot.command_index, robot.nq, robot.control.mode == "torque"
        self._gains = (np.asarray(robot.control.stiffness), np.asarray(robot.control.damping))
        if self._torque_mode:
            zero = np.zeros(robot.nu)
            pair = (spec.feedback_stiffness, spec.feedback_damping)
            self._gains = tuple(zero if gains is None else np.asarray(gains) for gains in pair)
        self._recent: deque[float] = deque([spec.latency], maxlen=9)
        self._pending: Plan | None = None
        self._held: JointCommand | None = None
        self._held_at = np.zeros(robot.nq)
        self._next_plan = 0.0

    def run(self, duration: float) -> None:
        """Run for ``duration`` seconds; the driver is stopped however this ends."""
        self.clock.restart()
        try:
            tick = 0
            while tick * self.period < duration - 1e-9:
                late = self.clock.wait_until(tick * self.period)
                self.counts.lateness.append(late)
                now = int(self.clock.now() / self.period + 1e-3)
                self.counts.missed += late > self.period
                if not self._step():
                    break
                tick = max(tick, now) + 1  # missed periods are skipped, not made up for in a burst
        finally:
            self.driver.stop()

    def _step(self) -> bool:
        state = self.driver.read()
        t = state.stamp
        if self.guard is not None:
            t = self.clock.now()  # an arm's measurement is of the past, and what is sent now acts from now on
            judged = self.guard.measured(state, t)
            if judged is None:
                return self.observe(Tick(t, state, np.zeros(len(self._pick)), False, None, None, 0.0, True))
            state = judged
        self._ask(t, state)
        arrived, latency = self._take(t)
        wanted, command, holding = self._command(t, state)
        if self.guard is not None:
            guarded = self.guard.command(t, state, command, holding, self.port.alive)
            if guarded is None:  # nothing is left to send: the run ends, and with it the driver stops the robot
                self.observe(Tick(t, state, wanted, False, self.follower.plan, arrived, latency, holding))
                return False
            command = guarded
        command, clamped = self.gate(state, command, t)
        self.driver.write(command)
        self.counts.ticks += 1
        self.counts.held += holding and self.follower.plan is not None
        return self.observe(Tick(t, state, wanted, clamped, self.follower.plan, arrived, latency, holding, command))

    def _ask(self, t: float, state: RobotState) -> None:
        if self.port.busy or t < self._next_plan - 1e-9 or self._pending is not None:
            return
        ahead = float(np.median(self._recent)) if self.spec.predict else 0.0
        base = self.request(state.stamp, state)
        self.port.submit(PlanRequest(**{**vars(base), "latency": ahead, "following": self.follower.following}))
        self._next_plan = max(self._next_plan + 1 / self.spec.rate, t)

    def _take(self, t: float) -> tuple[Plan | None, float]:
        """Put a finished plan in force, but not before the time it was planned for."""
        plan = self.port.poll(t)
        if plan is not None:
            latency = max(t - plan.stamp, 0.0)
            self._recent.append(latency)
            self.counts.plans += 1
            self.counts.late += latency > 1 / self.spec.rate + self.period + 1e-9
            self.counts.latencies.append(latency)
            if self.guard is not None:
                self._pending = plan if self.guard.accepts(plan) else None
            elif np.isfinite(plan.u).all() and (plan.x is None or np.isfinite(plan.x).all()):
                self._pending = plan
            else:
                self.gate.counts["non-finite plan"] += 1
        if self._pending is None or self._pending.t0 > t + 1e-9:
            return None, 0.0
        plan, self._pending = self._pending, None
        if not self.spec.predict:
            plan = replace(plan, t0=t)
        self.follower.switch(plan, t)
        if self._held is not None and self.spec.blend > 0:  # the jump to smooth out is from the hold, not from a plan long gone
            self.follower.resume(plan, Following(plan.seq, t, self._holding() - plan.command(t)))
            self.follower.restart(t, self._held_at, np.zeros(self._nq))
        return plan, self._recent[-1]

    def _command(self, t: float, state: RobotState) -> tuple[np.ndarray, JointCommand, bool]:
        plan = self.follower.plan
        if plan is None or t - plan.stamp > self.spec.stale or t > plan.end:
            if self._held is None:  # latched: following the measured position would let the arm creep
                self._held, self._held_at = self.gate.hold(state), state.q
            return self._holding(), self._held, True
        self._held = None
        if self.driver.follows == "position" and plan.x is not None:
            q, v = (part[self._pick] for part in self.follower.joints(t))
            gains = self.gate.gains
            return q, JointCommand(q, v, *gains, np.zeros(len(self._pick))), False
        u, zero, (k, d) = self.follower.command(t), np.zeros(len(self._pick)), self._gains
        if not self._torque_mode:
            return u, JointCommand(u, zero, k, d, zero), False
        planned = plan.state(t)
        if planned is None:
            return u, JointCommand(zero, zero, zero, zero, u), False
        q_ref, v_ref = planned[: self._nq][self._pick], planned[self._nq :][self._pick]
        return u, JointCommand(q_ref, v_ref, k, d, u), False

    def _holding(self) -> np.ndarray:
        """Return the hold as a command (nu,): references or torques."""
        return self._held.torque if self._torque_mode else self._held.q_ref
