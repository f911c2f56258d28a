"""The control side: a planted fault for each thing the safety gate and the loop promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbctrl.base.config import LoopSpec
from mbctrl.base.errors import DriverError
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.robot import Control, Limits, Robot
from mbctrl.runtime.clock import LockstepClock, RealClock
from mbctrl.runtime.driver import Driver, JointCommand, RobotState
from mbctrl.runtime.gate import SafetyGate
from mbctrl.runtime.loop import ControlLoop, InlinePort, PlannerPort, Tick

STIFFNESS, DAMPING = np.array([100.0, 50.0]), np.array([10.0, 5.0])
EFFORT, RATE = np.array([10.0, 5.0]), np.array([1000.0, 500.0])
ZERO = np.zeros(2)


def arm(mode: str = "impedance", effort_rate: tuple[float, ...] | None = None) -> Robot:
    """Return a two-joint robot at 100 Hz."""
    limits = Limits(position_lower=(-1, -2), position_upper=(1, 2), velocity=(2, 3), effort=tuple(EFFORT), effort_rate=effort_rate)
    control = Control(mode=mode, rate=100, gravity_compensation=True, stiffness=tuple(STIFFNESS), damping=tuple(DAMPING))
    parts = {"name": "two", "description": "two joints", "model": "two.xml", "path": Path("robot.yaml"), "tool": "tcp"}
    return Robot(**parts, joints=("a", "b"), home=(0, 0), limits=limits, control=control)


def measured(q: Any = ZERO, v: Any = ZERO, tau: Any = ZERO, gravity: Any = ZERO, stamp: float = 0.0) -> RobotState:
    """Return a measurement."""
    return RobotState(stamp, 1, *(np.asarray(part, float) for part in (q, v, tau, gravity)))


def torque(*values: float) -> JointCommand:
    """Return plain torques."""
    return JointCommand(ZERO, ZERO, ZERO, ZERO, np.array(values))


def hold(*reference: float) -> JointCommand:
    """Return an impedance command."""
    return JointCommand(np.array(reference), ZERO, STIFFNESS, DAMPING, ZERO)


def total(command: JointCommand, state: RobotState) -> np.ndarray:
    """Return the actuator torque a command amounts to."""
    return command.at(state.q, state.v) + state.gravity


# --- gate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [torque(3.0, -2.0), hold(0.05, -0.02)])
def test_a_clean_command_passes_unchanged(command: JointCommand) -> None:
    gate = SafetyGate(arm(effort_rate=(1e9, 1e9)))
    sent, clamped = gate(measured(gravity=[1, 1]), command)
    assert sent is command and not clamped and gate.counts.total() == 0


@pytest.mark.parametrize("part", ["q_ref", "v_ref", "stiffness", "damping", "torque"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_command_becomes_a_hold(part: str, value: float) -> None:
    gate, state = SafetyGate(arm()), measured(q=[0.3, -0.4], v=[0.1, 0])
    sent, clamped = gate(state, replace(hold(0.0, 0.0), **{part: np.array([0.0, value])}))
    assert sent.finite() and clamped and gate.counts["non-finite"] == 1
    np.testing.assert_array_equal(sent.q_ref, state.q)
    np.testing.assert_array_equal([sent.stiffness, sent.damping, sent.v_ref], [STIFFNESS, DAMPING, ZERO])


@pytest.mark.parametrize(("reference", "expected"), [([1.01, 0], [1, 0]), ([-7, 9], [-1, 2]), ([0.5, -2.5], [0.5, -2])])
def test_a_reference_beyond_the_joint_limits_is_bounded(reference: list[float], expected: list[float]) -> None:
    gate = SafetyGate(arm())
    state = measured(q=expected)
    sent, clamped = gate(state, hold(*reference))
    np.testing.assert_array_equal(sent.q_ref, expected)
    assert clamped and gate.counts["position"] == 1


def test_plain_torque_has_no_reference_to_bound() -> None:
    gate = SafetyGate(arm())
    assert not gate(measured(), replace(torque(1.0, 1.0), q_ref=np.array([9.0, 9.0])))[1]


@pytest.mark.parametrize("gravity", [[0, 0], [4, -3]])
@pytest.mark.parametrize(
    ("wanted", "expected"), [([11, 0], [10, 0]), ([-99, 99], [-10, 5]), ([10, -5], [10, -5]), ([3, -5.01], [3, -5])]
)
def test_total_torque_is_bounded_exactly(gravity: list[float], wanted: list[float], expected: list[float]) -> None:
    gate, state = SafetyGate(arm()), measured(gravity=gravity)
    sent, clamped = gate(state, torque(*(np.array(wanted) - gravity)))
    np.testing.assert_allclose(total(sent, state), expected, rtol=0, atol=1e-12)
    assert clamped == (wanted != expected) == bool(gate.counts["torque"])


def test_the_torque_of_a_servo_is_bounded_too() -> None:
    gate, state = SafetyGate(arm()), measured(q=[-0.9, 0.0], v=[0.5, 0])
    sent, _ = gate(state, hold(0.9, 0.0))
    np.testing.assert_allclose(total(sent, state), [10, 0], atol=1e-12)
    np.testing.assert_array_equal(sent.stiffness, STIFFNESS)


@pytest.mark.parametrize("period", [0.001, 0.002, 0.005])
def test_torque_changes_no_faster_than_its_rate(period: float) -> None:
    gate, last = SafetyGate(arm(effort_rate=tuple(RATE))), ZERO
    rng = np.random.default_rng(0)
    gate(measured(stamp=0.0), torque(0.0, 0.0))
    for k in range(1, 200):
        state = measured(stamp=k * period)
        now = total(gate(state, torque(*rng.uniform(-20, 20, 2)))[0], state)
        assert (np.abs(now - last) <= RATE * period + 1e-12).all() and (np.abs(now) <= EFFORT + 1e-12).all()
        last = now
    assert gate.counts["torque rate"] > 50


def test_the_rate_bound_is_hit_exactly() -> None:
    gate = SafetyGate(arm(effort_rate=tuple(RATE)))
    gate(measured(), torque(0.0, 0.0))
    state = measured(stamp=0.004)
    np.testing.assert_allclose(total(gate(state, torque(9.0, -4.0))[0], state), 0.95 * RATE * 0.004 * [1, -1], rtol=1e-12)


def test_a_gap_in_the_loop_does_not_allow_a_jump() -> None:
    gate = SafetyGate(arm(effort_rate=tuple(RATE)))
    sent, _ = gate(measured(), hold(0.0, 0.0))
    late = measured(q=[0.02, -0.01], stamp=0.5)  # the robot went on with the law it had
    now = total(gate(late, torque(9.0, -4.0))[0], late)
    assert (np.abs(now - total(sent, late)) <= RATE * 0.01).all()


@pytest.mark.parametrize("stamp", [0.0, 0.01, 500.0])
def test_the_first_command_may_not_jump_however_late_it_comes(stamp: float) -> None:
    gate, state = SafetyGate(arm(effort_rate=tuple(RATE))), measured(tau=[2, -1], stamp=stamp)
    sent, clamped = gate(state, torque(9.0, 4.0))
    assert clamped and (np.abs(total(sent, state) - [2, -1]) <= 0.11).all()


def test_a_measured_torque_beyond_the_limit_is_no_excuse() -> None:
    gate, state = SafetyGate(arm(effort_rate=tuple(RATE))), measured(tau=[30, -30])
    assert (np.abs(total(gate(state, torque(9.0, -4.0))[0], state)) <= EFFORT).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gravity", [[0, 0], [2, 1]])
def test_a_joint_at_its_speed_limit_takes_no_torque_that_speeds_it_up(sign: int, gravity: list[float]) -> None:
    gate, state = SafetyGate(arm()), measured(v=[2.0 * sign, 0.5], gravity=gravity)
    sent, clamped = gate(state, torque(1.0 * sign, 1.0 * sign))
    np.testing.assert_allclose(sent.torque, [0, sign], atol=1e-12)  # the slow joint is left alone
    assert clamped and gate.counts["velocity"] == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_joint_at_its_speed_limit_may_brake(sign: int) -> None:
    gate, command = SafetyGate(arm()), torque(-3.0 * sign, 0.0)
    sent, clamped = gate(measured(v=[2.5 * sign, 0]), command)
    assert sent is command and not clamped


def test_just_below_the_speed_limit_all_is_allowed() -> None:
    assert not SafetyGate(arm())(measured(v=[1.999, -2.999]), torque(3.0, -3.0))[1]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_joint_beyond_its_range_is_not_driven_further_but_may_return(sign: int) -> None:
    gate, state = SafetyGate(arm()), measured(q=[1.05 * sign, 0])
    assert gate(state, torque(2.0 * sign, 0.0))[0].torque.tolist() == [0, 0] and gate.counts["position"] == 1
    back = torque(-2.0 * sign, 0.0)
    assert gate(state, back)[0] is back


@pytest.mark.parametrize("part", ["q", "v", "tau", "gravity"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_measurement_is_refused(part: str, value: float) -> None:
    with pytest.raises(DriverError, match="finite") as caught:
        SafetyGate(arm(effort_rate=tuple(RATE)))(measured(**{part: [0.0, value]}), torque(1.0, 1.0))
    assert part in str(caught.value)


def test_counts_add_up() -> None:
    gate = SafetyGate(arm())
    for _ in range(3):
        gate(measured(), torque(99.0, 0.0))
    gate(measured(), hold(np.nan, 0.0))
    gate(measured(), torque(1.0, 1.0))
    assert gate.counts == {"torque": 3, "non-finite": 1}


def test_actuated_joints_are_picked_out_of_all() -> None:
    limits = Limits(position_lower=(-9, -1), position_upper=(9, 1), velocity=(9, 2), effort=(5,))
    control = Control(mode="impedance", rate=100, stiffness=(10,), damping=(1,))
    parts = {"name": "cart", "description": "one motor", "model": "x.xml", "path": Path("robot.yaml"), "tool": "tcp"}
    gate = SafetyGate(Robot(**parts, joints=("free", "driven"), actuated=("driven",), home=(0, 0), limits=limits, control=control))
    state = RobotState(0.0, 1, np.array([5.0, 0.4]), np.array([8.0, 0.0]), np.zeros(1), np.zeros(1))
    assert gate.hold(state).q_ref.tolist() == [0.4]
    one = np.zeros(1)
    assert gate(state, JointCommand(one + 3, one, one + 10, one + 1, one))[0].q_ref.tolist() == [1.0]


# --- loop -----------------------------------------------------------------------------------------------------------


class FakeArm(Driver):
    """A robot that drifts slowly and remembers what it was told; ``fault`` is called at every read."""

    def __init__(self, clock: LockstepClock, fault: Callable[[int], None] = lambda _: None) -> None:
        self.clock, self.fault, self.written, self.stops, self.reads = clock, fault, [], 0, 0

    def open(self) -> None:
        """Nothing to connect."""

    def read(self) -> RobotState:
        """Return a position that drifts by 0.1 rad/s."""
        self.fault(self.reads)
        self.reads += 1
        return measured(q=[0.2 + 0.1 * self.clock.now(), -0.3], stamp=self.clock.now())

    def write(self, command: JointCommand) -> None:
        """Remember."""
        self.written.append(command)

    def stop(self) -> None:
        """Count."""
        self.stops += 1


class FakePort(PlannerPort):
    """A planner that answers ``latency`` seconds after each request, or never."""

    def __init__(self, answer: Callable[[PlanRequest, int], Plan] | None, latency: float = 0.02) -> None:
        self.answer, self.latency, self.requests, self._ready = answer, latency, [], None

    def submit(self, request: PlanRequest) -> None:
        """Remember the request."""
        assert not self.busy
        self.requests.append(request)
        self._ready = request.stamp + self.latency

    def poll(self, t: float) -> Plan | None:
        """Answer once it is time."""
        if self._ready is None or self.answer is None or t + 1e-9 < self._ready:
            return None
        self._ready = None
        return self.answer(self.requests[-1], len(self.requests))

    @property
    def busy(self) -> bool:
        """Whether an answer is owed."""
        return self._ready is not None


def constant(request: PlanRequest, seq: int, value: float = 0.25, length: float = 1.0, ahead: bool = True, **changes: Any) -> Plan:
    """Return a plan that holds one reference from the time it was asked for (``ahead``), or from its stamp."""
    t0 = request.stamp + request.latency * ahead
    return replace(Plan(seq, request.stamp, t0, length / 10, np.full((11, 2), value)), **changes)


def run(
    port: PlannerPort,
    duration: float = 0.3,
    mode: str = "impedance",
    fault: Callable[[int], None] = lambda _: None,
    stop_at: float = np.inf,
    **spec: Any,
) -> tuple[ControlLoop, FakeArm, list[Tick]]:
    """Run the loop at 100 Hz with plans asked for at 20 Hz."""
    clock, ticks = LockstepClock(), []
    driver = FakeArm(clock, fault)

    def observe(tick: Tick) -> bool:
        ticks.append(tick)
        return tick.t < stop_at

    settings = LoopSpec(**{"rate": 20, "blend": 0.0, **spec})
    loop = ControlLoop(arm(mode), driver, port, clock, settings, lambda t, s: PlanRequest(t, np.concatenate([s.q, s.v])), observe)
    loop.run(duration)
    return loop, driver, ticks


def test_a_planner_that_never_answers_leaves_the_arm_at_its_start() -> None:
    loop, driver, ticks = run(FakePort(None))
    assert len(driver.written) == 30 and loop.counts.ticks == 30  # the loop did not wait
    for command in driver.written:
        np.testing.assert_array_equal(command.q_ref, [0.2, -0.3])  # latched: the drift is not followed
        np.testing.assert_array_equal([command.stiffness, command.damping, command.v_ref], [STIFFNESS, DAMPING, ZERO])
    assert all(tick.holding and tick.plan is None for tick in ticks)
    assert loop.counts.held == 0 and loop.counts.plans == 0


def test_a_busy_planner_is_asked_once() -> None:
    port = FakePort(None)
    run(port)
    assert len(port.requests) == 1


def test_plans_are_asked_for_at_the_planning_rate() -> None:
    port = FakePort(constant)
    run(port, duration=1.0)
    np.testing.assert_allclose([request.stamp for request in port.requests], np.arange(20) * 0.05, atol=1e-9)


def test_a_plan_is_followed() -> None:
    _, driver, ticks = run(FakePort(constant))
    assert [tick.holding for tick in ticks[:4]] == [True, True, False, False]
    np.testing.assert_array_equal(driver.written[5].q_ref, [0.25, 0.25])


def test_a_plan_that_grew_stale_gives_way_to_a_latched_hold() -> None:
    class Once(FakePort):
        """Answers the first request only."""

        def poll(self, t: float) -> Plan | None:
            return super().poll(t) if len(self.requests) < 2 else None

    loop, driver, ticks = run(Once(constant), duration=0.6, stale=0.2)
    held = [tick for tick in ticks if tick.holding and tick.plan is not None]
    assert held[0].t == pytest.approx(0.21) and loop.counts.held == len(held) == 39
    for command in driver.written[21:]:
        np.testing.assert_allclose(command.q_ref, [0.2 + 0.021, -0.3])
        np.testing.assert_array_equal(command.damping, DAMPING)


def test_a_plan_that_ran_out_is_not_followed() -> None:
    def short(request: PlanRequest, seq: int) -> Plan:
        return constant(request, seq, length=0.1, ahead=False) if seq == 1 else constant(request, seq, value=np.nan)

    _, _, ticks = run(FakePort(short), duration=0.3, stale=9.0)
    assert [tick.t for tick in ticks if tick.holding][2] == pytest.approx(0.11)


def test_a_hold_ends_with_the_next_plan() -> None:
    def slow(request: PlanRequest, seq: int) -> Plan:
        return constant(request, seq, length=0.1, ahead=False)

    _, driver, ticks = run(FakePort(slow, latency=0.2), duration=0.9, stale=0.25)
    flags = [tick.holding for tick in ticks]
    assert sum(a and not b for a, b in zip(flags, flags[1:])) == 0  # every plan arrives exhausted: it was 0.1 s long
    _, driver, ticks = run(FakePort(constant, latency=0.2), duration=0.9, predict=False, stale=0.25)
    flags = [tick.holding for tick in ticks]
    assert sum(a and not b for a, b in zip(flags, flags[1:])) >= 2
    anew = [driver.written[i + 1].q_ref[0] for i, (a, b) in enumerate(zip(flags, flags[1:])) if b and not a]
    assert len(set(anew)) == len(anew)  # each hold is where the arm is then


def test_without_prediction_a_plan_is_followed_from_its_start_when_it_comes() -> None:
    _, _, ticks = run(FakePort(constant, latency=0.1), predict=False)
    first = next(tick for tick in ticks if tick.arrived)
    assert first.t == pytest.approx(0.1) and first.plan.t0 == pytest.approx(0.1) and first.plan.stamp == 0.0


@pytest.mark.parametrize(("latency", "late"), [(0.02, 0), (0.06, 0), (0.09, 1)])
def test_a_late_plan_is_counted(latency: float, late: int) -> None:
    loop, _, _ = run(FakePort(constant, latency=latency), duration=0.5)
    assert loop.counts.plans > 0 and loop.counts.late == late * loop.counts.plans
    assert loop.counts.latencies == pytest.approx([latency] * loop.counts.plans)


@pytest.mark.parametrize("part", ["u", "x"])
def test_a_plan_that_is_not_finite_is_dropped_and_counted(part: str) -> None:
    def answer(request: PlanRequest, seq: int) -> Plan:
        plan = constant(request, seq, x=np.zeros((11, 4)))
        broken = getattr(plan, part).copy()
        broken[7, 1] = np.nan
        return plan if seq == 1 else replace(plan, **{part: broken})

    loop, driver, ticks = run(FakePort(answer), duration=0.3)
    assert loop.gate.counts["non-finite plan"] == 5 and loop.gate.counts["non-finite"] == 0
    assert ticks[-1].plan.seq == 1 and loop.counts.plans == 6
    assert all(command.finite() for command in driver.written)


def test_a_plan_is_not_in_force_before_its_time() -> None:
    def early(request: PlanRequest, seq: int) -> Plan:
        return constant(request, seq, t0=request.stamp + 0.04)

    _, _, ticks = run(FakePort(early, latency=0.01))
    arrivals = [tick for tick in ticks if tick.arrived is not None]
    assert arrivals[0].t == pytest.approx(0.04)
    assert all(tick.plan.t0 <= tick.t + 1e-9 for tick in ticks if tick.plan is not None)


def test_the_request_predicts_by_the_median_latency() -> None:
    port = FakePort(constant, latency=0.03)
    run(port, duration=0.5, latency=0.01)
    assert [request.latency for request in port.requests[:1]] == [0.01]
    assert port.requests[-1].latency == pytest.approx(0.03)


def test_without_prediction_the_request_asks_for_none() -> None:
    port = FakePort(constant, latency=0.03)
    _, _, ticks = run(port, predict=False, latency=0.01)
    assert len(port.requests) > 2 and {request.latency for request in port.requests} == {0.0}
    assert [tick.t for tick in ticks if tick.arrived][0] == pytest.approx(0.03)


def test_the_request_says_what_is_being_followed() -> None:
    port = FakePort(constant)
    run(port)
    assert port.requests[0].following is None
    assert [request.following.seq for request in port.requests[1:4]] == [1, 2, 3]


def test_new_plans_are_blended_in() -> None:
    def alternating(request: PlanRequest, seq: int) -> Plan:
        return constant(request, seq, value=0.2 if seq % 2 else 0.3)

    _, driver, _ = run(FakePort(alternating), duration=0.6, blend=0.04)
    steps = np.abs(np.diff([command.q_ref[0] for command in driver.written[3:]]))
    assert steps.max() == pytest.approx(0.025, abs=1e-9)  # 0.1 rad in four periods


def test_the_first_plan_is_blended_in_from_the_start_position() -> None:
    _, driver, ticks = run(FakePort(constant), blend=0.04)
    references = [command.q_ref[1] for command in driver.written]
    np.testing.assert_allclose(references[:3], -0.3)
    assert not ticks[2].holding
    np.testing.assert_allclose(np.diff(references[2:7]), 0.55 / 4)
    assert references[7] == pytest.approx(0.25)


def test_the_end_of_a_hold_is_blended_from_the_hold() -> None:
    def answer(request: PlanRequest, seq: int) -> Plan:
        return constant(request, seq, value=-0.9 if seq == 1 else 0.6)

    class Gap(FakePort):
        """Keeps the second answer back, as if the planner had stalled."""

        def poll(self, t: float) -> Plan | None:
            return None if len(self.requests) == 2 and t < 0.4 else super().poll(t)

    _, driver, ticks = run(Gap(answer), duration=0.6, stale=0.2, blend=0.04, predict=False)
    first = max(i for i, tick in enumerate(ticks) if tick.holding) + 1
    assert 30 < first < 55 and ticks[first].plan.seq > 2
    references = np.array([command.q_ref for command in driver.written[first - 1 : first + 5]])
    np.testing.assert_allclose(references[1], references[0])
    assert np.abs(np.diff(references, axis=0)).max() <= np.abs(0.6 - references[0]).max() / 4 + 1e-9
    np.testing.assert_allclose(driver.written[-1].q_ref, 0.6)


def test_torque_mode_sends_torque_and_pulls_towards_the_plan() -> None:
    def answer(request: PlanRequest, seq: int) -> Plan:
        return constant(request, seq, value=1.5, x=np.tile([0.1, -0.25, 0.3, 0.4], (11, 1)))

    _, driver, _ = run(FakePort(answer), mode="torque", feedback_stiffness=(7.0, 8.0))
    command = driver.written[5]
    np.testing.assert_allclose([command.torque, command.q_ref, command.v_ref], [[1.5, 1.5], [0.1, -0.25], [0.3, 0.4]])
    np.testing.assert_array_equal([command.stiffness, command.damping], [[7.0, 8.0], ZERO])


@pytest.mark.parametrize("error", [DriverError("lost"), RuntimeError("bug"), KeyboardInterrupt()])
def test_the_driver_is_stopped_whatever_happens(error: BaseException) -> None:
    clock = LockstepClock()

    def fault(read: int) -> None:
        if read == 7:
            raise error

    driver = FakeArm(clock, fault)
    loop = ControlLoop(arm(), driver, FakePort(constant), clock, LoopSpec(), lambda t, s: PlanRequest(t, s.q), lambda _: True)
    with pytest.raises(type(error)):
        loop.run(1.0)
    assert driver.stops == 1 and len(driver.written) == 7


def test_a_planner_that_fails_stops_the_driver() -> None:
    def fail(request: PlanRequest, seq: int) -> Plan:
        raise RuntimeError("planner")

    clock = LockstepClock()
    driver = FakeArm(clock)
    loop = ControlLoop(arm(), driver, FakePort(fail), clock, LoopSpec(), lambda t, s: PlanRequest(t, s.q), lambda _: True)
    with pytest.raises(RuntimeError, match="planner"):
        loop.run(1.0)
    assert driver.stops == 1


def test_the_observer_may_end_the_run() -> None:
    _, driver, ticks = run(FakePort(constant), duration=9.0, stop_at=0.1)
    assert len(ticks) == 11 and driver.stops == 1


def test_missed_periods_are_counted_and_skipped() -> None:
    class Hiccup(LockstepClock):
        """Oversleeps by 35 ms once."""

        def wait_until(self, t: float) -> float:
            late = 0.035 if abs(t - 0.1) < 1e-9 else 0.0
            self._now = max(self._now, t + late)
            return self._now - t

    clock = Hiccup()
    driver, stamps = FakeArm(clock), []
    keep = lambda tick: not stamps.append(tick.t)  # noqa: E731
    loop = ControlLoop(arm(), driver, FakePort(constant), clock, LoopSpec(), lambda t, s: PlanRequest(t, s.q), keep)
    loop.run(0.3)
    assert loop.counts.missed == 1 and max(loop.counts.lateness) == pytest.approx(0.035)
    assert (np.diff(stamps) > 0.004).all() and len(stamps) == 27  # no burst to make up for it
    np.testing.assert_allclose(stamps[11:], np.arange(14, 30) * 0.01, atol=1e-9)


# --- ports and clocks -----------------------------------------------------------------------------------------------


def test_an_inline_port_hands_over_after_its_latency_and_once() -> None:
    port = InlinePort(lambda request: constant(request, 1), 0.03)
    assert not port.busy and port.poll(0.0) is None
    port.submit(PlanRequest(1.0, ZERO))
    assert port.busy and port.poll(1.0) is None and port.poll(1.0299) is None
    plan = port.poll(1.03)
    assert plan.seq == 1 and not port.busy and port.poll(2.0) is None


def test_an_inline_port_without_latency_answers_at_once() -> None:
    port = InlinePort(lambda request: constant(request, 1), 0.0)
    _, _, ticks = run(port)
    assert ticks[0].arrived is not None and not ticks[0].holding


def test_lockstep_time_passes_only_by_waiting() -> None:
    clock = LockstepClock()
    assert (clock.now(), clock.wait_until(2.5), clock.now(), clock.wait_until(1.0), clock.now()) == (0, 0, 2.5, 0, 2.5)
    clock.restart()
    assert clock.now() == 0


def test_real_time_does_not_wait_for_the_past() -> None:
    clock = RealClock()
    assert clock.wait_until(-1.0) >= 1.0 and clock.wait_until(0.002) >= 0.0 and clock.now() >= 0.002
