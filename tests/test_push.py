"""Pushing an object: its goal, its terms, the physics of it, and the scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import GoalError, ModelError, SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.base.poses import rotation_from_rpy
from mbctrl.base.scene import ObjectPoseGoal
from mbctrl.base.spec import validate
from mbctrl.cli.build import check_goal
from mbctrl.cli.session import Session
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import SimulatorDynamics
from mbctrl.export.planner import refuse
from mbctrl.planning.backends import analytic_of
from mbctrl.planning.controller import MpcController
from mbctrl.planning.objective import FeatureMap
from mbctrl.runtime.progress import Progress
from mbctrl.tasks.terms import Height, ObjectPose

GOAL = ObjectPoseGoal(kind="object_pose", frame="box", position=(0.5, 0.1, 0.03), yaw=0.6, hold=0.2)


@pytest.fixture(scope="module")
def push() -> Model:
    return load_model("panda_push")


def scenario(**change: Any) -> tuple[RunConfig, Path]:
    config, file = load_run("panda_push_sim")
    return validate(RunConfig, merged(config.model_dump(), change), file), file


# --- the goal ---------------------------------------------------------------------------------------------------------


def test_the_goal_stands_still_and_is_turned_about_the_vertical() -> None:
    p, r = GOAL.sample(3, np.array([0.0, 5.0, 9.0]))
    assert p.shape == (3, 3) and r.shape == (3, 3, 3) and np.array_equal(p[1], GOAL.position)
    expected = [[np.cos(0.6), -np.sin(0.6), 0], [np.sin(0.6), np.cos(0.6), 0], [0, 0, 1]]
    assert np.abs(r - np.array(expected)).max() < 1e-15


@pytest.mark.parametrize(("off", "turned", "counts"), [(0.009, 0.17, True), (0.011, 0.0, False), (0.0, 0.18, False)])
def test_it_counts_when_held_within_both_tolerances(off: float, turned: float, counts: bool) -> None:
    progress = Progress(GOAL)
    pose = np.array(GOAL.position) + [0.0, off, 0.0], rotation_from_rpy(np.array([0.0, 0.0, 0.6 + turned]))
    for t in np.arange(0, 0.25, 0.05):
        progress.update(t, np.zeros(10), pose)
    assert progress.count == 1 and progress.done is counts
    assert abs(progress.position_error - off) < 1e-12 and abs(progress.rotation_error - turned) < 1e-7


def test_it_does_not_count_before_it_was_held_long_enough() -> None:
    progress = Progress(GOAL)
    there = np.array(GOAL.position), rotation_from_rpy(np.array([0.0, 0.0, 0.6]))
    away = there[0] + 0.1, there[1]
    for t, pose in ((0.0, there), (0.1, there), (0.15, away), (0.2, there), (0.3, there)):
        progress.update(t, np.zeros(10), pose)
        assert not progress.done, t
    progress.update(0.4, np.zeros(10), there)
    assert progress.reached == [0.4]


# --- terms ------------------------------------------------------------------------------------------------------------


def test_terms_see_mujocos_poses(push: Model) -> None:
    """Costs of random states are those of the box's and the tool's poses by MuJoCo, in double precision."""
    config, file = scenario(dynamics={"backend": "torch"})
    controller = MpcController(config, push, file)
    arm = RigidBodyDynamics(push.tree, 0.02, **drive_settings(push.robot), contact=analytic_of(config, push).contact)
    arm = RigidBodyDynamics(push.tree, 0.02, **drive_settings(push.robot), contact=arm.contact, dtype=torch.float64)
    features = FeatureMap(push.robot, arm, (), push.tree.frames["box"])
    rng, steps, samples = np.random.default_rng(0), controller.knots.steps, 5
    states = rng.uniform(-1, 1, (steps + 1, 20, samples))
    request = PlanRequest(0.0, states[0, :, 0])
    seen = features(torch.tensor(states), torch.zeros(steps, 7, samples).double(), controller.parameters(request, np.zeros(7)))
    pose, high = (
        ObjectPose(weight=1.0, position_scale=0.02, rotation_scale=0.3, rotation_weight=0.7),
        Height(weight=1.0, target=0.2),
    )
    found = [term.cost(seen, controller.task.robot).numpy() for term in (pose, high)]
    data, goal = mujoco.MjData(push.mj), config.goal
    error = 0.0
    for k in range(steps):
        for i in range(samples):
            data.qpos[:] = states[k + 1, :10, i]
            mujoco.mj_kinematics(push.mj, data)
            far = np.linalg.norm(data.body("box").xpos - goal.position)
            turned = data.qpos[9] - goal.yaw
            expected = np.hypot(1, far / 0.02) - 1 + 0.7 * (np.sqrt(1 + 2 * (1 - np.cos(turned)) / 0.3**2) - 1)
            up = ((data.site("panda_tcp").xpos[2] - 0.2) / 0.01) ** 2
            error = max(error, abs(found[0][k, i] - expected), abs(found[1][k, i] - up) / (1 + up))
    print("largest difference", error)
    assert error < 1e-6  # the goal comes in float32


@pytest.mark.parametrize(
    ("change", "key", "found"),
    [
        ({"goal": {"frame": "bax"}}, "goal.frame", "did you mean 'box'"),
        ({"goal": {"kind": "poses", "targets": [{"position": [0.5, 0, 0.3]}]}}, "task.object_pose", "found goal.kind: poses"),
        ({"goal": {"kind": "joints", "position": [0.0] * 10}, "task": {"object_pose": {"weight": 0}}}, "task.", "needs a goal"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Any, key: str, found: str, push: Model) -> None:
    config, file = load_run("panda_push_sim")
    data = config.model_dump()
    goal = change["goal"] if "kind" in change["goal"] else {**data["goal"], **change["goal"]}
    task = merged(data["task"], change.get("task", {}))
    with pytest.raises(SpecError, match=found) as error:
        MpcController(validate(RunConfig, {**data, "goal": goal, "task": task}, file), push, file)
    assert str(error.value.key).startswith(key)


def test_a_goal_out_of_reach_is_refused(push: Model) -> None:
    config, file = scenario(goal={"position": [1.6, 0.0, 0.03]})
    with pytest.raises(GoalError, match="out of reach"):
        check_goal(config, push, file)


def test_a_goal_for_an_object_is_not_exported(push: Model) -> None:
    config, file = scenario(dynamics={"backend": "torch"})
    controller = MpcController(config, push, file)
    bare = config.model_copy(update={"dynamics": config.dynamics.model_copy(update={"contact": None})})
    controller.config = bare
    with pytest.raises(SpecError, match="a goal for an object") as error:
        refuse(controller)
    assert error.value.key == "goal.kind"


# --- physics ----------------------------------------------------------------------------------------------------------


def simulator(push: Model, dt: float = 0.02) -> SimulatorDynamics:
    return SimulatorDynamics(push.mj, dt, **drive_settings(push.robot), threads=1)


def test_a_pushed_box_moves_as_in_mujoco(push: Model) -> None:
    """From the tip on the face, 0.4 s of random pushes end with the box where MuJoCo has it, in small part of how far it went."""
    config, _ = scenario()
    contact = analytic_of(config, push).contact
    arm = RigidBodyDynamics(push.tree, 0.02, **drive_settings(push.robot), contact=contact, dtype=torch.float64)
    rng, samples, steps = np.random.default_rng(1), 24, 20
    x = np.zeros((20, samples))
    x[:10] = np.array(push.robot.home)[:, None]
    x[7], x[8], x[9] = rng.uniform(-0.03, 0.03, samples), -0.035, rng.uniform(-0.1, 0.1, samples)
    data = mujoco.MjData(push.mj)
    data.qpos[:] = push.robot.home
    mujoco.mj_fwdPosition(push.mj, data)
    jacobian = np.zeros((3, 10))
    mujoco.mj_jacSite(push.mj, data, jacobian, None, push.mj.site("panda_fingertip").id)
    ahead = np.linalg.pinv(jacobian[:, :7]) @ np.stack(
        [rng.uniform(-0.02, 0.02, samples), np.full(samples, 0.1), np.zeros(samples)]
    )
    ramp = (np.arange(steps) + 1)[:, None, None] / steps
    u = torch.tensor(x[:7] + ramp * ahead)
    ours, theirs = arm.rollout(torch.tensor(x), u)[-1], simulator(push).rollout(torch.tensor(x), u)[-1]
    went = theirs[7:10] - torch.tensor(x[7:10])
    error = (ours - theirs)[7:10].abs()
    print("went", went.abs().amax(1), "median", error.median(1).values, "largest", error.amax(1))
    assert went[1].min() > 0.01 and went[2].abs().max() > 0.1
    assert error[:2].max() < 3e-3 and error[2].max() < 0.05


def test_a_slowly_pushed_box_turns_as_on_a_limit_surface(push: Model) -> None:
    """A steady force off the middle gives speed and turning rate in the ratio of an ellipsoidal limit surface's normal."""
    data = mujoco.MjData(push.mj)
    data.qpos[:7], force, lever = np.array(push.robot.home[:7]), 2.0, 0.03
    for _ in range(300):
        data.qfrc_applied[7:10] = 0.0, force, force * lever
        mujoco.mj_step(push.mj, data)
    mean_square = (0.1**2 + 0.1**2) / 12
    assert abs(data.qvel[8] - force / 40) < 1e-4
    assert abs(data.qvel[9] / data.qvel[8] / (lever / mean_square) - 1) < 1e-2


@pytest.mark.parametrize(("axis", "fits"), [("0 0 1", True), ("0.1 0 1", False)])
def test_the_simulator_takes_upright_hinges_beside_a_compensated_arm(axis: str, fits: bool) -> None:
    mj = mujoco.MjModel.from_xml_string(
        f"""<mujoco><worldbody>
        <body><joint name="arm" axis="0 1 0"/><geom size=".1" pos=".3 0 0" contype="0" conaffinity="0"/></body>
        <body pos="1 0 0"><joint name="x" type="slide" axis="1 0 0"/><joint name="turn" axis="{axis}"/>
        <geom size=".1" pos=".2 0 0" contype="0" conaffinity="0"/></body></worldbody></mujoco>"""
    )
    if not fits:
        with pytest.raises(ModelError, match="upright hinges that such carry, found turn"):
            SimulatorDynamics(mj, 0.01, commanded=[0], gravity_compensation=True)
        return
    still = SimulatorDynamics(mj, 0.01, commanded=[0], gravity_compensation=True, threads=1)
    x = torch.tensor([[0.2], [0.0], [0.5], [0.0], [0.0], [0.0]], dtype=torch.float64)
    assert (still.rollout(x, torch.zeros(10, 1, 1).double())[-1] - x).abs().max() < 1e-12


# --- the scenario -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [2, 5])
def test_the_scenario_brings_the_box_to_its_pose(seed: int, push: Model, tmp_path: Path) -> None:
    config, file = scenario(duration=3.0, seed=seed)
    summary = Session(config, file, lockstep=True, model=push).run(tmp_path / "run")
    print("reached", summary.reached, "end", summary.position_error, summary.rotation_error)
    assert len(summary.reached) == 1 and summary.position_error < 0.01 and summary.rotation_error < np.radians(10)
    assert not summary.violations


def test_without_a_contact_in_the_physics_the_box_is_not_brought_there(push: Model, tmp_path: Path) -> None:
    nothing = {"stiffness": 0.0, "damping": 0.0, "friction": 0.0}
    config, file = scenario(duration=3.0, seed=2, dynamics={"contact": nothing})
    assert not Session(config, file, lockstep=True, model=push).run(tmp_path / "run").reached
