"""From a resolved run to a working planner: builds model, task and rule, and answers plan requests."""

from __future__ import annotations

import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from mbctrl.base.config import PlannerSpec, RunConfig
from mbctrl.base.errors import SpecError, suggest
from mbctrl.base.plan import Plan, PlanFollower, PlanRequest
from mbctrl.base.scene import FigureEightGoal, JointGoal, PoseGoal, Target
from mbctrl.base.spec import import_name
from mbctrl.dynamics.load import Model
from mbctrl.planning.arrays import Array, host
from mbctrl.planning.backends import Parts, analytic_of, build_backend
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise, Shape
from mbctrl.planning.objective import FeatureMap, Parameters
from mbctrl.planning.planner import Planner, PlannerState, Result
from mbctrl.planning.rules import RULES
from mbctrl.planning.rules.base import Rule
from mbctrl.tasks.features import RobotScales
from mbctrl.tasks.task import build_task

_PREDICTION_STEP = 0.01  # [s], longest step of the forward prediction


class MpcController:
    """A sampling MPC for one resolved run.

    ``plan`` answers one request. The controller keeps the planner's state and its own last plans between requests;
    nothing else.

    Errors:
        SpecError: naming the key, for a rule, setting, term or size that does not fit the robot.
    """

    def __init__(self, config: RunConfig, model: Model, file: str | Path | None = None) -> None:
        self.config, self.model = config, model
        robot, spec = model.robot, config.planner
        steps = max(1, round(spec.horizon / config.dynamics.dt))
        self.analytic = analytic_of(config, model, file)
        self._at = 1.0 if robot.control.mode == "impedance" and config.dynamics.backend != "mujoco" else 0.5
        like: dict[str, Any] = {"dtype": self.analytic.dtype, "device": self.analytic.device}
        try:
            self.knots = Knots(spec.knots, steps, config.dynamics.dt, spec.interpolation, self._at)
        except ValueError as error:
            raise SpecError(str(error), file=file, key="planner.knots") from None
        self.features = FeatureMap(robot, self.analytic, config.obstacles)
        task = build_task(config.task, scales_of(robot), file=file)
        self._check_needs(task.terms, file)
        low, high = command_bounds(robot)
        noise = Noise(spec.noise, Shape(spec.knots, robot.nu, spec.samples), spec.beta, **like)
        rule = build_rule(config, file)
        self.backend = build_backend(config, model, self.analytic, Parts(self.features, task, self.knots, noise, low, high), file)
        self._array = self.backend.array
        self.planner = Planner(
            self.backend.search,
            rule,
            self.knots,
            samples=spec.samples,
            sigma=self._array(_sigma(spec, robot.nu, file)),
            iterations=spec.iterations,
            growth=spec.growth,
        )
        self._steps, self._bounds = steps, (low, high)
        self._targets = [self._still(target) for target in config.goal.targets] if isinstance(config.goal, PoseGoal) else []
        self._spread = self.knots.weights(np.arange(steps + 1) * config.dynamics.dt)
        self.reset()

    def reset(self) -> None:
        """Forget every plan; the next one starts from the command then in force."""
        self._state: PlannerState | None = None
        self._plans: dict[int, Plan] = {}
        self._seq = 0

    def warm(self) -> None:
        """Plan once and forget it, so that the first real plan is as fast as the rest."""
        home = np.concatenate([self.model.robot.home, np.zeros(self.analytic.nq)])
        still = tuple((np.asarray(obstacle.position, float), np.zeros(3)) for obstacle in self.config.obstacles)
        target = (np.zeros(3), None) if self.config.goal.kind == "backend" else None
        self.plan(PlanRequest(0.0, home, target=target, obstacles=still))
        self.reset()

    def plan(self, request: PlanRequest) -> Plan:
        """Return the next plan: predict the state ahead by the latency, shift the belief there, iterate."""
        cpu = time.process_time()
        with torch.inference_mode():
            x, u_before = self._predict(request)
            t0 = request.stamp + request.latency
            if self._state is None:
                self._state = self.planner.initial(self._array(u_before), t0, self.config.seed)
            self._state, result = self.planner.plan(self._state, self._array(x), self.parameters(request, u_before), t0)
            return self._packed(request, x, t0, result, cpu)

    def _packed(self, request: PlanRequest, x: np.ndarray, t0: float, result: Result, cpu: float) -> Plan:
        knots = host(result.knots).astype(float)
        commands = (self._spread @ knots).clip(*self._bounds)
        states = self._rollout(x, knots[..., None])[:, :, 0].astype(float)
        self._seq += 1
        figures = result.figures._asdict()
        plan = Plan(
            seq=self._seq,
            stamp=request.stamp,
            t0=t0,
            dt=self.config.dynamics.dt,
            u=commands,
            x=states,
            info={**figures, "cpu": time.process_time() - cpu},
            fan=self.fan(x, result, request.fan) if request.fan else None,
        )
        self._plans = {seq: old for seq, old in self._plans.items() if seq > self._seq - 4} | {self._seq: plan}
        return plan

    def _rollout(self, x: np.ndarray, knots: np.ndarray) -> np.ndarray:
        """Return the states (H+1, nx, N) that ``knots`` (K, nu, N) lead to from ``x``."""
        low, high = self._bounds
        commands = self.knots.commands(knots).clip(low[:, None], high[:, None])
        return self.backend.rollout(x, commands, self.config.dynamics.dt)

    def fan(self, x: np.ndarray, result: Result, count: int) -> np.ndarray:
        """Return the tool paths (count, H+1, 3) [m] of the heaviest candidates."""
        best = np.argsort(-host(result.weights), kind="stable")[:count]
        states = torch.as_tensor(self._rollout(x, host(result.candidates[:, :, best])), dtype=self.analytic.dtype)
        nq, horizon = self.analytic.nq, len(states)
        poses = self.analytic.poses(states[:, :nq].movedim(0, 1).reshape(nq, -1).to(self.analytic.device))
        position = self.analytic.frame(poses, self.features.tool)[1]
        return position.reshape(3, horizon, len(best)).permute(2, 1, 0).cpu().double().numpy()

    def parameters(self, request: PlanRequest, u_before: np.ndarray) -> Parameters:
        """Return what the task's terms need to know of goal and obstacles along the horizon."""
        ahead = request.latency + (np.arange(self._steps) + 1) * self.config.dynamics.dt
        goal, target = self.config.goal, None
        if request.target is not None:
            position, rotation = request.target
            target = (np.tile(position, (self._steps, 1)), None if rotation is None else np.tile(rotation, (self._steps, 1, 1)))
        elif isinstance(goal, FigureEightGoal):
            target = goal.sample(request.goal, request.goal_time + ahead)
        p = r = None
        if isinstance(goal, PoseGoal) and request.target is None:  # stands still: the same tensors again
            p, r = self._targets[min(request.goal, len(goal.targets) - 1)]
        elif target is not None:
            p = self._array(target[0].T)[:, :, None]
            r = None if target[1] is None else self._array(target[1].transpose(1, 2, 0))[..., None]
        return Parameters(
            u_before=self._array(u_before),
            p_target=p,
            r_target=r,
            q_target=self._array(np.asarray(goal.position)) if isinstance(goal, JointGoal) else None,
            obstacles=tuple(self._array((at[:, None] + rate[:, None] * ahead)[..., None]) for at, rate in request.obstacles),
        )

    def _still(self, target: Target) -> tuple[Array, Array | None]:
        """Return a target that stands still as position (3, H, 1) and rotation (3, 3, H, 1) or None."""
        size = (self._steps, 1)
        position = np.broadcast_to(np.asarray(target.position)[:, None, None], (3, *size))
        if target.rotation is None:
            return self._array(position.copy()), None
        rotation = np.broadcast_to(np.asarray(target.rotation)[..., None, None], (3, 3, *size))
        return self._array(position.copy()), self._array(rotation.copy())

    def _predict(self, request: PlanRequest) -> tuple[np.ndarray, np.ndarray]:
        """Return state and command in force ``latency`` seconds after the stamp: the plans in force, rolled forward."""
        robot, nq, t = self.model.robot, self.analytic.nq, request.stamp
        follower = PlanFollower(self.config.loop.blend)
        if request.following is not None and request.following.seq in self._plans:
            follower.resume(self._plans[request.following.seq], request.following)
        x = np.asarray(request.x, float)
        if follower.plan is None:
            held = np.zeros(robot.nu) if robot.control.mode == "torque" else x[:nq][robot.command_index]
            return x, held
        if request.latency > 0:
            count = int(np.ceil(request.latency / _PREDICTION_STEP))
            h = request.latency / count
            commands = np.stack([follower.command(t + (k + self._at) * h) for k in range(count)])
            x = self.backend.rollout(x, commands[..., None], h)[-1, :, 0].astype(float)
        return x, follower.command(t + request.latency)

    def _check_needs(self, terms: Any, file: str | Path | None) -> None:
        has_target = isinstance(self.config.goal, (PoseGoal, FigureEightGoal)) or self.config.goal.kind == "backend"
        for name, term in terms.items():
            if term.needs == "p_world_target" and not has_target:
                raise SpecError(
                    f"needs a goal with a tool target, found goal.kind: {self.config.goal.kind}", file=file, key=f"task.{name}"
                )
            if term.needs == "acceleration" and self.model.robot.limits.acceleration is None:
                raise SpecError("needs a robot with limits.acceleration, found none", file=file, key=f"task.{name}")


def command_bounds(robot: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper bounds of the command, (nu,): joint range [rad] or effort limit [N·m]."""
    limits = robot.limits
    if robot.control.mode == "torque":
        return -np.asarray(limits.effort), np.asarray(limits.effort)
    return np.asarray(limits.position_lower)[robot.command_index], np.asarray(limits.position_upper)[robot.command_index]


def scales_of(robot: Any) -> RobotScales:
    """Return the limits terms measure by."""
    limits = robot.limits
    return RobotScales(
        robot.home, limits.position_lower, limits.position_upper, limits.velocity, limits.effort, limits.acceleration
    )


def build_rule(config: RunConfig, file: str | Path | None = None) -> Rule:
    """Return the update rule with its settings checked against its fields."""
    kind = import_name(config.rule, RULES, file=file, key="rule")
    if not (isinstance(kind, type) and issubclass(kind, Rule) and is_dataclass(kind)):
        raise SpecError("expected a frozen dataclass derived from mbctrl.planning.rules.base.Rule", file=file, key="rule")
    known = {field.name for field in fields(kind)}
    for name in config.settings:
        if name not in known:
            raise SpecError(f"unknown key{suggest(name, known)}", file=file, key=f"settings.{name}")
        if isinstance(config.settings[name], float) and not np.isfinite(config.settings[name]):
            raise SpecError(f"expected a finite number, found {config.settings[name]}", file=file, key=f"settings.{name}")
    try:
        return TypeAdapter(kind).validate_python(dict(config.settings))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in ("settings", *fault["loc"]))
        raise SpecError(f"{fault['msg']}, found {fault['input']!r}", file=file, key=key) from None


def _sigma(spec: PlannerSpec, nu: int, file: str | Path | None) -> np.ndarray:
    values = np.atleast_1d(np.asarray(spec.sigma, float))
    if len(values) not in (1, nu):
        raise SpecError(f"expected 1 or {nu} values, found {len(values)}", file=file, key="planner.sigma")
    return np.linspace(spec.ramp, 1.0, spec.knots)[:, None] * np.broadcast_to(values, (nu,))
