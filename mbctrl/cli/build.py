"""Builds and checks the parts of a run from its configuration."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np

from mbctrl.base.config import RobotSpec, RunConfig
from mbctrl.base.errors import GoalError, SpecError
from mbctrl.base.parameters import load_parameters
from mbctrl.base.scene import MOVING, JointGoal, ObjectPoseGoal, PoseGoal
from mbctrl.dynamics.load import Model, load_model
from mbctrl.planning.controller import MpcController, thing_of


def load_run_model(config: RunConfig, file: Path) -> Model:
    """Load the run's robot with the parameters it is believed to have; SpecError names the scenario's key."""
    return load_arm(config.robot, file)


def load_arm(robot: RobotSpec, file: Path) -> Model:
    """Load a robot with the parameters it is believed to have; SpecError names the key of ``file``, which names it."""
    return _load(robot.name, robot.parameters, file, "robot.parameters")


def load_truth(config: RunConfig, file: Path, model: Model) -> Model:
    """Load what the simulator moves: the run's robot ``model``, or one with the backend's own parameters where they differ."""
    if config.backend.parameters is None:
        return model
    truth = _load(config.robot.name, config.backend.parameters, file, "backend.parameters")
    same = model.parameters is not None and truth.parameters.joints == model.parameters.joints
    return model if same else truth


def _load(robot: str, parameters: str | None, file: Path, key: str) -> Model:
    fitted = None if parameters is None else load_parameters(parameters, file=file, key=key)
    return load_model(robot, fitted, file=file, key="robot")


def build_controller(config: RunConfig, file: Path, model: Model | None = None, warm: bool = False) -> MpcController:
    """Build the run's controller."""
    controller = MpcController(config, model or load_run_model(config, file), file)
    if warm:
        controller.warm()
    return controller


def check_goal(config: RunConfig, model: Model, file: Path) -> None:
    """Refuse goals that do not fit the robot or lie out of its reach.

    Errors:
        GoalError, SpecError: naming the key.
    """
    goal, robot = config.goal, model.robot
    if config.backend.kind == "dm_control" and config.backend.task is None:
        raise SpecError("missing; expected DOMAIN-TASK", file=file, key="backend.task")
    if config.backend.kind == "dm_control" and config.backend.parameters is not None:
        raise SpecError("a dm_control task has the suite's own physics", file=file, key="backend.parameters")
    if config.backend.kind == "dm_control" and config.backend.payload is not None:
        raise SpecError("a dm_control task has the suite's own physics", file=file, key="backend.payload")
    if goal.kind == "backend" and config.backend.kind != "dm_control":
        raise SpecError("the mujoco backend brings no goal of its own", file=file, key="goal.kind")
    for key in ("feedback_stiffness", "feedback_damping"):
        gains = getattr(config.loop, key)
        if gains is not None and len(gains) != robot.nu:
            raise SpecError(f"expected {robot.nu} values, found {len(gains)}", file=file, key=f"loop.{key}")
    if isinstance(goal, JointGoal) and len(goal.position) != robot.nq:
        raise SpecError(
            f"expected {robot.nq} values, one for each joint, found {len(goal.position)}", file=file, key="goal.position"
        )
    if isinstance(goal, PoseGoal):
        points = [(f"goal.targets[{i}].position", np.asarray(target.position)) for i, target in enumerate(goal.targets)]
        if goal.within is not None:
            sides = zip(goal.within.low, goal.within.high)
            points = [("goal.within", np.asarray(corner)) for corner in product(*sides)]
    elif isinstance(goal, ObjectPoseGoal):
        thing_of(config, model, file)
        points = [("goal.position", np.asarray(goal.position))]
    elif isinstance(goal, MOVING):
        points = [("goal", point) for point in goal.sample(0, np.linspace(0, goal.lap, 50))[0]]
    else:
        return
    base, reach = _reach(model)
    for key, point in points:
        distance = float(np.linalg.norm(point - base))
        if distance > reach:
            raise GoalError(f"out of reach: {distance:.3f} m from the first joint, the arm spans {reach:.3f} m", file=file, key=key)


def _reach(model: Model) -> tuple[np.ndarray, float]:
    """Return the first joint's position (3,) [m] and an upper bound of the tool's distance from it [m]."""
    tree, frame = model.tree, model.tree.frames[model.robot.tool]
    reach, link = float(np.linalg.norm(frame.position)), frame.link
    while link > 0:
        slide = (
            0.0
            if tree.revolute[link]
            else max(abs(model.robot.limits.position_lower[link]), abs(model.robot.limits.position_upper[link]))
        )
        reach += float(np.linalg.norm(tree.fixed_position[link])) + slide
        link = tree.parent[link]
    return tree.fixed_position[0], reach
