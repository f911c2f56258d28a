"""One run: robot, planner, control loop, logs and the judgement, in lockstep or in real time."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mbctrl import __version__
from mbctrl.base.config import RunConfig
from mbctrl.base.errors import GoalError, SpecError
from mbctrl.base.logs import Log, LogWriter, read_log
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.poses import quaternion_from_rotation
from mbctrl.base.robot import Robot
from mbctrl.base.scene import FigureEightGoal, JointGoal, PoseGoal
from mbctrl.cli.process import ProcessPort
from mbctrl.dynamics.load import Model, load_model
from mbctrl.planning.controller import MpcController
from mbctrl.report.summary import Summary, summarise
from mbctrl.runtime.clock import LockstepClock, RealClock
from mbctrl.runtime.driver import RobotState
from mbctrl.runtime.loop import ControlLoop, InlinePort, Tick
from mbctrl.runtime.progress import Progress
from mbctrl.sim.driver import SimDriver
from mbctrl.sim.monitor import Monitor
from mbctrl.sim.suite import SuiteDriver

_FLUSH = 500  # ticks between writes of the log


def load_run_model(config: RunConfig, file: Path) -> Model:
    """Load the run's robot; SpecError names the scenario's key."""
    return load_model(config.robot, file=file, key="robot")


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
    if goal.kind == "backend" and config.backend.kind != "dm_control":
        raise SpecError("the mujoco backend brings no goal of its own", file=file, key="goal.kind")
    for key in ("feedback_stiffness", "feedback_damping"):
        gains = getattr(config.loop, key)
        if gains is not None and len(gains) != robot.nu:
            raise SpecError(f"expected {robot.nu} values, found {len(gains)}", file=file, key=f"loop.{key}")
    if isinstance(goal, JointGoal) and len(goal.position) != robot.nq:
        raise SpecError(f"expected {robot.nq} values, one for each joint, found {len(goal.position)}", file=file, key="goal.position")
    if isinstance(goal, PoseGoal):
        points = [(f"goal.targets[{i}].position", np.asarray(target.position)) for i, target in enumerate(goal.targets)]
    elif isinstance(goal, FigureEightGoal):
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
        slide = 0.0 if tree.revolute[link] else max(abs(model.robot.limits.position_lower[link]), abs(model.robot.limits.position_upper[link]))
        reach += float(np.linalg.norm(tree.fixed_position[link])) + slide
        link = tree.parent[link]
    return tree.fixed_position[0], reach


@dataclass
class Live:
    """What a progress line or viewer gets to see, some times a second."""

    t: float
    q: np.ndarray
    progress: Progress
    plan: Plan | None
    latency: float
    target: tuple[np.ndarray, np.ndarray | None] | None
    reward: float


class Session:
    """Everything one run needs, built and checked before anything is written.

    Args:
        config, file: the resolved run and its scenario's file.
        lockstep: deterministic, as fast as the machine computes; else real time, the planner in its own process.
        watch: called with a ``Live`` about 20 times a second of run time; may return a dragged target.
        fan: sampled tool paths each plan carries, for a viewer.
        model: already loaded, to save the time.
    """

    def __init__(
        self,
        config: RunConfig,
        file: Path,
        *,
        lockstep: bool,
        watch: Callable[[Live], Any] | None = None,
        fan: int = 0,
        model: Model | None = None,
    ) -> None:
        self.config, self.file, self.lockstep, self._watch, self._fan = config, file, lockstep, watch, fan
        self.model = model or load_run_model(config, file)
        check_goal(config, self.model, file)
        self.robot: Robot = self.model.robot
        self.monitor = Monitor(self.model.mj, self.robot, config.obstacles)
        self.progress = Progress(config.goal)
        self.clock = LockstepClock() if lockstep else RealClock()
        self.driver = self._driver()
        if lockstep:
            self.port: Any = InlinePort(build_controller(config, file, self.model).plan, config.loop.latency)
        else:
            build_controller(config, file, self.model)  # a bad setting is refused here, before a process starts
            self.port = ProcessPort(config, file)
        self._override: tuple[np.ndarray, np.ndarray | None] | None = None
        self._latency = self._next_watch = 0.0
        self.interrupted = False
        self._log: LogWriter | None = None
        self._plans: LogWriter | None = None

    def run(self, folder: Path) -> Summary:
        """Run into ``folder`` (created): config.yaml, log.csv and plans.csv; the logs are kept whatever happens."""
        try:
            if isinstance(self.port, ProcessPort):
                self.port.wait_ready()
            self.driver.open()
            if isinstance(self.driver, SuiteDriver) and self.driver.target is not None:
                self._override = (self.driver.target, None)
            self._open_logs(folder)
            self.loop = ControlLoop(self.robot, self.driver, self.port, self.clock, self.config.loop, self._request, self._observe)
            try:
                self.loop.run(self.config.duration)
            except KeyboardInterrupt:
                self.interrupted = True
        finally:
            self.port.close()
            for log in (self._log, self._plans):
                if log is not None:
                    log.close()
        return self.summary(folder)

    def summary(self, folder: Path) -> Summary:
        """Judge the run from its logs."""
        logs = (read_log(folder / "log.csv"), read_log(folder / "plans.csv"))
        reward = self.driver.total_reward if isinstance(self.driver, SuiteDriver) else None
        return summarise(self.config, self.robot, *logs, self.loop.counts, self.loop.gate.counts, self.progress, reward, self.interrupted)

    def _driver(self) -> SimDriver | SuiteDriver:
        """Build the robot; a suite task brings its own control rate."""
        config = self.config
        if config.backend.kind == "dm_control":
            driver = SuiteDriver(str(config.backend.task), self.robot, self.clock, config.seed)
            control = self.robot.control.model_copy(update={"rate": 1 / driver.period})
            self.robot = self.robot.model_copy(update={"control": control})
            return driver
        noise = config.backend.start_noise
        offset = np.random.default_rng(config.seed).uniform(-noise, noise, self.robot.nq)
        limits = self.robot.limits
        start = (np.asarray(self.robot.home) + offset).clip(limits.position_lower, limits.position_upper)
        return SimDriver(self.model.mj, self.robot, self.clock, start)

    def _request(self, t: float, state: RobotState) -> PlanRequest:
        obstacles = tuple(obstacle.at(t) for obstacle in self.config.obstacles)
        x = np.concatenate([state.q, state.v])
        return PlanRequest(t, x, goal=self.progress.index, goal_time=t, target=self._override, obstacles=obstacles, fan=self._fan)

    def _observe(self, tick: Tick) -> bool:
        state = tick.state
        self.monitor.update(state.q, tick.t)
        tool = self.monitor.tool()
        self.progress.update(tick.t, state.q, tool, self._override)
        target = self._override or self.progress.target(tick.t)
        if tick.arrived is not None:
            self._latency = tick.latency
            info = tick.arrived.info
            late = float(tick.latency > 1 / self.config.loop.rate + self.loop.period)
            numbers = (info["cpu"], info["best"], info["ess"], info["nonfinite"])
            self._plans.add((tick.arrived.stamp, tick.arrived.t0, tick.latency, *numbers, late))
        self._log.add(self._row(tick, tool, target))
        if self.loop.counts.ticks % _FLUSH == 0:
            self._log.flush()
            self._plans.flush()
        if self._watch and tick.t >= self._next_watch:
            self._next_watch = tick.t + 0.05
            live = Live(tick.t, state.q, self.progress, tick.plan, self._latency, target, getattr(self.driver, "total_reward", 0.0))
            self._override = self._watch(live) or self._override
        return not (self.progress.done and self.config.stop_when_done)

    def _row(self, tick: Tick, tool: tuple[np.ndarray, np.ndarray], target: tuple[np.ndarray, np.ndarray | None] | None) -> list[float]:
        nan3, nan4 = (math.nan,) * 3, (math.nan,) * 4
        rotation = None if target is None else target[1]
        state, progress = tick.state, self.progress
        row = [tick.t, *state.q, *state.v, *state.tau, *tick.command, *tool[0], *quaternion_from_rotation(tool[1])]
        row += nan3 if target is None else tuple(target[0])
        row += nan4 if rotation is None else tuple(quaternion_from_rotation(rotation))
        row += [progress.position_error, progress.rotation_error, self.monitor.clearance(), getattr(self.driver, "reward", math.nan)]
        return [*row, float(tick.clamped), float(tick.holding)]

    def _open_logs(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        header = provenance(self.config, self.robot, self.lockstep)
        text = yaml.safe_dump({**header, "config": self.config.model_dump(mode="json")}, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        self._log = LogWriter(folder / "log.csv", _columns(self.model), header)
        self._plans = LogWriter(folder / "plans.csv", _PLAN_COLUMNS, header)


_PLAN_COLUMNS = [("stamp", "s"), ("t0", "s"), ("latency", "s"), ("cpu", "s"), ("cost", "1"), ("ess", "1"), ("nonfinite", "1"), ("late", "1")]


def _columns(model: Model) -> list[tuple[str, str]]:
    robot, revolute = model.robot, dict(zip(model.tree.joints, model.tree.revolute))
    position = {joint: "rad" if turning else "m" for joint, turning in revolute.items()}
    force = {joint: "N·m" if turning else "N" for joint, turning in revolute.items()}
    command = force if robot.control.mode == "torque" else position
    return [
        ("t", "s"),
        *((f"q.{joint}", position[joint]) for joint in robot.joints),
        *((f"v.{joint}", f"{position[joint]}/s") for joint in robot.joints),
        *((f"tau.{joint}", force[joint]) for joint in robot.driven),
        *((f"u.{joint}", command[joint]) for joint in robot.driven),
        *((f"tcp.{axis}", "m") for axis in "xyz"),
        *((f"tcp_quaternion.{part}", "1") for part in "wxyz"),
        *((f"target.{axis}", "m") for axis in "xyz"),
        *((f"target_quaternion.{part}", "1") for part in "wxyz"),
        ("error.position", "m"),
        ("error.rotation", "rad"),
        ("clearance", "m"),
        ("reward", "1"),
        ("gate.clamped", "1"),
        ("holding", "1"),
    ]


def provenance(config: RunConfig, robot: Robot, lockstep: bool) -> dict[str, Any]:
    """Return what a log says of itself: when, what, with which versions."""
    packages = {}
    for name in ("numpy", "torch", "mujoco", "pin", "dm-control"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "mbctrl": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "robot": robot.name,
        "joints": list(robot.joints),
        "mode": "lockstep" if lockstep else "real time",
        "seed": config.seed,
        "control_rate_hz": robot.control.rate,
        "python": platform.python_version(),
        "packages": packages,
    }
