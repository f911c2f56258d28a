"""What the control process believes of its arm, against MuJoCo and brute force: a contact felt is a difference from this."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import BundleError
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.export.bundle import _traced, capsule_pairs
from mbctrl.planning.controller import MpcController
from mbctrl.runtime.watch import ArmWatch
from mbctrl.tasks.distance import capsule_capsule

BALL = {"name": "ball", "shape": "sphere", "position": [0.5, 0.1, 0.6], "size": [0.08]}
RUNS = {"panda": "panda_reach_sim", "ur10e": "ur10e_reach_sim", "arm2": "arm2_swingup_sim"}
CLOSE = 1e-6
VECTOR = st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(np.array)


class Arm:
    """A watch, the MuJoCo model it is compared with, and the capsules both know."""

    def __init__(self, name: str, **changes: Any) -> None:
        config, file = load_run(RUNS[name])
        plain = {"dynamics": {"backend": "torch"}, **changes}
        config = validate(RunConfig, {**merged(config.model_dump(), plain), "settings": config.settings}, file)
        model = load_run_model(config, file)
        controller = MpcController(config, model, file)
        self.robot, self.mj, self.data = model.robot, model.mj, mujoco.MjData(model.mj)
        self.tree, self.pairs = controller.analytic.tree, capsule_pairs(controller)
        self.traced = json.loads(json.dumps(_traced(controller)))  # as it comes out of a bundle
        self.watch = watch_of(self.traced, self.robot)

    def random(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        limits = self.robot.limits
        q = rng.uniform(np.maximum(limits.position_lower, -3), np.minimum(limits.position_upper, 3))
        return q, rng.normal(size=self.robot.nq)  # beta's difference of momenta is off by the cube of a speed: 2e-5 at 16 rad/s

    def see(self, q: np.ndarray, v: np.ndarray) -> None:
        self.data.qpos[:], self.data.qvel[:] = q, v
        mujoco.mj_forward(self.mj, self.data)

    def mass(self, q: np.ndarray) -> np.ndarray:
        self.see(q, np.zeros_like(q))
        full = np.zeros((len(q), len(q)))
        mujoco.mj_fullM(self.mj, self.data, full)
        return full

    def bias(self, q: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.see(q, v)
        return self.data.qfrc_bias.copy()

    def ends(self, q: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Return every capsule's end points in the world, by MuJoCo's link poses."""
        self.see(q, np.zeros_like(q))
        found = []
        for capsule in self.tree.capsules:
            body = self.mj.jnt_bodyid[capsule.link]
            r, p = self.data.xmat[body].reshape(3, 3), self.data.xpos[body]
            found.append((p, r, capsule))
        return found


def watch_of(traced: dict[str, Any], robot: Any) -> ArmWatch:
    return ArmWatch(SimpleNamespace(rollout=lambda: traced, robot=robot, folder=Path("bundle")))


@cache
def arm(name: str) -> Arm:
    return Arm(name)


@pytest.mark.parametrize("name", RUNS)
def test_momentum_gravity_and_tool_are_mujocos(name: str) -> None:
    one, rng = arm(name), np.random.default_rng(1)
    site = mujoco.mj_name2id(one.mj, mujoco.mjtObj.mjOBJ_SITE, one.robot.tool)
    for _ in range(25):
        q, v = one.random(rng)
        seen = one.watch(q, v)
        assert np.abs(seen.momentum - one.mass(q) @ v).max() < CLOSE
        assert np.abs(seen.gravity - one.bias(q, 0 * v)).max() < CLOSE
        assert np.abs(seen.position - one.data.site_xpos[site]).max() < CLOSE
        assert np.abs(seen.rotation - one.data.site_xmat[site].reshape(3, 3)).max() < CLOSE


@pytest.mark.parametrize("name", RUNS)
def test_beta_is_what_changes_momentum_besides_torque(name: str) -> None:
    """beta = C^T v - g - friction, with C^T v = dM/dt v - C v; dM/dt of MuJoCo's M by central differences."""
    one, rng, e = arm(name), np.random.default_rng(2), 1e-5
    for _ in range(25):
        q, v = one.random(rng)
        change = (one.mass(q + e * v) - one.mass(q - e * v)) @ v / (2 * e)
        friction = one.mj.dof_damping * v + one.mj.dof_frictionloss * np.tanh(v / 0.02)
        wanted = change - one.bias(q, v) - friction  # bias is C v + g
        assert np.abs(one.watch(q, v).beta - wanted).max() < CLOSE * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("name", RUNS)
def test_momentum_grows_by_torque_and_beta(name: str) -> None:
    """The observer's equation on a free fall of MuJoCo's own: no contact, no residual."""
    one, rng = arm(name), np.random.default_rng(3)
    for _ in range(5):
        q, v = one.random(rng)
        one.see(q, v)
        acceleration, tau, h = one.data.qacc_smooth.copy(), one.data.qfrc_actuator.copy(), 1e-6
        moved = one.watch(q + h * v, v + h * acceleration).momentum - one.watch(q - h * v, v - h * acceleration).momentum
        # Smooth is without Coulomb friction, which MuJoCo has as a constraint.
        beta = one.watch(q, v).beta + one.mj.dof_frictionloss * np.tanh(v / 0.02)
        assert np.abs(moved / (2 * h) - tau - beta).max() < 1e-4 * max(1.0, np.abs(beta).max())


def segments(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
    """Return the distance of two segments by search: how far a point of one is from the other is convex along the one."""
    along = d - c

    def far(s: float) -> float:
        point = a + s * (b - a)
        part = np.clip((point - c) @ along / max(along @ along, 1e-300), 0.0, 1.0)
        return float(np.linalg.norm(point - c - part * along))

    low, high = 0.0, 1.0
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if far(left) <= far(right) else (left, high)
    return min(far(0.0), far(1.0), far(low))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(VECTOR, VECTOR, VECTOR, VECTOR)
def test_two_capsules_are_as_far_apart_as_a_search_finds(a, b, c, d) -> None:
    found = float(capsule_capsule(a, b, 0.05, c, d, 0.03))
    wanted = segments(a, b, c, d) - 0.08
    assert wanted - 2e-6 <= found, "never too near"
    w, u = d - c, b - a
    sine = np.linalg.norm(np.cross(u, w)) / max(np.linalg.norm(u) * np.linalg.norm(w), 1e-12)
    if sine > 1e-3:
        assert found <= wanted + 2e-6


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "wanted"),
    [
        ([0, 0, 0], [1, 0, 0], [0.5, 0.3, -1], [0.5, 0.3, 1], 0.3),  # crossing
        ([0, 0, 0], [1, 0, 0], [0, 0.2, 0], [1, 0.2, 0], 0.2),  # parallel
        ([0, 0, 0], [1, 0, 0], [1.4, 0, 0], [2, 0, 0], 0.4),  # in a line
        ([0, 0, 0], [0, 0, 0], [0.3, 0.4, 0], [0.3, 0.4, 0], 0.5),  # spheres
        ([0, 0, 0], [1, 0, 0], [0.5, -1, 0], [0.5, 1, 0], 0.0),  # through each other
    ],
)
def test_capsules_in_known_places(a, b, c, d, wanted) -> None:
    assert float(capsule_capsule(*map(np.array, (a, b)), 0.05, *map(np.array, (c, d)), 0.02)) == pytest.approx(
        wanted - 0.07, abs=2e-6
    )


def distances(one: Arm, q: np.ndarray) -> float:
    """Return the least distance of the pairs watched, by search over MuJoCo's poses."""
    places = [(p + r @ c.a, p + r @ c.b, c.radius) for p, r, c in one.ends(q)]
    return min(segments(*places[i][:2], *places[j][:2]) - places[i][2] - places[j][2] for i, j in one.pairs)


@pytest.mark.parametrize("name", ["panda", "ur10e"])
def test_the_distance_to_itself_is_the_nearest_pairs(name: str) -> None:
    one, rng = arm(name), np.random.default_rng(4)
    assert one.pairs
    for _ in range(10):
        q, _ = one.random(rng)
        found = one.watch(q, np.zeros_like(q)).itself
        assert found == pytest.approx(distances(one, q), abs=5e-6)
    home = np.array(one.robot.home)
    assert one.watch(home, 0 * home).itself > 0, "at home the arm does not touch itself"


def test_the_distance_to_an_obstacle_is_the_nearest_capsules() -> None:
    one, rng = Arm("panda", obstacles=[BALL]), np.random.default_rng(5)
    rows = []
    for _ in range(10):
        q, _ = one.random(rng)
        center = rng.uniform(-0.8, 0.8, 3)
        one.watch.obstacles([center])
        places = [(p + r @ c.a, p + r @ c.b, c.radius) for p, r, c in one.ends(q)]
        wanted = min(segments(a, b, center, center) - radius for a, b, radius in places) - BALL["size"][0]
        seen = one.watch(q, np.zeros_like(q))
        assert seen.scene == pytest.approx(wanted, abs=5e-6)
        rows.append(q)
    each = [one.watch(q, np.zeros_like(q)) for q in rows]
    assert one.watch.clearance(np.array(rows)) == pytest.approx(min(min(s.scene, s.itself) for s in each), abs=1e-12)


def test_nothing_there_is_far_away() -> None:
    one = arm("arm2")
    seen = one.watch(np.array([0.3, -0.2]), np.zeros(2))
    assert seen.scene == 10.0


def test_another_robots_program_is_refused() -> None:
    with pytest.raises(BundleError, match="does not fit 7 joints"):
        watch_of(arm("ur10e").traced, arm("panda").robot)


def test_a_bundle_without_a_program_is_refused() -> None:
    for wrong in ({}, {"watch": {"traced": 3, "damping": [], "friction": []}}):
        with pytest.raises(BundleError, match="no watch program"):
            watch_of(wrong, arm("arm2").robot)
