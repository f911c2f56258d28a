"""The safety gate against whatever arithmetic can throw at it: what comes out is always within the limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot, load_robot
from mbctrl.runtime.driver import JointCommand, RobotState
from mbctrl.runtime.gate import SafetyGate

ROBOTS = {name: load_robot(name) for name in ("panda", "ur10e", "arm2", "cartpole")}
BOUNDED = settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ANY = st.floats(width=64)  # infinities and NaN included
SANE = st.floats(-50, 50)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def vector(values: st.SearchStrategy[float], n: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(values, min_size=n, max_size=n).map(np.array)


@st.composite
def commands(draw: st.DrawFn, robot: Robot) -> JointCommand:
    """A command: mostly of sane size, sometimes with anything at all in one of its parts."""
    parts = [draw(vector(SANE, robot.nu)) for _ in range(5)]
    for at in draw(st.lists(st.integers(0, 4), max_size=3)):
        parts[at] = draw(vector(ANY, robot.nu))
    if draw(st.booleans()):
        parts[2], parts[3] = np.array(robot.control.stiffness), np.array(robot.control.damping)
    return JointCommand(*parts)


@st.composite
def states(draw: st.DrawFn, robot: Robot, stamp: float, values: st.SearchStrategy[float] = SANE) -> RobotState:
    """A measurement, with velocities around their limits and positions within and beyond theirs."""
    limits = robot.limits
    share = vector(st.floats(-1.5, 1.5), robot.nq)
    middle, half = (
        np.add(limits.position_upper, limits.position_lower) / 2,
        np.subtract(limits.position_upper, limits.position_lower) / 2,
    )
    q, v = middle + half * draw(share), np.array(limits.velocity) * draw(share)
    if draw(st.booleans()):
        q, v = draw(vector(values, robot.nq)), draw(vector(values, robot.nq))
    return RobotState(stamp, 1, q, v, draw(vector(values, robot.nu)), draw(vector(SANE, robot.nu)))


@st.composite
def runs(draw: st.DrawFn) -> tuple[Robot, list[tuple[RobotState, JointCommand]]]:
    robot = ROBOTS[draw(st.sampled_from(sorted(ROBOTS)))]
    gaps = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.2, 40.0]), min_size=1, max_size=6))
    stamps = np.cumsum(gaps) / robot.control.rate
    return robot, [(draw(states(robot, float(stamp))), draw(commands(robot))) for stamp in stamps]


def total(command: JointCommand, state: RobotState, robot: Robot) -> np.ndarray:
    pick = robot.command_index
    return command.at(state.q[pick], state.v[pick]) + state.gravity


@BOUNDED
@given(runs())
def test_whatever_is_asked_the_torque_is_finite_and_within_effort(run: tuple) -> None:
    robot, steps = run
    gate, effort = SafetyGate(robot), np.array(robot.limits.effort)
    for state, command in steps:
        sent, clamped = gate(state, command)
        assert sent.finite()
        assert (np.abs(total(sent, state, robot)) <= effort * (1 + 1e-9)).all()
        assert clamped or sent is command


@BOUNDED
@given(runs())
def test_whatever_is_asked_the_torque_changes_within_its_rate(run: tuple) -> None:
    robot, steps = run
    if robot.limits.effort_rate is None:
        return
    gate, effort, period = SafetyGate(robot), np.array(robot.limits.effort), 1 / robot.control.rate
    last, sent = steps[0][0].tau, None
    for k, (state, command) in enumerate(steps):
        if k and state.stamp - steps[k - 1][0].stamp > 1.5 * period:  # the arm went on with the law it had
            last = total(sent, state, robot)
        sent, _ = gate(state, command)
        now = total(sent, state, robot)
        assert (np.abs(now - np.clip(last, -effort, effort)) <= np.array(robot.limits.effort_rate) * period + 1e-9 * effort).all()
        last = now


@BOUNDED
@given(runs())
def test_no_joint_beyond_its_speed_limit_is_sped_up_more_than_the_rate_forces(run: tuple) -> None:
    robot, steps = run
    gate, effort, speed = SafetyGate(robot), np.array(robot.limits.effort), np.array(robot.limits.velocity)[robot.command_index]
    rate = np.full(robot.nu, np.inf) if robot.limits.effort_rate is None else np.array(robot.limits.effort_rate)
    period, last, before = 1 / robot.control.rate, steps[0][0].tau, None
    for k, (state, command) in enumerate(steps):
        elapsed = 0.0 if before is None else state.stamp - before[0].stamp
        if elapsed > 1.5 * period:
            last = total(before[1], state, robot)
        sent, _ = gate(state, command)
        v = state.v[robot.command_index]
        push = (total(sent, state, robot) - state.gravity) * np.sign(v)
        # What is still left of the torque in force, taken down as fast as the torque rate allows.
        left = (np.clip(last, -effort, effort) - state.gravity) * np.sign(v) - 0.9 * rate * min(max(elapsed, 1e-4), period)
        out_of_reach = np.abs(state.gravity) > effort  # holding itself up already takes all there is
        fine = (np.abs(v) < speed) | (push <= np.maximum(left, 0.0) + 1e-9 * effort) | out_of_reach
        assert fine.all(), (push, left, v, k)
        last, before = total(sent, state, robot), (state, sent)


@BOUNDED
@given(st.data())
def test_finite_nonsense_from_the_robot_is_bounded_or_refused(data: st.DataObject) -> None:
    robot = ROBOTS[data.draw(st.sampled_from(sorted(ROBOTS)))]
    state = data.draw(states(robot, 0.0, FINITE))
    gravity = data.draw(vector(FINITE, robot.nu))
    try:
        sent, _ = SafetyGate(robot)(replace(state, gravity=gravity), data.draw(commands(robot)))
    except DriverError:
        return
    assert sent.finite()
    assert (np.abs(total(sent, replace(state, gravity=gravity), robot)) <= np.array(robot.limits.effort) * (1 + 1e-6)).all()


@BOUNDED
@given(st.data())
def test_a_measurement_that_is_not_finite_never_passes(data: st.DataObject) -> None:
    robot = ROBOTS[data.draw(st.sampled_from(sorted(ROBOTS)))]
    state, name = data.draw(states(robot, 0.0)), data.draw(st.sampled_from(["q", "v", "tau", "gravity", "stamp"]))
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    part = bad if name == "stamp" else np.where(np.arange(len(getattr(state, name))) == 0, bad, getattr(state, name))
    with pytest.raises(DriverError, match="finite"):
        SafetyGate(robot)(replace(state, **{name: part}), data.draw(commands(robot)))
