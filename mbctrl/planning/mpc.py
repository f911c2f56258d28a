"""The receding horizon: answers plan requests with any planner and any model of the arm. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mbctrl.base.config import RunConfig, settled
from mbctrl.base.plan import Plan, PlanFollower, PlanRequest
from mbctrl.base.robot import Robot
from mbctrl.base.scene import MOVING, Goal, JointGoal, ObjectPoseGoal, PoseGoal, Target
from mbctrl.planning.arrays import Array, host
from mbctrl.planning.planner import Parameters, Planner, PlannerState, Result


class Mpc:
    """Replans from the newest state.

    ``plan`` answers one request. The planner's state and the last few plans are kept between requests; nothing else.

    Args:
        config: the resolved run.
        robot: the arm.
        planner: draws, costs, refits.
        array: brings numpy's numbers into the planner's kind.
        rollout: states (H+1, nx, N) from ``x`` (nx,) under commands (H, nu, N), ``dt`` seconds apart, in numpy's arrays; in a
            run that weighs it takes the payload (10,), too.
        paths: the tool's positions (3, T, N) [m] at states (T, nx, N); None: plans carry no fan.
        step: the longest step of the prediction from a measurement to a plan's start [s].
        policy: knots (K, nu) for a state (nx,) and what is asked, in numpy: a candidate of every plan, and what is followed where
            no candidate's cost is a number; None: there is none.
    """

    def __init__(
        self,
        config: RunConfig,
        robot: Robot,
        planner: Planner,
        array: Callable[[Any], Array],
        rollout: Callable[..., np.ndarray],
        paths: Callable[[np.ndarray], np.ndarray] | None = None,
        step: float = 0.01,
        policy: Callable[[np.ndarray, Parameters], np.ndarray] | None = None,
    ) -> None:
        config = settled(config)
        self.config, self.robot, self.planner, self.knots = config, robot, planner, planner.knots
        self._array, self._rollout_model, self._paths, self._step = array, rollout, paths, step
        self.policy = policy
        self._steps, self._bounds = self.knots.steps, command_bounds(robot)
        self._targets: list[tuple[Array, Array | None]] = []
        self._spread = self.knots.weights(np.arange(self._steps + 1) * config.dynamics.dt)
        self.pursue(config.goal)
        self.reset()

    def pursue(self, goal: Goal) -> None:
        """Take up another goal of the kind there was."""
        self.config = self.config.model_copy(update={"goal": goal})
        self._targets = [self._still(target) for target in goal.targets] if isinstance(goal, PoseGoal) else []

    def reset(self) -> None:
        """Forget every plan; the next one starts from the command then in force."""
        self._state: PlannerState | None = None
        self._plans: dict[int, Plan] = {}
        self._seq = 0

    def resume(self, other: Mpc) -> None:
        """Go on where ``other`` is, of the same settings and another model: its belief, and its plans, which may be in force."""
        self._state, self._plans, self._seq = other._state, other._plans, other._seq

    def warm(self) -> None:
        """Plan once and forget it, so that the first real plan is as fast as the rest."""
        home = np.concatenate([self.robot.home, np.zeros(self.robot.nq)])
        still = tuple((np.asarray(obstacle.position, float), np.zeros(3)) for obstacle in self.config.obstacles)
        target = (np.zeros(3), None) if self.config.goal.kind == "backend" else None
        self.plan(PlanRequest(0.0, home, target=target, obstacles=still))
        self.reset()

    def plan(self, request: PlanRequest) -> Plan:
        """Return the next plan: predict the state ahead by the latency, shift the belief there, iterate."""
        cpu = time.process_time()
        x, u_before = self._predict(request)
        t0 = request.stamp + request.latency
        if self._state is None:
            self._state = self.planner.initial(self._array(u_before), t0, self.config.seed)
        parameters = self.parameters(request, u_before)
        proposed = None if self.policy is None else self.policy(x, on_host(parameters))
        if proposed is not None:
            parameters = replace(parameters, proposal=self._array(proposed[..., None]))
        self._state, result = self.planner.plan(self._state, self._array(x), parameters, t0)
        diverged = not np.isfinite(result.figures.best)
        fallback = diverged and proposed is not None
        plan = self._packed(request, x, t0, replace(result, knots=proposed) if fallback else result, cpu, fallback)
        if diverged:  # the next plan starts from the command in force
            self._state = None
        return plan

    def _packed(self, request: PlanRequest, x: np.ndarray, t0: float, result: Result, cpu: float, fallback: bool) -> Plan:
        knots = host(result.knots).astype(float)
        commands = (self._spread @ knots).clip(*self._bounds)
        states = None
        if not fallback:  # what a model expects all of whose rollouts diverged is worth nothing
            states = self._rollout(request, x, knots[..., None])[:, :, 0] if result.states is None else result.states
        self._seq += 1
        figures = result.figures._asdict() | {"fallback": float(fallback)}
        plan = Plan(
            seq=self._seq,
            stamp=request.stamp,
            t0=t0,
            dt=self.config.dynamics.dt,
            u=commands,
            x=None if states is None else host(states).astype(float),
            info={**figures, "cpu": time.process_time() - cpu},
            fan=self.fan(request, x, result) if request.fan and not fallback else None,
        )
        self._plans = {seq: old for seq, old in self._plans.items() if seq > self._seq - 4} | {self._seq: plan}
        return plan

    def _rollout(self, request: PlanRequest, x: np.ndarray, knots: np.ndarray) -> np.ndarray:
        """Return the states (H+1, nx, N) that ``knots`` (K, nu, N) lead to from ``x``."""
        low, high = self._bounds
        commands = self.knots.commands(knots).clip(low[:, None], high[:, None])
        return self._rollout_model(x, commands, self.config.dynamics.dt, *self._carried(request))

    def _carried(self, request: PlanRequest) -> tuple[np.ndarray, ...]:
        """Return what the model carries, nothing where it cannot."""
        if not self.config.weighs:
            return ()
        return (np.zeros(10) if request.payload is None else request.payload,)

    def fan(self, request: PlanRequest, x: np.ndarray, result: Result) -> np.ndarray | None:
        """Return the tool paths (request.fan, H+1, 3) [m] of the heaviest candidates, or of what they expect together."""
        if self._paths is None or result.candidates is None:
            return None if result.path is None else host(result.path)[None].astype(float)
        best = np.argsort(-host(result.weights), kind="stable")[: request.fan]
        return self._paths(self._rollout(request, x, host(result.candidates[:, :, best]))).transpose(2, 1, 0).astype(float)

    def parameters(self, request: PlanRequest, u_before: np.ndarray) -> Parameters:
        """Return what the task's terms need to know of goal and obstacles along the horizon."""
        ahead = request.latency + (np.arange(self._steps) + 1) * self.config.dynamics.dt
        goal, target = self.config.goal, None
        if request.target is not None:
            position, rotation = request.target
            target = (np.tile(position, (self._steps, 1)), None if rotation is None else np.tile(rotation, (self._steps, 1, 1)))
        elif isinstance(goal, (ObjectPoseGoal, *MOVING)):
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
            payload=next(map(self._array, self._carried(request)), None),
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
        robot, nq, t = self.robot, self.robot.nq, request.stamp
        follower = PlanFollower(self.config.loop.blend)
        if request.following is not None and request.following.seq in self._plans:
            follower.resume(self._plans[request.following.seq], request.following)
        x = np.asarray(request.x, float)
        if follower.plan is None:
            held = np.zeros(robot.nu) if robot.control.mode == "torque" else x[:nq][robot.command_index]
            return x, held
        if request.latency > 0:
            count = int(np.ceil(request.latency / self._step))
            h = request.latency / count
            commands = np.stack([follower.command(t + (k + self.knots.at) * h) for k in range(count)])
            x = self._rollout_model(x, commands[..., None], h, *self._carried(request))[-1, :, 0].astype(float)
        return x, follower.command(t + request.latency)


def on_host(parameters: Parameters) -> Parameters:
    """Return the same in numpy's arrays."""
    given = {name: value if name == "obstacles" else host(value) for name, value in vars(parameters).items() if value is not None}
    return Parameters(**{**given, "obstacles": tuple(map(host, parameters.obstacles))})


def command_bounds(robot: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper bounds of the command, (nu,): joint range [rad] or effort limit [N·m]."""
    limits = robot.limits
    if robot.control.mode == "torque":
        return -np.asarray(limits.effort), np.asarray(limits.effort)
    return np.asarray(limits.position_lower)[robot.command_index], np.asarray(limits.position_upper)[robot.command_index]
