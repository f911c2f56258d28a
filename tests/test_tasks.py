"""Terms and distances: right by hand, smooth everywhere, one source for numpy, torch and traced scalars."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mbctrl.base.errors import SpecError
from mbctrl.tasks import algebra, distance, terms
from mbctrl.tasks.features import Features, RobotScales
from mbctrl.tasks.task import build_task
from mbctrl.tasks.terms import (
    TERMS,
    AccelerationLimits,
    Avoid,
    ContactApproach,
    ContactForce,
    ContactGap,
    Effort,
    Height,
    JointLimits,
    ObjectPose,
    Posture,
    Proximity,
    Reach,
    Smoothness,
    Term,
    Track,
    Velocity,
    VelocityLimits,
)

ROBOT = RobotScales(
    home=(0.1, -0.2),
    position_lower=(-1.0, -2.0),
    position_upper=(1.0, 2.0),
    velocity=(2.0, 4.0),
    effort=(10.0, 5.0),
    acceleration=(20.0, 8.0),
)
EYE = np.eye(3)
HALF_TURN = np.diag([1.0, -1.0, -1.0])  # about x
STILL = Features(
    q=np.array([0.1, -0.2]),
    v=np.zeros(2),
    a=np.zeros(2),
    u=np.zeros(2),
    u_before=np.zeros(2),
    effort=np.zeros(2),
    p_world_tcp=np.array([0.3, 0.0, 0.5]),
    R_world_tcp=EYE,
    p_world_target=np.array([0.3, 0.0, 0.5]),
    R_world_target=EYE,
    q_target=None,
    clearances=(np.array([1.0, 2.0]),),
    p_world_object=np.array([0.3, 0.0, 0.5]),
    R_world_object=EYE,
    contact_gap=np.array(-0.001),
    contact_rate=np.array(0.0),
    contact_force=np.array(0.0),
)
"""At home, at rest, on target, clear of everything: no term has anything to say here."""
SETTINGS: list[Term] = [
    Reach(weight=1, position_scale=0.05, rotation_scale=0.2, rotation_weight=0.5),
    Reach(weight=1, rotation_weight=0),
    Track(weight=1, position_scale=0.01, rotation_scale=0.1, rotation_weight=2.0),
    Posture(weight=1, scale=0.5, joint_weights=(1.0, 3.0)),
    Posture(weight=1, wrap=True),
    Velocity(weight=1, joint_weights=(0.0, 2.0)),
    Velocity(weight=1, scale=0.5),
    AccelerationLimits(weight=1, margin=0.3),
    Effort(weight=1),
    Smoothness(weight=1, scale=0.1),
    JointLimits(weight=1, margin=0.3),
    VelocityLimits(weight=1, margin=0.2),
    Avoid(weight=1, margin=0.03, buffer=0.05),
    Track(weight=1, axis_weights=(1.0, 0.0, 2.0), rotation_weight=0.0),
    ContactForce(weight=1, scale=4.0),
    ContactGap(weight=1, scale=0.02),
    ContactApproach(weight=1, speed=0.05, reach=0.03),
    Proximity(weight=1, scale=0.3),
    Height(weight=1, target=0.5, scale=0.02),
    ObjectPose(weight=1, position_scale=0.05, rotation_scale=0.2, rotation_weight=0.5),
]
NAMES = [f"{type(term).__name__}{i}" for i, term in enumerate(SETTINGS)]


class Traced:
    """A node of an expression graph: arithmetic and the algebra's methods build, nothing may look at a value."""

    def __init__(self, compute: Any) -> None:
        self._compute = compute

    def value(self, inputs: dict[str, float]) -> float:
        """Evaluate the graph."""
        return self._compute(inputs)

    @staticmethod
    def of(x: Any) -> Traced:
        return x if isinstance(x, Traced) else Traced(lambda _: float(x))

    def _two(self, other: Any, operation: Any) -> Traced:
        a, b = self, Traced.of(other)
        return Traced(lambda inputs: operation(a.value(inputs), b.value(inputs)))

    def __add__(self, other: Any) -> Traced:
        return self._two(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Traced:
        return self._two(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Traced:
        return self._two(other, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Traced:
        return self._two(other, lambda a, b: a / b)

    def __rsub__(self, other: Any) -> Traced:
        return Traced.of(other) - self

    def __rtruediv__(self, other: Any) -> Traced:
        return Traced.of(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Traced:
        return self * -1.0

    def sqrt(self) -> Traced:
        return Traced(lambda inputs: np.sqrt(self.value(inputs)))

    def cos(self) -> Traced:
        return Traced(lambda inputs: np.cos(self.value(inputs)))

    def exp(self) -> Traced:
        return Traced(lambda inputs: np.exp(self.value(inputs)))

    def abs(self) -> Traced:
        return Traced(lambda inputs: abs(self.value(inputs)))

    def clip(self, min: float | None = None, max: float | None = None) -> Traced:
        return Traced(lambda inputs: float(np.clip(self.value(inputs), min, max)))

    def _refuse(self, *_: Any) -> bool:
        raise TypeError("the source branches on a value: it cannot be traced")

    __bool__ = __float__ = __int__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = None


class Variables:
    """Turns arrays into object arrays of traced inputs and remembers their values."""

    def __init__(self) -> None:
        self.inputs: dict[str, float] = {}

    def __call__(self, array: Any) -> Any:
        if array is None:
            return None
        out = np.empty(np.shape(array), dtype=object)
        for index, number in np.ndenumerate(array):
            name = f"x{len(self.inputs)}"
            self.inputs[name] = float(number)
            out[index] = Traced(lambda inputs, name=name: inputs[name])
        return out


def carried(f: Features, carry: Any) -> Features:
    """Return ``f`` with every array turned by ``carry``."""
    parts = {field.name: getattr(f, field.name) for field in fields(f) if field.name != "clearances"}
    turned = {name: None if part is None else carry(part) for name, part in parts.items()}
    return Features(**turned, clearances=tuple(map(carry, f.clearances)))


def as_tensor(array: Any) -> torch.Tensor:
    """Return a float64 tensor that wants a gradient."""
    return torch.tensor(np.asarray(array, float), requires_grad=True)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Return a (3, 3) rotation."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def random_features(seed: int) -> Features:
    """Return features well spread on both sides of every barrier."""
    rng = np.random.default_rng(seed)
    return Features(
        q=rng.uniform(-1.5, 1.5, 2) * (1, 2),
        v=rng.uniform(-3, 3, 2) * (1, 2),
        a=rng.uniform(-30, 30, 2),
        u=rng.normal(size=2),
        u_before=rng.normal(size=2),
        effort=5 * rng.normal(size=2),
        p_world_tcp=rng.normal(size=3),
        R_world_tcp=random_rotation(rng),
        p_world_target=rng.normal(size=3),
        R_world_target=random_rotation(rng),
        q_target=rng.normal(size=2) if seed % 2 else None,
        clearances=tuple(rng.uniform(-0.1, 0.2, 3) for _ in range(2)),
        p_world_object=rng.normal(size=3),
        R_world_object=random_rotation(rng),
        contact_gap=np.array(rng.uniform(-0.01, 0.04)),
        contact_rate=np.array(rng.uniform(-0.3, 0.1)),
        contact_force=np.array(rng.uniform(-5, 30)),
    )


# --- values ---------------------------------------------------------------------------------------------------------


def shifted(**changes: Any) -> Features:
    """Return the still features with some arrays changed."""
    return replace(STILL, **{name: value if name == "clearances" else np.asarray(value, float) for name, value in changes.items()})


@pytest.mark.parametrize(
    ("term", "features", "expected"),
    [
        (Reach(weight=1, position_scale=0.05), shifted(p_world_tcp=[0.3, 0.15, 0.7]), np.sqrt(1 + 25) - 1),  # 0.25 m off
        (Reach(weight=1, rotation_scale=0.2, rotation_weight=3), shifted(R_world_tcp=HALF_TURN), 3 * (np.sqrt(1 + 4 / 0.04) - 1)),
        (Proximity(weight=1, scale=0.5), shifted(p_world_tcp=[0.3, 0.15, 0.7]), 1 - np.exp(-0.25)),
        (Track(weight=1, position_scale=0.01), shifted(p_world_tcp=[0.32, 0.0, 0.5]), 4.0),
        (Track(weight=1, rotation_scale=0.1, rotation_weight=0.5), shifted(R_world_tcp=HALF_TURN), 0.5 * 4 / 0.01),
        (Posture(weight=1, scale=2.0), shifted(q=[0.5, -0.2]), 0.16 / 4),
        (Posture(weight=1, joint_weights=(0.0, 3.0)), shifted(q=[9.0, 0.3]), 3 * 0.25),
        (Posture(weight=1, reference=(1.0, 1.0)), shifted(q=[1.0, 3.0], q_target=[5.0, 5.0]), 4.0),
        (Posture(weight=1), shifted(q=[1.0, 2.0], q_target=[1.0, -1.0]), 9.0),
        (Posture(weight=1, wrap=True), shifted(q=[0.1 + 2 * np.pi, -0.2 + np.pi]), 4.0),
        (Velocity(weight=1), shifted(v=[1.0, -2.0]), 0.25 + 0.25),
        (Velocity(weight=1, scale=0.5, joint_weights=(2.0, 0.0)), shifted(v=[1.0, 9.0]), 8.0),
        (Effort(weight=1), shifted(effort=[5.0, -5.0]), 0.25 + 1.0),
        (Smoothness(weight=1, scale=0.1), shifted(u=[0.2, 0.0], u_before=[0.1, 0.3]), 1.0 + 9.0),
        (JointLimits(weight=1, margin=0.2), shifted(q=[1.0, -2.0]), 2.0),  # 1 at each limit
        (JointLimits(weight=1, margin=0.2), shifted(q=[0.9, -2.2]), 0.25 + 4.0),
        (JointLimits(weight=1, margin=1.0), shifted(q=[0.9, -1.7]), 0.25 + 0.0625),  # margins of a tenth: 0.2 and 0.4
        (VelocityLimits(weight=1, margin=0.2), shifted(v=[2.0, -4.0]), 2.0),
        (VelocityLimits(weight=1, margin=0.2), shifted(v=[-1.8, 4.8]), 0.25 + 4.0),
        (AccelerationLimits(weight=1, margin=0.5), shifted(a=[20.0, -6.0]), 1.0 + 0.25),
        (Avoid(weight=1, margin=0.03, buffer=0.05), shifted(clearances=(np.array([0.03, 1]), np.array([-0.02, 0.055]))), 5.25),
        (Track(weight=1, axis_weights=(1.0, 0.0, 2.0)), shifted(p_world_tcp=[0.32, 9.0, 0.53]), 4.0 + 2 * 9.0),
        (ContactForce(weight=1, target=15.0, scale=5.0), shifted(contact_force=25.0), 4.0),
        (Height(weight=1, target=0.47, scale=0.01), shifted(), 9.0),
        (ContactGap(weight=1, scale=0.02), shifted(contact_gap=0.04), np.sqrt(5) - 1),
        (ContactApproach(weight=1, speed=0.05, reach=0.02), shifted(contact_gap=0.005, contact_rate=-0.15), 0.75 * 4.0),
        (ContactApproach(weight=1, speed=0.05, reach=0.02), shifted(contact_gap=-0.005, contact_rate=-0.15), 4.0),
    ],
)
def test_value_by_hand(term: Term, features: Features, expected: float) -> None:
    assert term.cost(features, ROBOT) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("term", SETTINGS, ids=NAMES)
def test_a_still_arm_on_target_costs_nothing(term: Term) -> None:
    assert term.cost(STILL, ROBOT) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("term", "features"),
    [
        (JointLimits(weight=1, margin=0.2), shifted(q=[0.8, -1.8])),
        (VelocityLimits(weight=1, margin=0.2), shifted(v=[1.6, -3.2])),
        (AccelerationLimits(weight=1, margin=0.5), shifted(a=[10.0, -4.0])),
        (Avoid(weight=1, margin=0.03, buffer=0.05), shifted(clearances=(np.array([0.08, 0.0801]),))),
        (ContactGap(weight=1), shifted(contact_gap=-0.003)),
        (ContactApproach(weight=1, speed=0.05), shifted(contact_rate=-0.05)),
        (ContactApproach(weight=1, reach=0.02), shifted(contact_gap=0.02, contact_rate=-1.0)),
    ],
)
def test_a_barrier_is_zero_up_to_its_margin(term: Term, features: Features) -> None:
    assert term.cost(features, ROBOT) == pytest.approx(0.0, abs=1e-25)


@pytest.mark.parametrize("kind", [Reach, Track])
def test_without_a_target_rotation_any_orientation_is_free(kind: type[Term]) -> None:
    f = replace(STILL, R_world_tcp=HALF_TURN, R_world_target=None)
    assert kind(weight=1).cost(f, ROBOT) == 0.0


def test_reach_is_linear_far_away_and_track_is_not() -> None:
    near, far = shifted(p_world_tcp=[10.3, 0, 0.5]), shifted(p_world_tcp=[20.3, 0, 0.5])
    ratios = [kind(weight=1).cost(far, ROBOT) / kind(weight=1).cost(near, ROBOT) for kind in (Reach, Track)]
    assert ratios == pytest.approx([2.0, 4.0], rel=0.01)


def test_rotation_error_is_the_squared_angle_near_zero() -> None:
    angle, scale = 1e-3, 0.1
    turned = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    cost = Track(weight=1, rotation_scale=scale).cost(shifted(R_world_tcp=turned), ROBOT)
    assert cost == pytest.approx((angle / scale) ** 2, rel=1e-6)


# --- one source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("term", SETTINGS, ids=NAMES)
def test_torch_and_numpy_agree(term: Term, seed: int) -> None:
    f = random_features(seed)
    assert term.cost(carried(f, as_tensor), ROBOT).item() == pytest.approx(float(term.cost(f, ROBOT)), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("term", SETTINGS, ids=NAMES)
def test_the_source_can_be_traced(term: Term, seed: int) -> None:
    f, variables = random_features(seed), Variables()
    traced = term.cost(carried(f, variables), ROBOT)
    assert traced.value(variables.inputs) == pytest.approx(float(term.cost(f, ROBOT)), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("term", SETTINGS, ids=NAMES)
def test_a_row_of_samples_is_each_sample_alone(term: Term) -> None:
    alone = [random_features(seed) for seed in (1, 3, 5)]

    def stacked(name: str) -> Any:
        parts = [getattr(f, name) for f in alone]
        if name == "clearances":
            return tuple(torch.tensor(np.stack(part, -1)) for part in zip(*parts))
        return torch.tensor(np.stack(parts, -1))

    rows = term.cost(Features(**{field.name: stacked(field.name) for field in fields(Features)}), ROBOT)
    np.testing.assert_allclose(rows.numpy(), [float(term.cost(f, ROBOT)) for f in alone], rtol=1e-12, atol=1e-14)


CORNERS = {
    "on target": STILL,
    "half turn": shifted(R_world_tcp=HALF_TURN),
    "at the limits": shifted(q=[1.0, -2.0], v=[2.0, -4.0]),
    "at the margins": shifted(q=[0.7, -1.7], v=[1.6, -3.2], clearances=(np.array([0.08, 0.03]),)),
    "touching": shifted(clearances=(np.array([0.0, -0.1]),)),
    "far away": shifted(p_world_tcp=[1e3, -1e3, 1e3], q=[1e3, -1e3], v=[1e3, 1e3]),
    "random": random_features(7),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("term", SETTINGS, ids=NAMES)
def test_gradients_are_finite(term: Term, corner: str) -> None:
    f = carried(CORNERS[corner], as_tensor)
    term.cost(f, ROBOT).backward()
    leaves = [getattr(f, field.name) for field in fields(f) if field.name != "clearances"] + list(f.clearances)
    grads = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", ["sqrt", "cos", "positive", "clip01", "absolute"])
@pytest.mark.parametrize("x", [0.0, 0.3, 1.7])
def test_algebra_agrees_on_every_carrier(name: str, x: float) -> None:
    function = getattr(algebra, name)
    variables = Variables()
    rows = [function(part) for part in variables(np.array([x, 0.5]))]
    whole = function(variables(np.array([x, 0.5])))
    expected = float(function(x))
    got = [float(function(torch.tensor(x, dtype=torch.float64))), rows[0].value(variables.inputs), whole[0].value(variables.inputs)]
    assert got == pytest.approx([expected] * 3, abs=1e-15)


# --- distances ------------------------------------------------------------------------------------------------------


def segment(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the ends of a capsule and its radius; one in five is a sphere."""
    a = rng.uniform(-0.5, 0.5, 3)
    b = a if rng.uniform() < 0.2 else a + rng.normal(size=3) * rng.uniform(0.02, 0.4)
    return a, b, float(rng.uniform(0.01, 0.1))


def sampled(a: np.ndarray, b: np.ndarray, count: int = 20001) -> np.ndarray:
    """Return points (count, 3) of the segment."""
    return a + np.linspace(0, 1, count)[:, None] * (b - a)


def box_distance(points: np.ndarray, center: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return signed distances of points from a box."""
    out = np.abs(points - center) - half
    return np.linalg.norm(np.maximum(out, 0), axis=1) + np.minimum(out.max(1), 0)


@pytest.mark.parametrize("seed", range(40))
def test_capsule_sphere_is_the_sampled_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, radius = segment(rng)
    center, size = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.05, 0.2)
    truth = np.linalg.norm(sampled(a, b) - center, axis=1).min() - radius - size
    assert distance.capsule_sphere(a, b, radius, center, size) == pytest.approx(truth, abs=2e-6)


@pytest.mark.parametrize("seed", range(40))
def test_capsule_plane_is_the_sampled_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, radius = segment(rng)
    point, normal = rng.normal(size=3), rng.normal(size=3)
    normal /= np.linalg.norm(normal)
    truth = ((sampled(a, b, 11) - point) @ normal).min() - radius
    assert distance.capsule_plane(a, b, radius, point, normal) == pytest.approx(truth, abs=1e-12)


def box_case(seed: int, points: int = 5) -> tuple[float, float, float]:
    """Return the estimate, the truth and the documented slack of a random capsule and box."""
    rng = np.random.default_rng(seed)
    a, b, radius = segment(rng)
    center, half = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.02, 0.3, 3)
    truth = float(box_distance(sampled(a, b), center, half).min() - radius)
    reach = np.linalg.norm(b - a) / (2 * (points - 1))
    return float(distance.capsule_box(a, b, radius, center, half, points)), truth, float(np.hypot(radius, reach) - radius)


@pytest.mark.parametrize("points", [2, 5, 9])
def test_capsule_box_is_never_too_large_and_at_most_the_slack_too_small(points: int) -> None:
    cases = [case for case in (box_case(seed, points) for seed in range(150)) if case[1] > 0]
    assert len(cases) > 60
    excess = [estimate - truth for estimate, truth, _ in cases]
    short = [truth - slack - estimate for estimate, truth, slack in cases]
    assert max(excess) < 2e-6 and max(short) < 2e-6  # the root's regulariser is 1e-6


def test_capsule_box_is_never_too_large_where_the_capsule_points_at_the_box() -> None:
    a, b, radius = np.array([0.5, 0.0, 0.0]), np.array([0.2, 0.0, 0.0]), 0.05
    truth = 0.2 - radius - 0.1
    assert distance.capsule_box(a, b, radius, np.zeros(3), np.full(3, 0.1)) <= truth + 2e-6


def test_capsule_box_sees_every_overlap() -> None:
    overlapping = [case for case in map(box_case, range(600)) if case[1] < -1e-5]
    assert len(overlapping) > 20
    assert max(estimate for estimate, _, _ in overlapping) < 0


def test_a_box_swallowing_a_sphere_gives_its_depth() -> None:
    a = np.array([0.1, 0.0, 0.0])
    assert distance.capsule_box(a, a, 0.05, np.zeros(3), np.array([0.3, 0.5, 0.5])) == pytest.approx(-0.2 - 0.05, abs=2e-6)


DISTANCES = {
    "sphere": lambda a, b, r, c: distance.capsule_sphere(a, b, r, c, 0.1),
    "plane": lambda a, b, r, c: distance.capsule_plane(a, b, r, c, [0.0, 0.6, 0.8]),
    "box": lambda a, b, r, c: distance.capsule_box(a, b, r, c, [0.1, 0.2, 0.3]),
}


@pytest.mark.parametrize("shape", DISTANCES)
@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ([0.0, 0, 0], [0.4, 0, 0], [0.2, 0, 0]),  # centre on the segment
        ([0.0, 0, 0], [0.0, 0, 0], [0.0, 0, 0]),  # a point capsule at the centre
        ([0.1, 0.2, 0.3], [0.1, 0.2, -0.3], [0.0, 0, 0]),  # on the box's edge
        ([1.0, 0, 0], [1.0, 0, 0.5], [0.0, 0, 0]),
    ],
)
def test_distance_gradients_are_finite(shape: str, a: list[float], b: list[float], c: list[float]) -> None:
    leaves = [as_tensor(part) for part in (a, b, c)]
    DISTANCES[shape](leaves[0], leaves[1], 0.05, leaves[2]).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("shape", DISTANCES)
def test_distances_agree_on_every_carrier(shape: str) -> None:
    rng = np.random.default_rng(3)
    a, b, c = rng.normal(size=(3, 3))
    expected, variables = float(DISTANCES[shape](a, b, 0.05, c)), Variables()
    traced = DISTANCES[shape](variables(a), variables(b), 0.05, variables(c))
    got = [DISTANCES[shape](*map(as_tensor, (a, b)), 0.05, as_tensor(c)).item(), traced.value(variables.inputs)]
    assert got == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("shape", DISTANCES)
def test_distances_of_several_traced_capsules_at_once(shape: str) -> None:
    rng = np.random.default_rng(4)
    a, b, c = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), rng.normal(size=(3, 1))
    variables = Variables()
    traced = DISTANCES[shape](variables(a), variables(b), np.array([0.05, 0.1]), variables(c))
    got = [part.value(variables.inputs) for part in traced]
    np.testing.assert_allclose(got, DISTANCES[shape](a, b, np.array([0.05, 0.1]), c), rtol=1e-12)


# --- building -------------------------------------------------------------------------------------------------------


def test_costs_are_weighted_and_a_zero_weight_is_left_out() -> None:
    spec = {"velocity": {"weight": 3.0}, "effort": {"weight": 0.0}, "posture": {"weight": 0.5}}
    f = shifted(v=[2.0, 0.0], q=[1.1, -0.2], effort=[1.0, 1.0])
    costs = build_task(spec, ROBOT).costs(f)
    assert costs == pytest.approx({"velocity": 3.0, "posture": 0.5})


def test_every_short_name_builds() -> None:
    more = {"smoothness": {"scale": 0.1}, "height": {"target": 0.2}}
    spec = {name: {"weight": 1.0, **more.get(name, {})} for name in TERMS}
    assert list(build_task(spec, ROBOT).terms) == list(TERMS)


def test_kind_gives_one_class_several_names() -> None:
    spec = {"near": {"kind": "posture", "weight": 1.0}, "far": {"kind": "mbctrl.tasks.terms:Posture", "weight": 2.0}}
    assert {type(term) for term in build_task(spec, ROBOT).terms.values()} == {Posture}


class Lift(Term):
    """A user's own term: height of the tool."""

    gain: float = 1.0

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return self.gain * f.p_world_tcp[2]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("a_users_terms")
    module.Lift, module.NotATerm = Lift, dict
    monkeypatch.setitem(sys.modules, "a_users_terms", module)
    return "a_users_terms"


def test_a_users_term_is_named_by_module(plugin: str) -> None:
    task = build_task({"lift": {"kind": f"{plugin}:Lift", "weight": 2.0, "gain": 3.0}}, ROBOT)
    assert task.costs(STILL) == {"lift": pytest.approx(2 * 3 * 0.5)}


@pytest.mark.parametrize(
    ("spec", "key", "words"),
    [
        ({"reech": {"weight": 1}}, "task.reech", ["did you mean 'reach'", "velocity_limits"]),
        ({"velocity": {"weight": -1}}, "task.velocity.weight", ["greater than or equal to 0", "-1"]),
        ({"velocity": {"weight": float("nan")}}, "task.velocity.weight", ["finite"]),
        ({"velocity": {"weight": "1"}}, "task.velocity.weight", ["number"]),
        ({"velocity": {}}, "task.velocity.weight", ["required"]),
        ({"velocity": {"weight": 1, "scael": 1}}, "task.velocity.scael", ["did you mean 'scale'"]),
        ({"velocity": {"weight": 1, "terminal": -0.1}}, "task.velocity.terminal", ["greater than or equal to 0"]),
        ({"velocity": {"weight": 1, "scale": 0}}, "task.velocity.scale", ["greater than 0"]),
        ({"velocity": 1.0}, "task.velocity", ["weight"]),
        ({"velocity": {"weight": 0}}, "task", ["positive weight"]),
        ({}, "task", ["positive weight"]),
        ({"posture": {"weight": 1, "reference": [0, 0, 0]}}, "task.posture.reference", ["expected 2 values", "found 3"]),
        ({"velocity": {"weight": 1, "joint_weights": [1]}}, "task.velocity.joint_weights", ["expected 2 values", "found 1"]),
        ({"x": {"kind": "no_such_module:Name", "weight": 1}}, "task.x", ["no_such_module"]),
        ({"x": {"kind": "mbctrl.tasks.terms:Nothing", "weight": 1}}, "task.x", ["Nothing"]),
        ({"x": {"kind": "a_users_terms:NotATerm", "weight": 1}}, "task.x", ["subclass"]),
    ],
)
def test_a_bad_task_is_refused_by_name(plugin: str, spec: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        build_task(spec, ROBOT, file="task.yaml")
    assert caught.value.key == key and caught.value.file == "task.yaml"
    assert [word for word in words if word not in str(caught.value)] == []


def test_terms_table_lists_every_term() -> None:
    classes = {name for name, kind in vars(terms).items() if isinstance(kind, type) and issubclass(kind, Term) and kind is not Term}
    assert {target.split(":")[1] for target in TERMS.values()} == classes
