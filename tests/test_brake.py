"""Stops: within their limits, at rest when they said, and as short as can be."""

from __future__ import annotations

import numpy as np
import pytest
import ruckig
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import load_robot
from mbctrl.runtime.brake import Brake, MotionLimits, Stop
from mbctrl.runtime.limiter import Limiter

SHARE = st.floats(-1, 1)


def close(found: object, expected: object, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(SHARE, SHARE, st.floats(0.5, 50), st.floats(10, 2e4))
def test_a_stop_keeps_its_limits_and_is_as_short_as_ruckigs(v: float, a: float, acceleration: float, jerk: float) -> None:
    start = np.array([0.3]), np.array([2 * v]), np.array([a * acceleration])
    stop = Stop.plan(*start, np.array([acceleration]), np.array([jerk]))
    path = [stop.at(t) for t in np.linspace(0, stop.duration, 50)]
    assert max(abs(point[2][0]) for point in path) <= acceleration * (1 + 1e-9)
    close(path[0], start)
    close(stop.at(stop.duration - 1e-12)[1:], 0.0, 1e-6)
    low, high = stop.reach()
    q = np.array([point[0] for point in path])
    assert q.min() >= low[0] - 1e-9 and q.max() <= high[0] + 1e-9
    close((low[0], high[0]), (q.min(), q.max()), 4e-3 * (1 + abs(q).max()))
    peer = _ruckig(*start, acceleration, jerk)
    if peer is not None:
        close((stop.duration, stop.at(np.inf)[0][0]), (peer.duration, peer.at_time(peer.duration)[0][0]), 1e-6)


def _ruckig(q: np.ndarray, v: np.ndarray, a: np.ndarray, acceleration: float, jerk: float) -> ruckig.Trajectory | None:
    given, out = ruckig.InputParameter(1), ruckig.Trajectory(1)
    given.control_interface, given.target_velocity = ruckig.ControlInterface.Velocity, [0.0]
    given.current_position, given.current_velocity, given.current_acceleration = q.tolist(), v.tolist(), a.tolist()
    given.max_acceleration, given.max_jerk = [acceleration], [jerk]
    try:
        ruckig.Ruckig(1).calculate(given, out)
    except ruckig.RuckigError:  # it gives up where an acceleration is at its limit to the last digit
        return None
    return out


@pytest.mark.parametrize("name", ["panda", "ur10e"])
def test_a_brake_is_at_rest_when_it_said_and_stays(name: str) -> None:
    robot = load_robot(name)
    brake, q, v = Brake(robot), np.array(robot.home), 0.8 * np.array(robot.limits.velocity)
    assert not brake.active and np.isnan(brake.duration)
    brake.start(5.0, q, v)
    limits = MotionLimits.of(robot)
    assert brake.active and brake.duration >= (v / limits.acceleration).max()
    close(brake.at(5.0), (q, v))
    end = 5.0 + brake.duration
    assert np.abs(brake.at(end - 0.01)[1]).max() > 0 and not brake.at(end + 1e-9)[1].any()
    close(brake.at(end)[0], brake.at(end + 100)[0])
    close(brake.at(4.0), (q, v))  # time before the stop is its beginning


@pytest.mark.parametrize("name", ["panda", "ur10e"])
def test_the_path_of_a_brake_has_bounded_differences(name: str) -> None:
    robot = load_robot(name)
    limits, dt = MotionLimits.of(robot), 1 / robot.control.rate
    brake = Brake(robot)
    brake.start(0.0, np.array(robot.home), limits.velocity * [(-1) ** i for i in range(robot.nq)], 0.5 * limits.acceleration)
    q = np.array([brake.at(k * dt)[0] for k in range(int(brake.duration / dt) + 5)])
    v = np.diff(q, axis=0) / dt
    a = np.diff(v, axis=0) / dt
    assert (np.abs(a) <= limits.acceleration * (1 + 1e-6)).all()
    assert (np.abs(np.diff(a, axis=0) / dt) <= limits.jerk * (1 + 1e-6) + 1e-5).all()
    assert (np.abs(v[: len(v) // 8]) > 0.1).all()  # it was moving


def test_the_law_is_the_robots_impedance() -> None:
    robot = load_robot("panda")
    brake = Brake(robot)
    brake.start(0.0, np.array(robot.home), np.full(7, 0.5))
    law = brake.command(0.02, gravity=np.ones(7))
    close(law.q_ref, brake.at(0.02)[0])
    close((law.stiffness, law.damping), (robot.control.stiffness, robot.control.damping))
    assert not law.torque.any()


def test_after_a_contact_nothing_holds_on_to_a_position() -> None:
    robot = load_robot("panda")
    brake = Brake(robot)
    brake.start(0.0, np.array(robot.home), np.full(7, 0.5))
    law = brake.command(0.02, compliant=True)
    assert not law.stiffness.any() and (law.damping == robot.control.damping).all() and not law.torque.any()


def test_an_arm_that_takes_torques_is_damped_at_its_gravity() -> None:
    robot = load_robot("arm2")
    brake = Brake(robot)
    brake.start(0.0, np.zeros(2), np.array([3.0, -2.0]))
    assert brake.active and np.isnan(brake.duration)
    law, gravity = brake.command(0.1, gravity=np.array([1.0, 2.0])), np.array([1.0, 2.0])
    v = np.array([3.0, -2.0])
    assert not law.stiffness.any() and (law.damping > 0).all()
    assert ((law.at(np.zeros(2), v) - gravity) * v < 0).all()  # it takes energy out
    full = law.at(np.zeros(2), np.array(robot.limits.velocity)) - gravity
    close(np.abs(full), robot.limits.effort)


def test_limits_a_robot_does_not_have() -> None:
    panda, ur = MotionLimits.of(load_robot("panda")), MotionLimits.of(load_robot("ur10e"))
    assert np.isfinite(panda.jerk).all() and (panda.allowed == panda.acceleration).all()
    assert np.isinf(ur.jerk).all() and np.isinf(ur.allowed).all() and np.isfinite(ur.acceleration).all()
    robot = load_robot("panda")
    only_jerk = robot.model_copy(update={"limits": robot.limits.model_copy(update={"acceleration": None})})
    implied = MotionLimits.of(only_jerk)
    close(implied.allowed**2, 2 * implied.velocity * implied.jerk, 1e-6)


def test_a_speed_over_the_limit_is_braked_from_the_limit() -> None:
    robot = load_robot("panda")
    brake = Brake(robot)
    brake.start(0.0, np.array(robot.home), np.full(7, 50.0), np.full(7, 1e6))
    assert (np.abs(brake.at(0.0)[1]) <= robot.limits.velocity).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_stop_from_nowhere_is_refused(value: float) -> None:
    brake = Brake(load_robot("ur10e"))
    with pytest.raises(DriverError, match="finite"):
        brake.start(0.0, np.full(6, value), np.zeros(6))
    with pytest.raises(DriverError, match="started"):
        brake.at(0.0)


def test_a_released_brake_is_not_active() -> None:
    brake = Brake(load_robot("ur10e"))
    brake.start(0.0, np.zeros(6), np.ones(6))
    brake.release()
    assert not brake.active


@pytest.mark.parametrize("after", [1, 2, 3, 7, 40, 150, 400, 777])
def test_a_brake_takes_over_from_the_limiter_within_its_limits(after: int) -> None:
    robot = load_robot("panda")
    limits, dt, rng = MotionLimits.of(robot), 1 / robot.control.rate, np.random.default_rng(after)
    limiter, brake = Limiter(robot), Brake(robot)
    limiter.reset(np.array(robot.home))
    wild = rng.uniform(limits.low - 1, limits.high + 1, (after // 50 + 1, 7))
    smooth = robot.home + 0.1 * (1 - np.cos(2 * np.arange(after) * dt))[:, None] ** 2
    path = [limiter(smooth[k] if after % 2 else wild[k // 50]).q for k in range(after)]
    brake.start(0.0, *limiter.motion())
    path += [brake.at(k * dt)[0] for k in range(1, int(brake.duration / dt) + 10)]
    q = np.vstack([[robot.home] * 3, path])
    v = np.diff(q, axis=0) / dt
    a = np.diff(v, axis=0) / dt
    assert (q >= limits.low - 1e-12).all() and (q <= limits.high + 1e-12).all()
    for part, limit in ((v, limits.velocity), (a, limits.acceleration), (np.diff(a, axis=0) / dt, limits.jerk)):
        assert (np.abs(part) <= limit * (1 + 1e-6) + 1e-5).all()
    assert (q[-1] == q[-2]).all()
