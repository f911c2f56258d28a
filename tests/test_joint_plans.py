"""Plans as an arm that follows positions gets them: no step in position or velocity, whenever a new plan takes over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.plan import Plan, PlanFollower

DT, STEPS, BLEND = 0.04, 12, 0.03
PROPERTY = settings(deadline=None, max_examples=120, derandomize=True)
E = 1e-7


def plan(seq: int, t0: float, seed: int, n: int = 2) -> Plan:
    """A plan of a smooth motion, different for every seed; positions and velocities belong together."""
    rng = np.random.default_rng(seed)
    size, rate, phase = rng.uniform(0.1, 1, n), rng.uniform(1, 6, n), rng.uniform(0, 6, n)
    t = np.arange(STEPS + 1)[:, None] * DT
    q, v = size * np.sin(rate * t + phase), size * rate * np.cos(rate * t + phase)
    return Plan(seq, t0, t0, DT, q, np.concatenate([q, v], 1))


@st.composite
def switches(draw: st.DrawFn) -> list[tuple[float, Plan]]:
    """When plans take over: at or after their own start, before the one before has ended."""
    found, t = [(0.0, plan(1, 0.0, draw(st.integers(0, 99))))], 0.0
    for k in range(draw(st.integers(1, 5))):
        t += draw(st.floats(0.002, 0.2))
        found.append((t, plan(k + 2, t - draw(st.floats(0.0, 0.1)), draw(st.integers(0, 99)))))
    return found


def followed(found: list[tuple[float, Plan]]) -> PlanFollower:
    follower = PlanFollower(BLEND)
    for t, one in found:
        follower.switch(one, t)
    return follower


@PROPERTY
@given(switches())
def test_position_and_velocity_have_no_step_where_plans_change(found: list[tuple[float, Plan]]) -> None:
    follower = PlanFollower(BLEND)
    follower.switch(found[0][1], 0.0)
    for t, one in found[1:]:
        before = follower.joints(t)
        follower.switch(one, t)
        after = follower.joints(t)
        assert np.abs(after[0] - before[0]).max() < 1e-12
        assert np.abs(after[1] - before[1]).max() < 1e-11


@PROPERTY
@given(switches(), st.floats(0.0005, 0.2))
def test_the_velocity_is_the_positions(found: list[tuple[float, Plan]], later: float) -> None:
    follower, t = followed(found), found[-1][0] + later
    slope = (follower.joints(t + E)[0] - follower.joints(t - E)[0]) / (2 * E)
    assert np.abs(slope - follower.joints(t)[1]).max() < 1e-4


@PROPERTY
@given(switches())
def test_the_jump_is_gone_after_three_blends(found: list[tuple[float, Plan]]) -> None:
    follower, (start, last) = followed(found), found[-1]
    t = start + 3 * BLEND + 1e-9
    for got, wanted in zip(follower.joints(t), last.joints(t)):
        assert np.array_equal(got, wanted)
    jump = np.abs(follower.joints(start)[0] - last.joints(start)[0]).max()
    half = np.abs(follower.joints(start + 2.9 * BLEND)[0] - last.joints(start + 2.9 * BLEND)[0]).max()
    assert half <= 0.1 * jump + 0.01, "it decays"


@pytest.mark.parametrize("later", [0.0, 1e-6, 5.0])
def test_a_plans_end_is_at_rest_where_it_ends(later: float) -> None:
    one = plan(1, 0.3, 5)
    q, v = one.joints(one.end + later)
    assert np.allclose(q, one.x[-1, :2], atol=1e-12) and not v.any()
    follower = PlanFollower(BLEND)
    follower.switch(one, 0.3)
    assert not follower.joints(one.end + later)[1].any()


def test_a_plan_passes_through_its_states() -> None:
    one = plan(1, 0.3, 5)
    for k in range(STEPS):
        q, v = one.joints(0.3 + k * DT)
        assert np.allclose(q, one.x[k, :2], atol=1e-9) and np.allclose(v, one.x[k, 2:], atol=1e-8)
    assert np.array_equal(one.joints(0.0)[0], one.x[0, :2]), "held before its start"


def test_a_cubic_is_followed_exactly() -> None:
    """Positions that are a cubic of time come back to rounding: between samples too."""
    t = np.arange(STEPS + 1) * DT
    q, v = 1 + t - 3 * t**2 + 2 * t**3, 1 - 6 * t + 6 * t**2
    one = Plan(1, 0.0, 0.0, DT, q[:, None], np.stack([q, v], 1))
    for at in np.linspace(0.0, 0.47, 77):
        got = one.joints(at)
        assert got[0][0] == pytest.approx(1 + at - 3 * at**2 + 2 * at**3, abs=1e-12)
        assert got[1][0] == pytest.approx(1 - 6 * at + 6 * at**2, abs=1e-10)


def test_a_restart_begins_where_it_is_told() -> None:
    follower = followed([(0.0, plan(1, 0.0, 1)), (0.1, plan(2, 0.1, 2))])
    q, v = np.array([3.0, -2.0]), np.zeros(2)
    follower.restart(0.1, q, v)
    assert np.allclose(follower.joints(0.1)[0], q) and np.allclose(follower.joints(0.1)[1], v)


def test_the_first_plan_has_nothing_to_smooth() -> None:
    one = plan(1, 0.0, 1)
    follower = followed([(0.05, one)])
    assert np.array_equal(follower.joints(0.06)[0], one.joints(0.06)[0])


def test_without_a_blend_plans_take_over_at_once() -> None:
    follower, b = PlanFollower(0.0), plan(2, 0.0, 2)
    follower.switch(plan(1, 0.0, 1), 0.0)
    follower.switch(b, 0.1)
    assert np.array_equal(follower.joints(0.1)[0], b.joints(0.1)[0])


def test_a_plan_without_states_has_no_joints() -> None:
    bare = Plan(1, 0.0, 0.0, DT, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no states"):
        bare.joints(0.0)
    with pytest.raises(ValueError, match="no plan"):
        PlanFollower(BLEND).joints(0.0)


def test_a_jump_from_long_ago_is_not_taken_up_again() -> None:
    """Between two plans with states one without: the jump of the first two is none of the third's."""
    follower, last = PlanFollower(BLEND), plan(4, 0.12, 3)
    for t, one in ((0.0, plan(1, 0.0, 1)), (0.1, plan(2, 0.1, 2)), (0.11, Plan(3, 0.11, 0.11, DT, np.zeros((3, 2)))), (0.12, last)):
        follower.switch(one, t)
    assert np.array_equal(follower.joints(0.12)[0], last.joints(0.12)[0])
