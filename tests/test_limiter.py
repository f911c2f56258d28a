"""The reference limiter: no signal leads past a limit, and what is within the limits passes bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot, load_robot
from mbctrl.runtime.brake import Brake
from mbctrl.runtime.limiter import Limited, Limiter, LimiterSettings

ROBOTS = {name: load_robot(name) for name in ("panda", "ur10e", "arm2")}
_panda = ROBOTS["panda"]
ROBOTS["gentle"] = _panda.model_copy(  # one whose acceleration takes 50 periods to come up, not 2
    update={"limits": _panda.limits.model_copy(update={"jerk": tuple(jerk / 25 for jerk in _panda.limits.jerk)})}
)
BOUNDED = settings(deadline=None, max_examples=40, derandomize=True)


@dataclass
class Run:
    """A limiter's answers to a signal (T, n), with the differences of its output."""

    q: np.ndarray
    v: np.ndarray
    a: np.ndarray
    jerk: np.ndarray
    answers: list[Limited]
    limiter: Limiter

    @property
    def limited(self) -> np.ndarray:
        return np.array([answer.limited for answer in self.answers])


def run(robot: Robot, signal: np.ndarray, start: np.ndarray | None = None) -> Run:
    limiter, dt = Limiter(robot), 1 / robot.control.rate
    start = np.array(robot.home) if start is None else start
    limiter.reset(start)
    answers = [limiter(row) for row in signal]
    q = np.vstack([start, start, start, *(answer.q for answer in answers)])
    v = np.diff(q, axis=0) / dt
    a = np.diff(v, axis=0) / dt
    return Run(q[3:], v[2:], a[1:], np.diff(a, axis=0) / dt, answers, limiter)


def check_limits(robot: Robot, done: Run) -> None:
    limits = robot.limits
    assert np.isfinite(done.q).all()
    assert (done.q >= limits.position_lower).all() and (done.q <= limits.position_upper).all()  # no overshoot, not even rounding
    for part, limit in ((done.v, limits.velocity), (done.a, limits.acceleration), (done.jerk, limits.jerk)):
        if limit is not None:
            rounding = 1e-15 * robot.control.rate ** (1 if part is done.v else 2 if part is done.a else 3) * 16
            assert (np.abs(part) <= np.array(limit) * (1 + 1e-6) + rounding).all()


def smooth(robot: Robot, amplitude: float, frequency: float, seconds: float = 1.0) -> np.ndarray:
    """A signal (T, n) from home and back that starts and ends with no velocity and no acceleration."""
    t = np.arange(1, int(seconds * robot.control.rate)) / robot.control.rate
    phase = 2 * np.pi * frequency * t
    way = np.sign(np.add(robot.limits.position_lower, robot.limits.position_upper) / 2 - robot.home + 1e-9)
    return robot.home + amplitude * way * ((1 - np.cos(phase)) ** 2)[:, None]


@st.composite
def signals(draw: st.DrawFn) -> tuple[Robot, np.ndarray]:
    """Steps, ramps, sweeps, noise, NaN and huge numbers, one after the other, and others for every joint."""
    robot = ROBOTS[draw(st.sampled_from(sorted(ROBOTS)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = np.array(robot.limits.position_lower), np.array(robot.limits.position_upper)
    parts, dt = [np.array([robot.home])], 1 / robot.control.rate
    for kind in draw(
        st.lists(st.sampled_from(["step", "ramp", "sweep", "noise", "nan", "huge", "edge", "hold"]), min_size=1, max_size=5)
    ):
        steps = draw(st.integers(1, 150))
        t, here = np.arange(1, steps + 1)[:, None] * dt, np.nan_to_num(parts[-1][-1]).clip(low, high)
        parts.append(
            {
                "step": np.tile(rng.uniform(low - 0.5, high + 0.5), (steps, 1)),
                "ramp": here + t * rng.uniform(-1.5, 1.5, robot.nq) * robot.limits.velocity,
                "sweep": here + rng.uniform(0, 1, robot.nq) * np.sin(t**2 * rng.uniform(1, 500)),
                "noise": here + 10 ** rng.uniform(-8, 0) * rng.normal(size=(steps, robot.nq)),
                "nan": np.where(rng.random((steps, robot.nq)) < 0.5, rng.choice([np.nan, np.inf, -np.inf]), here),
                "huge": np.tile(rng.choice([-1, 1], robot.nq) * 10.0 ** rng.uniform(1, 308), (steps, 1)),
                "edge": np.tile(np.where(rng.random(robot.nq) < 0.5, low, high), (steps, 1)),
                "hold": np.tile(here, (steps, 1)),
            }[kind]
        )
    return robot, np.vstack(parts)


@BOUNDED
@given(signals())
def test_whatever_is_asked_the_output_is_within_every_limit(drawn: tuple[Robot, np.ndarray]) -> None:
    robot, signal = drawn
    check_limits(robot, run(robot, signal))


@BOUNDED
@given(signals(), st.integers(0, 100))
def test_a_brake_at_any_time_stays_within_the_position_limits(drawn: tuple[Robot, np.ndarray], after: int) -> None:
    robot, signal = drawn
    limiter = run(robot, signal[: after + 1]).limiter
    stop = Brake(robot)
    stop.start(0.0, *limiter.motion())
    for t in np.linspace(0, stop._stop.duration, 100):
        q = stop.at(t)[0]
        assert (q >= np.array(robot.limits.position_lower) - 1e-12).all()
        assert (q <= np.array(robot.limits.position_upper) + 1e-12).all()


@BOUNDED
@given(st.sampled_from(sorted(ROBOTS)), st.floats(0, 0.04), st.floats(0.1, 1.0))
def test_a_signal_within_the_limits_passes_bit_for_bit(name: str, amplitude: float, frequency: float) -> None:
    robot = ROBOTS[name]
    signal = smooth(robot, amplitude, frequency)
    done = run(robot, signal)
    assert (done.q == signal).all() and not done.limited.any() and not done.limiter.counts
    np.testing.assert_allclose([answer.v for answer in done.answers], done.v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ROBOTS))
@pytest.mark.parametrize("end", ["lower", "upper"])
def test_a_run_at_full_speed_into_a_limit_ends_at_it(name: str, end: str) -> None:
    robot = ROBOTS[name]
    limit, way = np.array(getattr(robot.limits, f"position_{end}")), 1 if end == "upper" else -1
    t = np.arange(1, 6 * robot.control.rate)[:, None] / robot.control.rate
    signal = robot.home + way * 0.9 * t * np.minimum(t / 0.5, 1) * robot.limits.velocity
    done = run(robot, signal)
    check_limits(robot, done)
    np.testing.assert_allclose(done.q[-1], limit, rtol=0, atol=1e-6)
    assert done.limiter.counts["stopping distance"] and done.limiter.counts["position"]
    assert np.abs(done.answers[-1].v).max() < 1e-6


@pytest.mark.parametrize("name", sorted(ROBOTS))
def test_a_step_is_reached_without_overshoot_and_the_stream_joined(name: str) -> None:
    robot = ROBOTS[name]
    middle = np.add(robot.limits.position_lower, robot.limits.position_upper) / 2
    goal = robot.home + 0.2 * np.sign(middle - robot.home + 1e-9)
    done = run(robot, np.tile(goal, (int(robot.control.rate), 1)))
    check_limits(robot, done)
    assert (np.abs(done.q - robot.home) <= 0.2 + 1e-9).all()
    assert (done.q[-1] == goal).all() and not done.answers[-1].limited.any()


def test_a_jump_of_a_moving_reference_is_caught_up_in_about_the_least_time() -> None:
    robot = ROBOTS["panda"]
    signal = smooth(robot, 0.05, 0.3)
    signal[400:] += 0.02 * np.sign(signal[-1] - robot.home + 1e-9)
    done = run(robot, signal)
    check_limits(robot, done)
    off = np.flatnonzero(done.limited.any(1))
    shortest = 2 * np.sqrt(0.02 / min(robot.limits.acceleration))
    assert off[0] == 400 and len(off) * 1e-3 < 1.5 * shortest and np.diff(off).max() == 1
    assert (done.q[off[-1] + 1 :] == signal[off[-1] + 1 :]).all()


def test_one_joint_beyond_its_limits_leaves_the_others_alone() -> None:
    robot = ROBOTS["panda"]
    signal = smooth(robot, 0.03, 0.5)
    signal[300:, 2] += 0.1
    done = run(robot, signal)
    others = [0, 1, 3, 4, 5, 6]
    assert (done.q[:, others] == signal[:, others]).all() and done.limited[300:, 2].any()


@pytest.mark.parametrize("name", ["panda", "gentle"])
def test_a_reference_that_is_not_finite_brakes_the_joint(name: str) -> None:
    robot = ROBOTS[name]
    signal = smooth(robot, 0.03, 0.5)
    signal[500:, 0] = np.nan
    done = run(robot, signal)
    check_limits(robot, done)
    assert done.answers[500].kinds == ("non-finite",) and abs(done.v[-1, 0]) < 1e-9


def test_lasting_limiting_is_told_after_its_time_and_only_without_a_break() -> None:
    robot = ROBOTS["ur10e"]
    beyond, home = np.add(robot.limits.position_upper, 1.0), np.array(robot.home)
    limiter = Limiter(robot, LimiterSettings(persistent=0.1))
    limiter.reset(home)
    answers = [limiter(beyond) for _ in range(60)]
    assert [answer.persistent for answer in answers] == [False] * 50 + [True] * 10
    assert answers[-1].lasting == pytest.approx(0.12)
    limiter.reset(home)
    assert not limiter(home).persistent


@pytest.mark.parametrize("spacing", [0.02, 0.05])
def test_corners_of_an_interpolated_plan_are_rounded_and_not_held_against_it(spacing: float) -> None:
    robot = ROBOTS["panda"]
    signal, step = smooth(robot, 0.03, 1.0, 2.0), int(spacing * robot.control.rate)
    ticks = np.arange(len(signal))
    corners = np.stack([np.interp(ticks, ticks[::step], column[::step]) for column in signal.T], axis=1)
    done = run(robot, corners)
    check_limits(robot, done)
    assert done.limited.any() and max(answer.lasting for answer in done.answers) < 0.1
    assert np.abs(done.q - signal).max() < 0.01


def test_a_missing_acceleration_limit_is_not_invented_but_a_stop_needs_one() -> None:
    robot = ROBOTS["ur10e"]
    signal = robot.home + np.tile([[0.002], [0.0]], (50, 1)) * np.ones(robot.nq)  # 1 rad/s to and fro
    assert not run(robot, signal).limited.any()


def test_an_arm_beyond_its_limits_is_led_back_without_a_jump() -> None:
    robot = ROBOTS["panda"]
    start = np.array(robot.home)
    start[5] = -0.2
    done = run(robot, np.tile(robot.home, (1500, 1)), start)
    assert np.abs(done.v).max() <= max(robot.limits.velocity) * (1 + 1e-9) and np.abs(done.q[-1] - robot.home).max() < 1e-6


def test_a_limiter_says_where_it_must_begin() -> None:
    robot = ROBOTS["panda"]
    with pytest.raises(DriverError, match="reset"):
        Limiter(robot)(np.array(robot.home))
    with pytest.raises(DriverError, match="finite"):
        Limiter(robot).reset(np.full(7, np.nan))


def test_a_planted_limit_is_found() -> None:
    robot = ROBOTS["panda"]
    done = run(robot, smooth(robot, 0.05, 1.0))
    for name in ("velocity", "acceleration", "jerk"):
        tight = robot.model_copy(update={"limits": robot.limits.model_copy(update={name: (1e-3,) * 7})})
        with pytest.raises(AssertionError):
            check_limits(tight, done)
