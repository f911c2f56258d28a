"""``mbctrl learn``: the loops of model-based reinforcement learning: act, learn from it, act better."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbctrl.base.config import RecordSpec, RunConfig, load_run, settled
from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.extras import need
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.cli.build import check_goal, load_run_model
from mbctrl.cli.episodes import rewards
from mbctrl.cli.run import with_overrides
from mbctrl.cli.session import Session
from mbctrl.learning.explore import Excitation, Exploration, RandomCommands
from mbctrl.learning.fence import Fence
from mbctrl.learning.fit import fit
from mbctrl.learning.loops import LearnSpec, load_loop
from mbctrl.learning.recipe import LearningRecipe, check_frames
from mbctrl.learning.runs import from_run, source_of
from mbctrl.learning.samples import samples_of, with_gaps
from mbctrl.learning.transitions import Transitions, concatenate, cut, split, write_transitions
from mbctrl.planning.backends import analytic_of, faster
from mbctrl.planning.controller import MpcController

console = Console()
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """An episode: its number, 0 for the random one; what it began with and what came of it.

    Args:
        number: counted from 1.
        known: transitions there were before it.
        reward: its return.
        rewards: of each step, (T,).
        cpu: processor time of a plan [s], median.
        training: time spent learning for it, and in it [s].
        failures: trainings that failed; the last good model stayed.
    """

    number: int
    known: int
    reward: float
    rewards: np.ndarray
    cpu: float
    training: float
    failures: int


class Loop:
    """Acts and learns by turns.

    Args:
        config, file: the resolved scenario and its file.
        spec, recipe: of ``load_loop``.
        folder: of everything it leaves: model.npz, transitions.parquet, a run folder a trial.
        tell: told what is being done.
    """

    def __init__(
        self,
        config: RunConfig,
        file: Path,
        spec: LearnSpec,
        recipe: LearningRecipe,
        folder: Path,
        tell: Tell = lambda text: None,
    ) -> None:
        self.spec, self.recipe, self.folder, self._file, self._tell = spec, recipe, folder, file, tell
        self.path = folder / "model.npz"
        planner = config.planner.model_copy(update={"risk": spec.risk})
        beneath = {} if recipe.base == "identity" else {"contact": recipe.contact}  # of what is known, no more than the recipe
        physics = config.dynamics.model_copy(update=beneath)
        learned = {"residual": str(self.path.resolve())}
        if physics.backend == "mujoco":  # which has no place for what is learned
            learned["backend"] = "auto"
        dynamics = physics.model_copy(update=learned)
        record = RecordSpec(plots=False, video=False)
        self.config = config.model_copy(update={"record": record, "stop_when_done": False})
        self._learned = config.model_copy(update={"planner": planner, "dynamics": dynamics})
        self.model = load_run_model(config, file)
        check_goal(config, self.model, file)
        check_frames(recipe, self.model.tree, file)
        self._source = source_of(self.model.robot, self.model.tree.revolute, recipe.dt)
        self._random = self._exploration()
        self.known: list[Transitions] = []
        self.controller: MpcController | None = None
        self._session: Session | None = None
        if recipe.base == "analytic":
            self.controller = MpcController(config.model_copy(update={"dynamics": physics}), self.model, file)
        self._trial, self._before, self._due = 0, 0, spec.random or spec.every or 0
        self._training, self._failures, self._reached = 0.0, 0, 0

    def _exploration(self) -> Exploration:
        """Return what commands at random, within the box where there is one."""
        spec, dt, arm, rng = self.spec, self.recipe.dt, self.model, np.random.default_rng((self.config.seed, 1))
        fence = None
        if spec.box is not None:
            physics = self.config.dynamics.model_copy(update={"device": "cpu"})
            analytic = analytic_of(self.config.model_copy(update={"dynamics": physics}), arm, self._file)
            fence = Fence(arm, analytic, spec.box, self._file, faster)
        if spec.band is not None:
            return Excitation(arm.robot, spec.share, spec.band, dt, rng, fence)
        return RandomCommands(arm.robot, spec.share, spec.hold * dt, dt, rng, fence)

    def run(self, done: Callable[[Trial], None] = lambda trial: None) -> list[Trial]:
        """Return all trials, the random one first where there is one; ``done`` is called after each."""
        trials = []
        online = self.spec.loop == "online"
        for number in range(1 if online or not self.spec.random else 0, self.spec.trials + 1):
            due = self._is_due()
            if not online and self.known and (number == 1 or due):
                self.learn()
            trials.append(self._episode(number))
            write_transitions(self.folder / "transitions.parquet", concatenate(self.known))
            done(trials[-1])
        return trials

    def _is_due(self) -> bool:
        """Return whether, by the steps there are, the next trial is one that loop aggregate learns anew for."""
        if self.spec.at is None:
            return self.spec.loop == "aggregate"
        reached = sum(self._before >= steps for steps in self.spec.at)
        due, self._reached = reached > self._reached, reached
        return due

    def _episode(self, number: int) -> Trial:
        """Run one episode and keep its transitions."""
        self._tell("random commands" if number == 0 else f"trial {number}")
        period = 1 / self.model.robot.control.rate
        length = self.config.duration if number else self.spec.random * self.recipe.dt + period
        config = settled(self.config.model_copy(update={"seed": self.config.seed + number, "duration": length}))
        known, self._goal = self._count(), config.goal
        self._trial = number
        if self.controller is not None:
            self.controller.pursue(config.goal)
            self.controller.reset()
        self._random.reset()
        self._session = Session(config, self._file, lockstep=True, model=self.model, plan=self._plan)
        folder = self.folder / f"trial-{number:02d}"
        summary = self._session.run(folder)
        if summary.interrupted:
            raise KeyboardInterrupt
        self.known.append(from_run(folder / "log.csv", self._source))
        self._before += round((length - period) / self.recipe.dt)
        earned = self._rewards(folder)
        training, self._training = self._training, 0.0
        failures, self._failures = self._failures, 0
        self._goal = settled(config).goal
        total = float(earned.sum()) if summary.reward is None else summary.reward
        return Trial(number, known, total, earned, summary.cpu, training, failures)

    def _rewards(self, folder: Path) -> np.ndarray:
        from mbctrl.base.logs import read_log

        return rewards(self.config, self.model, read_log(folder / "log.csv"), self.spec.best)

    def _count(self) -> int:
        return sum(map(len, self.known))

    def _plan(self, request: PlanRequest) -> Plan:
        """Return the plan of whatever is in charge: random commands, or the newest model's planner."""
        online, steps = self.spec.loop == "online", self._before + round(request.stamp / self.recipe.dt)
        if online and steps >= self._due:
            self._due += self.spec.every or 0
            self._session.flush()
            self.learn(from_run(self.folder / f"trial-{self._trial:02d}" / "log.csv", self._source))
        at_random = self.controller is None or not self._trial or (online and steps < self.spec.random)
        return (self._random if at_random else self.controller).plan(request)

    def learn(self, more: Transitions | None = None) -> None:
        """Learn from all transitions and those of the episode that goes on; its planner takes over where the last one is.

        A training that fails leaves the last good model in charge.

        Errors:
            MbctrlError and what else a training raises, where there is no earlier model.
        """
        start = time.monotonic()
        every = concatenate([*self.known, *([] if more is None or not len(more) else [more])])
        try:
            self._fit(every)
        except (MbctrlError, ArithmeticError, RuntimeError, MemoryError) as error:
            if self.controller is None:
                raise
            self._failures += 1
            self._tell(f"training failed, the last good model stays: {error}")
        else:
            new = MpcController(self._learned, self.model, self._file)
            if self.controller is not None:
                new.resume(self.controller)
            new.pursue(self._goal)
            self.controller = new
        self._training += time.monotonic() - start

    def _fit(self, every: Transitions) -> None:
        """Learn and write the model, whole or not at all."""
        recipe, arm = self.recipe, self.model
        every = with_gaps(every, arm, recipe)
        pieces = every if recipe.episode is None else cut(every, recipe.episode)
        training, held, _ = split(pieces, (recipe.training.validation, 0.0), recipe.training.seed)
        sets = [samples_of(part, arm, recipe) for part in (training, held)]
        name = f"learning from {len(every)} transitions"
        fitted = fit(*sets, arm, recipe, lambda epoch: self._tell(f"{name}, epoch {epoch.number}"))
        fitted.residual.save(self.path)


def learn(scenario: str, overrides: list[str], out: Path | None) -> int:
    """Run the loop of ``scenario``; return the exit code."""
    config, file = load_run(scenario)
    config = with_overrides(config, overrides, scenario, file)
    spec, recipe = load_loop(file, config)
    folder = out or Path("runs") / f"learn-{file.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        raise SpecError("exists already", file=folder)
    for module in ("torch", "mujoco", "pinocchio", "scipy", "pyarrow"):
        need(module, "learn", "learning")
    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building", total=spec.trials + (spec.loop != "online" and spec.random > 0))
        loop = Loop(config, file, spec, recipe, folder, lambda text: progress.update(task, description=text))

        def done(trial: Trial) -> None:
            progress.advance(task)
            progress.console.print(_line(trial), highlight=False)

        trials = loop.run(done)
    _screen(trials, file.stem, config.seed)
    _plot(trials, folder / "learning.png", file.stem)
    console.print(f"wrote {folder}: model.npz, transitions.parquet, learning.png", highlight=False, soft_wrap=True)
    return 0


def _line(trial: Trial) -> str:
    failed = f", {trial.failures} trainings failed: the last good model stayed" if trial.failures else ""
    return f"{'random commands' if trial.number == 0 else f'trial {trial.number}'}: return {trial.reward:.1f}{failed}"


def _screen(trials: list[Trial], name: str, seed: int) -> None:
    table = Table(title=f"{name}, seed {seed}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("trial", "transitions before", "return", "CPU a plan \\[ms]", "learning \\[s]"):
        table.add_column(column, justify="right")
    for trial in trials:
        cpu = f"{1e3 * trial.cpu:.1f}" if trial.number else ""
        number = str(trial.number) if trial.number else "random"
        table.add_row(number, str(trial.known), f"{trial.reward:.1f}", cpu, f"{trial.training:.1f}")
    console.print(table)


def _plot(trials: list[Trial], path: Path, name: str) -> None:
    from mbctrl.report.returns import plot_returns

    planned = [trial for trial in trials if trial.number]
    chance = next((trial.reward for trial in trials if not trial.number), None)
    try:
        plot_returns([(trial.number, trial.reward, np.cumsum(trial.rewards)) for trial in planned], chance, path, name)
    except MbctrlError as error:
        console.print(f"[yellow]no {path.name}:[/] {error}", highlight=False)
