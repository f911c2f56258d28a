"""The guard with made-up measurements: what reaches the arm is within its limits, whatever happens before it does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.plan import Plan
from mbctrl.base.robot import Robot, load_robot
from mbctrl.runtime.brake import MotionLimits
from mbctrl.runtime.driver import JointCommand, RobotState, Status
from mbctrl.runtime.guard import Guard, GuardSettings
from mbctrl.runtime.ladder import Mode
from mbctrl.runtime.watch import Seen

ROBOTS = {name: load_robot(name) for name in ("panda", "ur10e", "arm2")}
NAMES = ["panda", "ur10e"]  # that are sent references
EITHER = pytest.mark.parametrize("follows", ["law", "position"])


class FakeWatch:
    """An arm of unit inertia without gravity, as far from everything as a test says."""

    def __init__(self, n: int) -> None:
        self.n, self.scene, self.plan = n, 1.0, 1.0

    def __call__(self, q: np.ndarray, v: np.ndarray) -> Seen:
        zero = np.zeros(self.n)
        return Seen(v.copy(), zero, zero, np.zeros(3), np.eye(3), self.scene, 1.0)

    def clearance(self, q: np.ndarray) -> float:
        self.seen = q
        return self.plan


class Bench:
    """A guard and an arm that does exactly what it is told, one period after the other."""

    def __init__(
        self, name: str = "panda", follows: str = "law", senses: bool = False, watch: bool = False, **options: Any
    ) -> None:
        self.robot: Robot = ROBOTS[name]
        self.watch = FakeWatch(self.robot.nq) if watch else None
        driver: Any = SimpleNamespace(senses_torque=senses, follows=follows)
        self.guard = Guard(self.robot, self.watch, driver, GuardSettings(**options))
        self.period, self.k = 1 / self.robot.control.rate, 0
        self.q, self.v = np.array(self.robot.home), np.zeros(self.robot.nq)
        self.sent: list[JointCommand] = []
        self.modes: list[Mode] = []

    @property
    def t(self) -> float:
        return self.k * self.period

    def state(self, **changes: Any) -> RobotState:
        zero = np.zeros(self.robot.nu)
        return replace(RobotState(self.t, self.k + 1, self.q.copy(), self.v.copy(), zero, zero), **changes)

    def armed(self) -> Bench:
        self.guard.measured(self.state(), self.t)
        assert self.guard.arm(self.t) == []
        return self

    def step(self, reference: np.ndarray, holding: bool = False, planner: bool = True, **measured: Any) -> JointCommand | None:
        """Do a period in which the plan asks for ``reference``."""
        self.k += 1
        state = self.guard.measured(self.state(**measured), self.t)
        assert state is not None
        n, control = self.robot.nu, self.robot.control
        zero = np.zeros(n)
        wanted = JointCommand(np.array(reference, float), zero, np.array(control.stiffness), np.array(control.damping), zero)
        command = self.guard.command(self.t, state, wanted, holding, planner)
        self.modes.append(self.guard.ladder.mode)
        if command is not None:
            self.sent.append(command)
            if command.stiffness.any():
                self.v, self.q = (command.q_ref - self.q) / self.period, command.q_ref.copy()
        return command

    def swing(self, seconds: float, speed: float = 0.5, **options: Any) -> None:
        """Follow a plan that starts from rest and moves every joint."""
        start, count = self.q.copy(), round(seconds / self.period)
        for i in range(count):
            s = i * self.period
            self.step(start + speed * (s - 0.2 * np.sin(s / 0.2)), **options)

    @property
    def changes(self) -> list[tuple[Mode, int]]:
        return [(change.after, change.fault) for change in self.guard.ladder.changes]

    def check(self) -> None:
        """Every reference sent, and every difference of them, is within the limits."""
        limits, slack = MotionLimits.of(self.robot), 1 + 1e-6
        rows = [command.q_ref for command in self.sent if command.stiffness.any()]
        q = np.array([np.array(self.robot.home)] * 4 + rows)  # at rest before, also where nothing was sent
        assert np.isfinite(q).all()
        assert (q >= limits.low - 1e-9).all() and (q <= limits.high + 1e-9).all()
        for order, limit in ((1, limits.velocity), (2, limits.allowed), (3, limits.jerk)):
            size = np.abs(np.diff(q, order, 0)).max(0) / self.period**order
            rounding = 1e-13 / self.period**order
            assert (size <= limit * slack + rounding).all(), (order, size, limit)


# --- arming -----------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_before_it_is_armed() -> None:
    bench = Bench()
    assert bench.step(bench.q) is None and bench.guard.ladder.mode is Mode.SAFE


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({"v": np.array([0, 0, 0.05, 0, 0, 0, 0])}, "joint3: moves at 0.05"),
        ({"q": np.array([0, 1.76, 0, -1, 0, 1, 0])}, "joint2: found at 1.76"),
        ({"status": Status.EMERGENCY_STOP}, "emergency stop"),
        ({"q": np.full(7, np.nan)}, "q is not finite"),
    ],
)
def test_it_is_armed_at_rest_only(measured: dict[str, Any], says: str) -> None:
    bench = Bench()
    bench.guard.measured(bench.state(**measured), 0.0)
    refused = bench.guard.arm(0.0)
    assert any(says in text for text in refused), refused
    assert bench.step(bench.q) is None


def test_without_a_measurement_it_is_not_armed() -> None:
    assert Bench().guard.arm(0.0)


def test_another_arms_gravity_is_not_armed() -> None:
    bench = Bench(senses=True, watch=True)
    bench.guard.measured(bench.state(tau=np.array([0, 30.0, 0, 0, 0, 0, 0])), 0.0)
    assert any("joint2: found 30 N·m at rest" in text for text in bench.guard.arm(0.0))


def test_to_arm_an_arm_that_runs_changes_nothing() -> None:
    bench = Bench().armed()
    bench.swing(0.02)
    assert np.abs(bench.v).max() < 0.02 and bench.guard.ladder.mode is Mode.RUN
    bench.q = bench.q + 0.01  # behind its reference, as a spring's arm is
    before = bench.sent[-1].q_ref
    assert bench.guard.arm(bench.t) == []
    assert np.abs(bench.step(before).q_ref - before).max() < 1e-4


# --- the ladder -------------------------------------------------------------------------------------------------------


@EITHER
@pytest.mark.parametrize("name", NAMES)
def test_a_gentle_plan_is_followed_to_the_bit(name: str, follows: str) -> None:
    bench = Bench(name, follows).armed()
    for i in range(200):
        reference = np.array(bench.robot.home) + 1e-7 * (i * bench.period) ** 3
        command = bench.step(reference)
        assert np.array_equal(command.q_ref, reference) and bench.guard.ladder.mode is Mode.RUN
        assert bool(command.v_ref.any()) == (follows == "position" and i > 0), "a law damps against rest"
    bench.check()


@EITHER
def test_a_hold_comes_to_rest_and_ends_with_the_next_plan(follows: str) -> None:
    bench = Bench(follows=follows).armed()
    bench.swing(0.5)
    for _ in range(400):
        bench.step(np.full(7, 9.9), holding=True)
    assert bench.changes[-1] == (Mode.HOLD, 6) and np.abs(bench.v).max() < 1e-9
    bench.swing(0.3)
    assert bench.guard.ladder.mode is Mode.RUN
    bench.check()


@EITHER
@pytest.mark.parametrize("name", NAMES)
def test_a_stop_from_outside_brakes_within_the_limits(name: str, follows: str) -> None:
    """Ordered between two periods, as at a run's end: it is not taken for one that is long overdue."""
    bench = Bench(name, follows).armed()
    bench.swing(1.5, 0.8)
    assert np.abs(bench.v).min() > 0.3
    bench.guard.ladder.escalate(bench.t, Mode.STOP, "finished")
    for _ in range(round(1.0 / bench.period)):
        assert bench.step(bench.robot.home) is not None
    assert bench.changes[-1] == (Mode.STOP, 0) and np.abs(bench.v).max() < 1e-9
    bench.check()


def test_an_arm_that_does_not_brake_is_let_go() -> None:
    bench = Bench().armed()
    bench.swing(1.0)
    bench.guard.ladder.escalate(bench.t, Mode.STOP, "finished")
    for _ in range(3000):
        q = bench.q = bench.q + 0.0  # its references come to rest, the arm reports that it moves
        if bench.step(q, v=np.full(7, 0.2)) is None:
            break
    assert bench.changes[-1] == (Mode.SAFE, 13)


def test_no_planner_is_a_stop_in_the_end() -> None:
    bench = Bench(hold=0.5).armed()
    bench.swing(0.4)
    bench.swing(0.3, holding=True, planner=False)
    assert bench.guard.ladder.mode is Mode.HOLD
    bench.swing(0.4, holding=True, planner=False)
    assert bench.changes[-2:] == [(Mode.HOLD, 7), (Mode.STOP, 7)]
    bench.swing(0.2)
    assert bench.guard.ladder.mode is Mode.STOP, "not by itself"
    assert bench.guard.arm(bench.t) == []
    bench.swing(0.2)
    assert bench.guard.ladder.mode is Mode.RUN
    bench.check()


def test_an_emergency_stop_brakes_then_lets_go() -> None:
    bench = Bench().armed()
    bench.swing(0.5)
    for _ in range(400):
        if bench.step(bench.q, status=Status.EMERGENCY_STOP) is None:
            break
    assert bench.changes[-1] == (Mode.SAFE, 17)
    assert bench.step(bench.q) is None, "latched"
    bench.check()


@EITHER
def test_a_plan_that_jumps_is_made_into_one_that_can_be_followed(follows: str) -> None:
    bench = Bench(follows=follows).armed()
    for k in range(1500):
        bench.step(np.array(bench.robot.home) + (0.06 if k // 300 % 2 else -0.06))
    bench.check()
    assert bench.guard.furthest > 0.1 and bench.guard.ladder.mode is Mode.RUN


def test_a_plan_beyond_a_limit_is_a_stop_when_it_lasts() -> None:
    bench = Bench().armed()
    for _ in range(3000):
        bench.step(np.array(bench.robot.limits.position_upper) + 1.0)
    assert (Mode.STOP, 13) in bench.changes
    bench.check()


EVENTS = ("run", "jump", "hold", "mute", "nan", "frozen", "estop", "stop", "arm")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["law", "position"]),
    st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 120), st.floats(-1.5, 1.5)), min_size=1, max_size=8),
)
def test_whatever_happens_references_stay_within_the_limits(name: str, follows: str, events: list[tuple[str, int, float]]) -> None:
    bench = Bench(name, follows, hold=0.1).armed()
    home = bench.q.copy()
    for event, periods, size in events:
        if event == "stop":
            bench.guard.ladder.escalate(bench.t, Mode.STOP, "asked to")
        if event == "arm":
            bench.guard.arm(bench.t)
        good = bench.state()
        for _ in range(periods):
            wanted = home + size * np.sin(3 * bench.t) if event == "run" else home + size
            measured: dict[str, Any] = {}
            if event == "nan":
                measured = {"q": np.full(bench.robot.nq, np.nan)}
            elif event == "frozen":
                measured = vars(good)
            elif event == "estop":
                measured = {"status": Status.EMERGENCY_STOP}
            before = bench.guard.ladder.mode
            command = bench.step(wanted, holding=event == "hold", planner=event != "mute", **measured)
            mode = bench.guard.ladder.mode
            assert (command is None) == (mode is Mode.SAFE)
            assert mode >= before or (before is Mode.HOLD and mode is Mode.RUN), "up by hand only"
    bench.check()


# --- contact, clearance, plans ----------------------------------------------------------------------------------------


def touched(follows: str) -> Bench:
    """Return a bench whose seventh joint was pushed: it gathers momentum that no torque gave it."""
    bench = Bench(follows=follows, senses=True, watch=True).armed()
    bench.swing(0.05, 0.0)
    bench.q = bench.q.copy()
    for k in range(60):
        bench.step(bench.robot.home, v=np.array([0, 0, 0, 0, 0, 0, 0.02 * k]))
        if bench.guard.ladder.mode is Mode.STOP:
            break
    return bench


def test_a_contact_is_a_stop_that_gives_way() -> None:
    bench = touched("law")
    assert bench.changes[-1] == (Mode.STOP, 16) and "joint7" in bench.guard.ladder.reason
    command = bench.step(bench.robot.home)
    assert not command.stiffness.any() and command.damping.all()


def test_where_positions_are_followed_a_contact_stops_where_the_arm_is() -> None:
    bench = touched("position")
    assert bench.changes[-1] == (Mode.STOP, 16)
    command = bench.step(bench.robot.home)
    assert np.abs(command.q_ref - bench.robot.home).max() < 0.01, "not at the zeros of a law without stiffness"
    bench.check()


def test_contacts_are_not_looked_for_without_torques() -> None:
    assert Bench(senses=False, watch=True).guard.contact is None
    assert Bench(senses=True, watch=True, contact=0.0).guard.contact is None


def test_near_a_collision_is_a_stop() -> None:
    bench = Bench(watch=True).armed()
    bench.swing(0.2)
    bench.watch.scene = -0.001
    bench.step(bench.q)
    assert bench.changes[-1] == (Mode.STOP, 15)


def made(**changes: Any) -> Plan:
    x = np.tile(np.concatenate([ROBOTS["panda"].home, np.zeros(7)]), (5, 1))
    return replace(Plan(1, 0.0, 0.0, 0.04, x[:, :7], x, {"best": 1.0}), **changes)


def test_plans_are_refused_one_by_one_and_counted() -> None:
    bench = Bench(watch=True).armed()
    bench.swing(0.1)
    assert bench.guard.accepts(made())
    wild = made().x.copy()
    wild[2, 3] = np.nan
    assert not bench.guard.accepts(made(x=wild)) and not bench.guard.accepts(made(u=wild[:, :7]))
    bench.step(bench.q)
    assert bench.guard.ladder.mode is Mode.RUN
    assert not bench.guard.accepts(made(u=wild[:, :7]))
    bench.step(bench.q)
    assert bench.changes[-1] == (Mode.STOP, 1) and bench.guard.counts["non-finite plan"] == 3


def test_a_good_plan_between_bad_ones_starts_the_count_anew() -> None:
    bench, bad = Bench().armed(), made(u=np.full((5, 7), np.inf))
    for _ in range(4):
        assert not bench.guard.accepts(bad) and not bench.guard.accepts(bad) and bench.guard.accepts(made())
        bench.step(bench.q)
    assert bench.guard.ladder.mode is Mode.RUN


def test_diverged_plans_are_a_hold() -> None:
    bench = Bench().armed()
    bench.swing(0.1)
    for _ in range(3):
        assert not bench.guard.accepts(made(info={"best": np.inf}))
    bench.step(bench.q)
    assert bench.changes[-1] == (Mode.HOLD, 3) and bench.guard.counts["diverged plan"] == 3
    assert bench.guard.accepts(made())
    bench.step(bench.q)
    assert bench.guard.ladder.mode is Mode.RUN


def test_a_policys_plan_bridges_diverged_ones_where_its_postures_are_clear() -> None:
    bench = Bench(watch=True).armed()
    bench.swing(0.1)
    fallback = made(x=None, info={"best": np.inf, "fallback": 1.0})
    assert bench.guard.accepts(fallback)
    np.testing.assert_allclose(bench.watch.seen[0], bench.q, atol=1e-3)  # the way from where the arm is was looked at, too
    assert np.abs(np.diff(bench.watch.seen[:8], axis=0)).max() <= np.abs(fallback.u[0] - bench.q).max() / 4 + 1e-3
    bench.watch.plan = np.nan
    assert not bench.guard.accepts(replace(fallback, info={"best": 1.0})) and bench.guard.counts["plan too near"] == 1
    bench.watch.plan = 1.0
    assert bench.guard.accepts(fallback)
    bench.watch.plan = 0.004
    assert not bench.guard.accepts(fallback) and bench.guard.counts["plan too near"] == 2
    bench.watch.plan = 1.0
    bench.step(bench.q)
    assert bench.guard.ladder.mode is Mode.RUN
    assert bench.guard.accepts(fallback)  # the third in a row
    bench.step(bench.q)
    assert bench.changes[-1] == (Mode.HOLD, 3) and bench.guard.counts["policy's plan followed"] == 3
    positions = Bench("ur10e", follows="position", watch=True).armed()  # are sent what plans expect, never references
    still = Plan(1, 0.0, 0.0, 0.04, np.tile(positions.q, (5, 1)), None, {"best": np.inf, "fallback": 1.0})
    assert not positions.guard.accepts(still) and positions.guard.counts["diverged plan"] == 1
    torques = Bench("arm2").armed()  # say no postures
    assert not torques.guard.accepts(Plan(1, 0.0, 0.0, 0.04, np.zeros((5, 2)), None, {"best": np.inf, "fallback": 1.0}))


def test_a_plan_into_something_is_not_followed() -> None:
    bench = Bench(watch=True).armed()
    bench.watch.plan = 0.004
    assert not bench.guard.accepts(made()) and bench.guard.counts["plan too near"] == 1
    bench.watch.plan = 0.006
    assert bench.guard.accepts(made())


# --- torques ----------------------------------------------------------------------------------------------------------


def test_an_arm_that_takes_torques_is_damped() -> None:
    bench = Bench("arm2").armed()
    torque = np.array([1.0, -0.5])
    zero = np.zeros(2)
    for _ in range(5):
        bench.k += 1
        state = bench.guard.measured(bench.state(), bench.t)
        command = bench.guard.command(bench.t, state, JointCommand(zero, zero, zero, zero, torque), False, True)
    assert np.array_equal(command.torque, torque), "passed on while all is well"
    bench.guard.ladder.escalate(bench.t, Mode.STOP, "asked to")
    bench.k += 1
    state = bench.guard.measured(bench.state(v=np.array([0.5, 0.1])), bench.t)
    command = bench.guard.command(bench.t, state, JointCommand(zero, zero, zero, zero, torque), False, True)
    assert not command.torque.any() and not command.stiffness.any() and command.damping.all()
