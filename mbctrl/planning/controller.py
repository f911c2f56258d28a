"""From a resolved run to a working planner: builds model, task and rule in torch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import SpecError, suggest
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.robot import Robot
from mbctrl.base.scene import MOVING, CircleGoal, ObjectPoseGoal, PoseGoal
from mbctrl.dynamics.contact import mount_of
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import Frame
from mbctrl.planning.backends import Parts, analytic_of, build_backend, goals_of, hybrid_of, named_file, risk_of
from mbctrl.planning.chain import Chain
from mbctrl.planning.keeper import keeper_of
from mbctrl.planning.knots import Knots
from mbctrl.planning.mpc import Mpc, command_bounds
from mbctrl.planning.noise import Noise, Shape
from mbctrl.planning.objective import FeatureMap
from mbctrl.planning.planner import Planner
from mbctrl.planning.policy import Asked, Place, Policy, Sees, load_policy
from mbctrl.planning.settings import build_rule, sigma_of
from mbctrl.tasks.features import RobotScales
from mbctrl.tasks.task import Task, build_task
from mbctrl.tasks.terms import ContactForce


class MpcController(Mpc):
    """A sampling MPC built from a resolved run, its model and task in torch, planned with as ``dynamics.backend`` says.

    Errors:
        SpecError: naming the key, for a rule, setting, term or size that does not fit the robot.
    """

    def __init__(self, config: RunConfig, model: Model, file: str | Path | None = None) -> None:
        self.model = model
        robot, spec = model.robot, config.planner
        steps = max(1, round(spec.horizon / config.dynamics.dt))
        self.analytic = analytic_of(config, model, file)
        at = 1.0 if robot.control.mode == "impedance" and config.dynamics.backend != "mujoco" else 0.5
        like: dict[str, Any] = {"dtype": self.analytic.dtype, "device": self.analytic.device}
        try:
            knots = Knots(spec.knots, steps, config.dynamics.dt, spec.interpolation, at)
        except ValueError as error:
            raise SpecError(str(error), file=file, key="planner.knots") from None
        self.hybrid = hybrid_of(config, model, self.analytic, file)
        check_adapt(config, robot, self.hybrid, file)
        self.features = FeatureMap(robot, self.analytic, config.obstacles, thing_of(config, model, file))
        self.task = with_force(build_task(config.task, scales_of(robot), file=file), config, file)
        check_needs(self.task, config, robot, file)
        check_contact(self.task, self.analytic, file)
        low, high = command_bounds(robot)
        noise = Noise(spec.noise, Shape(spec.knots, robot.nu, spec.samples), spec.beta, **like)
        rule = build_rule(config, file)
        risk = risk_of(config, self.hybrid, file)
        parts = Parts(self.features, self.task, knots, noise, low, high, self.hybrid, risk)
        self.backend = build_backend(config, model, self.analytic, parts, file)
        self._keeper = keeper_of(config, model, file)
        if self._keeper is not None and self.backend.weigh is None:
            found = self.backend.name
            raise SpecError(f"kind model needs compiled rollouts, found dynamics.backend {found}", file=file, key="adapt")
        planner = Planner(
            self.backend.search,
            rule,
            knots,
            samples=spec.samples,
            sigma=self.backend.array(sigma_of(spec, robot.nu, file)),
            iterations=spec.iterations,
            growth=spec.growth,
        )
        self.place = place_of(config, model, knots)
        policy: Policy | None = None
        if spec.policy is not None:
            policy = load_policy(named_file(spec.policy, file, "planner.policy"), self.place)
        super().__init__(config, robot, planner, self.backend.array, self.backend.rollout, self._tool_paths, policy=policy)

    def reset(self) -> None:
        """Forget every plan, and what was learnt meanwhile; the next plan starts from the command then in force."""
        super().reset()
        if self._keeper is not None:
            self.backend.weigh(self._keeper.reset())

    def plan(self, request: PlanRequest) -> Plan:
        """Return the next plan."""
        with torch.inference_mode():
            if self._keeper is None:
                return super().plan(request)
            start = time.process_time()
            learnt = self._keeper.take(request)
            if learnt is not None:
                self.backend.weigh(learnt)
            spent = time.process_time() - start
            plan = super().plan(request)
            return replace(plan, info={**plan.info, "cpu": plan.info["cpu"] + spent, "model": self._keeper.best})

    def _tool_paths(self, states: np.ndarray) -> np.ndarray:
        nq, (horizon, _, samples) = self.robot.nq, states.shape
        q = torch.as_tensor(states[:, :nq], dtype=self.analytic.dtype).movedim(0, 1).reshape(nq, -1)
        position = self.analytic.frame(self.analytic.poses(q.to(self.analytic.device)), self.features.tool)[1]
        return position.reshape(3, horizon, samples).cpu().numpy()


def place_of(config: RunConfig, model: Model, knots: Knots) -> Place:
    """Return where a policy of a run's plans is to be used."""
    robot, tree, goals = model.robot, model.tree, goals_of(config)
    frame = getattr(config.goal, "frame", None)
    asked = Asked(
        config.goal.kind if frame is None else f"{config.goal.kind} of {frame}",
        any(goal.position for goal in goals),
        any(goal.rotation for goal in goals),
        any(goal.joints for goal in goals),
        len(config.obstacles),
    )
    chain = Chain.to(tree, thing_of(config, model) or tree.frames[robot.tool])
    follows = None if robot.control.mode == "torque" else tuple(int(i) for i in robot.command_index)
    sees = Sees(tuple(tree.revolute), tree.reference, chain, asked)
    return Place(robot.name, tuple(robot.joints), *command_bounds(robot), follows, sees, knots)


def thing_of(config: RunConfig, model: Model, file: str | Path | None = None) -> Frame | None:
    """Return the frame of the object that the run's goal is for, None where that is the tool.

    Errors:
        SpecError: for a frame the model does not have.
    """
    if not isinstance(config.goal, ObjectPoseGoal):
        return None
    name, frames = config.goal.frame, model.tree.frames
    if name not in frames:
        raise SpecError(f"the model has no site or body '{name}'{suggest(name, frames)}", file=file, key="goal.frame")
    return frames[name]


def check_needs(task: Task, config: RunConfig, robot: Robot, file: str | Path | None) -> None:
    """Refuse terms that need what the goal or the robot does not have.

    Errors:
        SpecError: naming the term.
    """
    has_target = isinstance(config.goal, (PoseGoal, *MOVING)) or config.goal.kind == "backend"
    for name, term in task.terms.items():
        if term.needs == "p_world_target" and not has_target:
            raise SpecError(f"needs a goal with a tool target, found goal.kind: {config.goal.kind}", file=file, key=f"task.{name}")
        if term.needs == "p_world_tcp" and not (has_target or isinstance(config.goal, ObjectPoseGoal)):
            raise SpecError(f"needs a goal in the world, found goal.kind: {config.goal.kind}", file=file, key=f"task.{name}")
        if term.needs == "p_world_object" and not isinstance(config.goal, ObjectPoseGoal):
            raise SpecError(
                f"needs a goal for an object (object_pose), found goal.kind: {config.goal.kind}", file=file, key=f"task.{name}"
            )
        if term.needs == "acceleration" and robot.limits.acceleration is None:
            raise SpecError("needs a robot with limits.acceleration, found none", file=file, key=f"task.{name}")


def check_adapt(config: RunConfig, robot: Robot, hybrid: HybridDynamics | None, file: str | Path | None) -> None:
    """Refuse to adapt models that cannot carry a payload, and arms of which no estimate can be made.

    Errors:
        SpecError: saying why.
    """
    if not config.weighs:
        return
    if config.dynamics.backend == "mujoco":
        raise SpecError("MuJoCo as the model carries no payload; expected kernel, torch or auto", file=file, key="dynamics.backend")
    if hybrid is not None and hybrid.residual.base == "identity":
        raise SpecError("a model without physics carries no payload; expected null", file=file, key="adapt")
    if robot.nu != robot.nq:
        raise SpecError(f"expected a robot whose {robot.nq} joints are all driven, found {robot.nu}", file=file, key="adapt")


def check_contact(task: Task, analytic: RigidBodyDynamics, file: str | Path | None) -> None:
    """Refuse terms of a contact that is not declared, or whose force no spring tells.

    Errors:
        SpecError: naming the term.
    """
    contact = analytic.contact
    for name, term in task.terms.items():
        if term.needs in ("contact_gap", "contact_rate", "contact_force") and contact is None:
            raise SpecError("needs dynamics.contact, found none", file=file, key=f"task.{name}")
        if term.needs == "contact_force" and contact is not None and mount_of(contact, analytic.tree) is None:
            raise SpecError(
                "needs a contact whose surface rests on a slide with a spring along its normal, found none",
                file=file,
                key=f"task.{name}",
            )


def with_force(task: Task, config: RunConfig, file: str | Path | None) -> Task:
    """Return the task with the goal's force as the target of the terms of force that have none.

    Errors:
        SpecError: where the goal has none either.
    """
    terms = dict(task.terms)
    for name, term in task.terms.items():
        if isinstance(term, ContactForce) and term.target is None:
            force = config.goal.force if isinstance(config.goal, CircleGoal) else None
            if force is None:
                raise SpecError("needs a target, its own or a goal's force, found none", file=file, key=f"task.{name}.target")
            terms[name] = term.model_copy(update={"target": force})
    return replace(task, terms=terms)


def scales_of(robot: Any) -> RobotScales:
    """Return the limits terms measure by."""
    limits = robot.limits
    return RobotScales(
        robot.home, limits.position_lower, limits.position_upper, limits.velocity, limits.effort, limits.acceleration
    )
