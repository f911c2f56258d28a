"""Judging measurements: each fault planted, and nothing else noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.robot import load_robot
from mbctrl.runtime.driver import RobotState, Status
from mbctrl.runtime.sensors import Reading, SensorCheck, SensorSettings, Verdict

ROBOT = load_robot("ur10e")
DT, N = 1 / ROBOT.control.rate, ROBOT.nq
HOME = np.array(ROBOT.home)


def at(k: int, **changes: object) -> RobotState:
    """The measurement number ``k`` of an arm that swings at half its speed limit."""
    speed = 0.5 * np.array(ROBOT.limits.velocity)
    q, v = HOME + speed * np.sin(k * DT), speed * np.cos(k * DT)
    return replace(RobotState(k * DT, k, q, v, np.zeros(N), np.zeros(N)), **changes)


def judge(states: list[RobotState], check: SensorCheck | None = None, first: int = 0) -> list[Reading]:
    check = check or SensorCheck(ROBOT)
    return [check(state, (first + k) * DT) for k, state in enumerate(states)]


def warm(periods: int = 10) -> SensorCheck:
    """A check that has seen ``periods`` good measurements."""
    check = SensorCheck(ROBOT)
    assert all(reading.verdict is Verdict.GOOD for reading in judge([at(k) for k in range(periods)], check))
    return check


def off(state: RobotState, joint: int, value: float, part: str = "q") -> RobotState:
    values = getattr(state, part).copy()
    values[joint] = value
    return replace(state, **{part: values})


def test_good_measurements_are_used_as_they_are() -> None:
    states = [at(k) for k in range(500)]
    readings = judge(states)
    assert all(reading == Reading(state, Verdict.GOOD) for reading, state in zip(readings, states))
    assert all(reading.state is state for reading, state in zip(readings, states))


def test_a_jump_that_stays_does_not_become_true_with_time() -> None:
    """In 0.1 s the joint could have moved that far: what was doubted would be taken for good, and acted upon."""
    check = warm()
    readings = judge([off(at(k), 1, at(k).q[1] + 0.05) for k in range(10, 300)], check, 10)
    assert {reading.verdict for reading in readings[2:]} == {Verdict.FAULTY} and {reading.fault for reading in readings} == {2}
    assert check(at(300), 300 * DT).verdict is Verdict.FAULTY, "coming back says no more than leaving did"
    check.reset()
    assert check(at(301), 301 * DT).verdict is Verdict.GOOD


@pytest.mark.parametrize("part", ["q", "v", "tau", "gravity"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_held_twice_and_then_faulty(part: str, value: float) -> None:
    check = warm()
    readings = judge([off(at(k), 1, value, part) for k in range(10, 14)], check, 10)
    assert [(r.verdict, r.count) for r in readings] == [
        (Verdict.HELD, 1),
        (Verdict.HELD, 2),
        (Verdict.FAULTY, 3),
        (Verdict.FAULTY, 4),
    ]
    assert all(np.array_equal(r.state.q, at(9).q) and r.fault == 2 and part in r.reason for r in readings)
    assert check(at(14), 14 * DT).verdict is Verdict.GOOD


def test_a_stamp_that_is_not_a_number_is_not_a_time() -> None:
    assert judge([at(10, stamp=np.nan)], warm(), 10)[0].verdict is Verdict.HELD


@pytest.mark.parametrize("jump", [0.02, -0.5, 1e9])
def test_a_jump_is_held_and_names_the_joint(jump: float) -> None:
    reading = judge([off(at(10), 2, at(10).q[2] + jump)], warm(), 10)[0]
    assert (reading.verdict, reading.fault) == (Verdict.HELD, 2) and "elbow_joint jumped" in reading.reason
    np.testing.assert_array_equal(reading.state.q, at(9).q)


def test_the_bound_of_a_jump_is_what_the_joint_can_move() -> None:
    most = 1.5 * ROBOT.limits.velocity[2] * DT + SensorSettings().slack
    q = at(9).q[2]
    assert judge([off(at(10), 2, q + most - 1e-9)], warm(), 10)[0].verdict is Verdict.GOOD
    assert judge([off(at(10), 2, q + most + 1e-9)], warm(), 10)[0].verdict is Verdict.HELD


def test_a_lost_packet_leaves_the_joint_the_time_it_had() -> None:
    states = [at(k) for k in range(10) if k not in (5, 6)]
    check = SensorCheck(ROBOT)
    assert all(check(state, state.stamp).verdict is Verdict.GOOD for state in states) and check.counts["lost"] == 2


def test_a_velocity_no_joint_has_is_held() -> None:
    reading = judge([off(at(10), 0, 1.6 * ROBOT.limits.velocity[0], "v")], warm(), 10)[0]
    assert reading.verdict is Verdict.HELD and "shoulder_pan_joint" in reading.reason
    assert judge([off(at(10), 0, 1.4 * ROBOT.limits.velocity[0], "v")], warm(), 10)[0].verdict is Verdict.GOOD


def test_a_frozen_robot_is_extrapolated_and_then_faulty() -> None:
    readings = judge([at(9)] * 12, warm(), 10)
    verdicts = [reading.verdict for reading in readings]
    assert verdicts == [Verdict.GOOD] * 3 + [Verdict.HELD] * 5 + [Verdict.FAULTY] * 4
    held = readings[3]
    assert held.fault == 4 and "ms old" in held.reason and held.state.stamp == 13 * DT
    np.testing.assert_allclose(held.state.q, at(9).q + at(9).v * 4 * DT, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(readings[-1].state.q, readings[7].state.q)  # not farther than was allowed
    assert [round(reading.lasting / DT) for reading in readings[8:]] == [0, 1, 2, 3]


def test_an_extrapolation_ends_at_the_joint_limits() -> None:
    check, high = SensorCheck(ROBOT), np.array(ROBOT.limits.position_upper)
    state = replace(at(0), q=high - 1e-4, v=np.array(ROBOT.limits.velocity))
    readings = judge([state] * 8, check)
    assert readings[-1].verdict is Verdict.HELD and (readings[-1].state.q == high).all()


def test_a_robot_that_sends_old_news_is_as_stale_as_one_that_sends_none() -> None:
    states = [at(k, stamp=at(k).stamp - 0.1) for k in range(10, 20)]
    readings = judge(states, warm(), 10)
    assert readings[0].verdict is Verdict.HELD and readings[-1].verdict is Verdict.FAULTY and readings[-1].fault == 4


def test_a_measurement_from_the_future_is_not_believed() -> None:
    assert judge([at(10, stamp=1.0)], warm(), 10)[0].verdict is not Verdict.GOOD


@pytest.mark.parametrize("late", [1, 2])
def test_a_reordered_packet_is_dropped(late: int) -> None:
    check = warm()
    reading = judge([at(9 - late)], check, 10)[0]
    assert reading.verdict is Verdict.GOOD and reading.state.seq == 9 and check.counts["reordered"] == 1


def test_numbers_that_no_longer_advance_are_faulty() -> None:
    settings = SensorSettings(stale=1e6)
    check = SensorCheck(ROBOT, settings)
    readings = judge([at(0)] * 30, check)
    faults = [(reading.verdict, reading.fault) for reading in readings]
    assert faults == [(Verdict.GOOD, 0)] * 21 + [(Verdict.FAULTY, 5)] * 9


@pytest.mark.parametrize("status", [Status.PROTECTIVE_STOP, Status.EMERGENCY_STOP, Status.FAULT])
def test_a_status_that_takes_no_commands_is_faulty_at_once(status: Status) -> None:
    reading = judge([off(at(10, status=status), 0, np.nan)], warm(), 10)[0]
    assert (reading.verdict, reading.fault) == (Verdict.FAULTY, 17) and status.value in reading.reason
    assert np.isfinite(reading.state.q).all()


@pytest.mark.parametrize("now", [10 * DT + 51 * DT, 10.0, -1.0, np.nan])
def test_a_clock_that_jumps_is_faulty(now: float) -> None:
    reading = warm()(at(10, stamp=now), now)
    assert (reading.verdict, reading.fault) == (Verdict.FAULTY, 18)


def test_a_short_pause_is_no_jump() -> None:
    assert warm()(at(55), 55 * DT).verdict is Verdict.GOOD


def test_before_the_first_good_measurement_there_is_nothing_to_go_by() -> None:
    reading = SensorCheck(ROBOT)(off(at(0), 0, np.nan), 0.0)
    assert reading.verdict is Verdict.FAULTY and reading.state is None


def test_a_measurement_of_another_robot_is_not_believed() -> None:
    reading = SensorCheck(ROBOT)(replace(at(0), q=np.zeros(7)), 0.0)
    assert reading.verdict is Verdict.FAULTY and "(7,), expected (6,)" in reading.reason


def test_after_a_reset_the_arm_may_be_anywhere_and_count_anew() -> None:
    check = warm()
    elsewhere = replace(at(0), q=HOME + 0.5, stamp=10 * DT)
    assert check(elsewhere, 10 * DT).state.seq == 9
    check.reset()
    assert check(elsewhere, 99.0).verdict is not Verdict.GOOD  # stale
    check.reset()
    assert check(elsewhere, 10 * DT) == Reading(elsewhere, Verdict.GOOD)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.tuples(st.floats(), st.integers(-3, 5), st.floats(-0.1, 0.1), st.sampled_from(list(Status))), max_size=30))
def test_what_is_handed_on_is_always_finite(faults: list[tuple[float, int, float, Status]]) -> None:
    check = warm()
    for k, (value, seq, stamp, status) in enumerate(faults, 10):
        state = off(at(k, seq=k + seq, stamp=k * DT + stamp, status=status), k % N, value, ("q", "v", "tau", "gravity")[k % 4])
        reading = check(state, k * DT)
        for part in ("q", "v", "tau", "gravity", "stamp"):
            assert np.isfinite(getattr(reading.state, part)).all()
        assert (reading.verdict is Verdict.GOOD) == (not reading.reason) == (reading.fault == 0)
        assert status.usable or reading.verdict is Verdict.FAULTY
