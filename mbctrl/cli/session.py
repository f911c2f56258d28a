"""One run: robot, planner, control loop, logs and the judgement, in lockstep or in real time."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl import __version__
from mbctrl.base.config import RunConfig, settled
from mbctrl.base.logs import LogWriter, read_log
from mbctrl.base.parameters import write_parameters
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.poses import quaternion_from_rotation
from mbctrl.base.robot import Robot
from mbctrl.base.scene import JointGoal, ObjectPoseGoal
from mbctrl.base.spec import dump_yaml
from mbctrl.calibrate.adapt import Adapter
from mbctrl.cli.build import build_controller, check_goal, load_run_model, load_truth
from mbctrl.cli.process import ProcessPort
from mbctrl.dynamics.load import Model
from mbctrl.report.summary import Summary, summarise
from mbctrl.runtime.clock import LockstepClock, RealClock
from mbctrl.runtime.driver import RobotState
from mbctrl.runtime.loop import ControlLoop, InlinePort, Tick
from mbctrl.runtime.process import steady
from mbctrl.runtime.progress import Progress
from mbctrl.sim.driver import SimDriver
from mbctrl.sim.monitor import Monitor
from mbctrl.sim.suite import SuiteDriver

_FLUSH = 500  # ticks between writes of the log


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
        model: what the run believes, already loaded, to save the time.
        plan: answers requests in lockstep in place of the scenario's planner.
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
        plan: Callable[[PlanRequest], Plan] | None = None,
    ) -> None:
        config = settled(config)
        self.config, self.file, self.lockstep, self._watch, self._fan = config, file, lockstep, watch, fan
        self.model = model or load_run_model(config, file)
        check_goal(config, self.model, file)
        self.truth = load_truth(config, file, self.model)
        self.robot: Robot = self.model.robot
        self.monitor = Monitor(self.model.mj, self.robot, config.obstacles)
        self.progress = Progress(config.goal)
        self.clock = LockstepClock() if lockstep else RealClock()
        self.driver = self._driver()
        if lockstep:
            self.port: Any = InlinePort(plan or build_controller(config, file, self.model).plan, config.loop.latency)
        else:
            build_controller(config, file, self.model)  # a bad setting is refused here, before a process starts
            self.port = ProcessPort(config, file)
        tree, link = self.model.tree, self.model.tree.frames[self.robot.tool].link
        self.adapter = Adapter(tree, link, config.adapt) if config.weighs else None
        self._commands: list[np.ndarray] = []  # since the last request
        self._touches = isinstance(self.driver, SimDriver) and self.model.mj.npair > 0
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
                with steady() if not self.lockstep else nullcontext():
                    self.loop.run(self.config.duration)
            except KeyboardInterrupt:
                self.interrupted = True
        finally:
            self.port.close()
            for log in (self._log, self._plans):
                if log is not None:
                    log.close()
        return self.summary(folder)

    def flush(self) -> None:
        """Write what the logs hold so far."""
        self._log.flush()
        self._plans.flush()

    def summary(self, folder: Path) -> Summary:
        """Judge the run from its logs."""
        logs = (read_log(folder / "log.csv"), read_log(folder / "plans.csv"))
        reward = self.driver.total_reward if isinstance(self.driver, SuiteDriver) else None
        return summarise(
            self.config, self.robot, *logs, self.loop.counts, self.loop.gate.counts, self.progress, reward, self.interrupted
        )

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
        believed = None if self.truth is self.model else self.model.mj
        return SimDriver(self.truth.mj, self.robot, self.clock, start, believed, config.backend.payload)

    def _request(self, t: float, state: RobotState) -> PlanRequest:
        obstacles = tuple(obstacle.at(t) for obstacle in self.config.obstacles)
        x = np.concatenate([state.q, state.v])
        payload = None if self.adapter is None else self.adapter.payload
        more = {"target": self._override, "obstacles": obstacles, "fan": self._fan, "payload": payload, "command": self._led()}
        return PlanRequest(t, x, goal=self.progress.index, goal_time=t, **more)

    def _led(self) -> np.ndarray | None:
        """Return the command since the last request, None where the safety gate changed it, or no plan was followed."""
        commands, self._commands = self._commands, []
        if not commands or not np.isfinite(commands).all():
            return None
        return np.mean(commands, 0) if self.robot.control.mode == "torque" else commands[-1]

    def _observe(self, tick: Tick) -> bool:
        state = tick.state
        self.monitor.update(state.q, tick.t)
        tool = self.monitor.tool()
        goal = self.config.goal
        pose = self.monitor.pose(goal.frame) if isinstance(goal, ObjectPoseGoal) else tool
        self.progress.update(tick.t, state.q, pose, self._override)
        target = self._override or self.progress.target(tick.t)
        if tick.arrived is not None:
            self._latency = tick.latency
            info = tick.arrived.info
            late = float(tick.latency > 1 / self.config.loop.rate + self.loop.period + 1e-9)
            numbers = (info["cpu"], info["best"], info["ess"], info["nonfinite"])
            more = [info["model"]] if "model" in info else []
            self._plans.add((tick.arrived.stamp, tick.arrived.t0, tick.latency, *numbers, late, *more))
        if self.adapter is not None:
            effort = np.zeros(self.robot.nq)
            effort[self.robot.command_index] = state.tau
            self.adapter.update(tick.t, state.q, state.v, effort)
        self._commands.append(np.full_like(tick.command, np.nan) if tick.clamped or tick.holding else tick.command)
        self._log.add(self._row(tick, tool, target))
        if self.loop.counts.ticks % _FLUSH == 0:
            self.flush()
        if self._watch and tick.t >= self._next_watch:
            self._next_watch = tick.t + 0.05
            live = Live(tick.t, state.q, self.progress, tick.plan, self._latency, target, getattr(self.driver, "total_reward", 0.0))
            self._override = self._watch(live) or self._override
        return not (self.progress.done and self.config.stop_when_done)

    def _row(
        self, tick: Tick, tool: tuple[np.ndarray, np.ndarray], target: tuple[np.ndarray, np.ndarray | None] | None
    ) -> list[float]:
        nan3, nan4 = (math.nan,) * 3, (math.nan,) * 4
        rotation = None if target is None else target[1]
        state, progress = tick.state, self.progress
        row = [tick.t, *state.q, *state.v, *state.tau, *tick.command, *tool[0], *quaternion_from_rotation(tool[1])]
        row += nan3 if target is None else tuple(target[0])
        row += nan4 if rotation is None else tuple(quaternion_from_rotation(rotation))
        row += [
            progress.position_error,
            progress.rotation_error,
            self.monitor.clearance(),
            getattr(self.driver, "reward", math.nan),
        ]
        if self._touches:
            row.append(self.driver.pressed())
        if self.config.backend.payload is not None:
            row.append(self.driver.payload)
        if self.adapter is not None:
            estimate = self.adapter.estimate
            row += [estimate.mass, estimate.mass_error, self.adapter.payload[0]]
        return [*row, float(tick.clamped), float(tick.holding)]

    def _open_logs(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        header = provenance(self.config, self.robot, self.lockstep)
        text = dump_yaml({**header, "config": self.config.model_dump(mode="json")})
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        for name, model in (("parameters", self.model), ("truth", self.truth)):
            if model.parameters is not None and (name == "parameters" or model is not self.model):
                write_parameters(folder / f"{name}.yaml", model.parameters)
        self._log = LogWriter(folder / "log.csv", _columns(self.model, self.config, self._touches), header)
        adapts = self.config.adapt is not None and self.config.adapt.kind == "model"
        columns = [*_PLAN_COLUMNS, ("model", "1")] if adapts else _PLAN_COLUMNS
        self._plans = LogWriter(folder / "plans.csv", columns, header)


_PLAN_COLUMNS = [
    ("stamp", "s"),
    ("t0", "s"),
    ("latency", "s"),
    ("cpu", "s"),
    ("cost", "1"),
    ("ess", "1"),
    ("nonfinite", "1"),
    ("late", "1"),
]


_ADAPT_COLUMNS = [("payload.estimate", "kg"), ("payload.error", "kg"), ("payload.planned", "kg")]


def _columns(model: Model, config: RunConfig, touches: bool) -> list[tuple[str, str]]:
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
        ("error.position", "rad" if isinstance(config.goal, JointGoal) else "m"),
        ("error.rotation", "rad"),
        ("clearance", "m"),
        ("reward", "1"),
        *([("contact.force", "N")] if touches else []),
        *([("payload.carried", "kg")] if config.backend.payload is not None else []),
        *(_ADAPT_COLUMNS if config.weighs else []),
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
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "robot": robot.name,
        "joints": list(robot.joints),
        "mode": "lockstep" if lockstep else "real time",
        "seed": config.seed,
        "control_rate_hz": robot.control.rate,
        "python": platform.python_version(),
        "packages": packages,
    }
