"""``mbctrl distil``: a planner's plans to a policy, and what the policy is worth, alone and to the planner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbctrl.base.config import RecordSpec, RunConfig, load_run, settled
from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need
from mbctrl.base.logs import read_log
from mbctrl.base.scene import MOVING, JointGoal
from mbctrl.base.spec import load_yaml, validate
from mbctrl.cli.build import check_goal, load_run_model
from mbctrl.cli.episodes import rewards
from mbctrl.cli.run import with_overrides
from mbctrl.cli.session import Session
from mbctrl.learning.imitate import LEAST, imitate
from mbctrl.learning.loops import LearnSpec
from mbctrl.planning.arrays import host
from mbctrl.planning.controller import MpcController
from mbctrl.planning.mpc import on_host
from mbctrl.planning.planner import Parameters, Planner, PlannerState, Result
from mbctrl.planning.policy import Place, Policy
from mbctrl.planning.rules.base import Figures
from mbctrl.report.summary import Summary

console = Console()
Tell = Callable[[str], None]
_TURN = 10  # plans that planner or policy have their turn for
_JUDGED = 1000  # seeds from here on are of episodes that nothing was learnt from


class Teacher(Planner):
    """A planner whose plans are noted; ``policy``, once there is one, has its turns in which it is followed in their place.

    Turns last ten plans; a ``share`` of them, drawn at random, is the policy's (DAgger's mixture). Where a bad policy acts all
    the time, what is learnt is of places where nobody wants to be: on eight trials of a pendulum policies reached returns of
    -183 to -482 without turns, of -182 to -215 with them (two seeds, four episodes each).

    Args:
        planner: the one that knows.
        place: where a policy is to be used.
        seed: of the turns.
    """

    def __init__(self, planner: Planner, place: Place, seed: int = 0) -> None:
        self._planner, self._place, self.knots = planner, place, planner.knots
        self.policy: Policy | None = None
        self.share = 1.0
        self._rng, self._left, self._policys = np.random.default_rng(seed), 0, False
        self.inputs: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def initial(self, command: Any, t: float = 0.0, seed: int = 0) -> PlannerState:
        """Return the planner's state before the first plan."""
        return self._planner.initial(command, t, seed)

    def plan(self, state: PlannerState, x: Any, parameters: Any, t: float) -> tuple[PlannerState, Result]:
        """Plan, note it, and return the policy's plan, where there is one."""
        state, result = self._planner.plan(state, x, parameters, t)
        x, asked = host(x).astype(float), on_host(parameters)
        if np.isfinite(result.figures.best):
            knots = host(result.knots).astype(float)
            own = knots if self._place.follows is None else knots - x[list(self._place.follows)]
            self.inputs.append(self._place.sees(x, asked))
            self.labels.append(own.ravel())
        if self.policy is not None and self._turn():
            result = replace(result, knots=self.policy(x, asked), states=None)
        return state, result

    def _turn(self) -> bool:
        """Return whether it is the policy's turn."""
        if self._left == 0:
            self._left, self._policys = _TURN, self._rng.random() < self.share
        self._left -= 1
        return self._policys


class Habit(Planner):
    """A policy as a planner: no search.

    Args:
        planner: the one whose place it takes.
        policy: is followed.
    """

    def __init__(self, planner: Planner, policy: Policy) -> None:
        self._planner, self._policy, self.knots = planner, policy, planner.knots

    def initial(self, command: Any, t: float = 0.0, seed: int = 0) -> PlannerState:
        """Return a state; nothing is remembered."""
        return self._planner.initial(command, t, seed)

    def plan(self, state: PlannerState, x: Any, parameters: Parameters, t: float) -> tuple[PlannerState, Result]:
        """Return the policy's plan."""
        knots = self._policy(host(x).astype(float), on_host(parameters))
        return state, Result(knots, Figures(0.0, 0.0, 1.0, 0), None, np.zeros(0))


@dataclass(frozen=True)
class Judged:
    """What a contender did in one episode: its return, and the run's summary."""

    reward: float
    summary: Summary


class Distiller:
    """Runs a scenario with its planner, with the policy that learns from it, and with both.

    Args:
        config, file: the resolved scenario and its file.
        folder: for the runs' logs.
        tell: told what is being done.
    """

    def __init__(self, config: RunConfig, file: Path, folder: Path, tell: Tell = lambda text: None) -> None:
        record = RecordSpec(plots=False, video=False)
        self.config = config.model_copy(update={"record": record, "stop_when_done": False})
        self.model = load_run_model(config, file)
        check_goal(config, self.model, file)
        self._file, self._folder, self._tell, self._runs = file, folder, tell, 0
        learn = load_yaml(file).get("learn")
        self._best = 0.0 if learn is None else validate(LearnSpec, learn, file, "learn").best  # returns are those of mbctrl learn
        self._controller = MpcController(self.config, self.model, file)
        self.teacher = self._controller.planner = Teacher(self._controller.planner, self._controller.place, self.config.seed)

    def distil(self, trials: int) -> tuple[Policy, list[tuple[float, float]]]:
        """Return the policy learnt from ``trials`` episodes, the first the planner's own, and of each its return and what the
        policy learnt after it misses of held-out plans."""
        history: list[tuple[float, float]] = []
        for trial in range(trials):
            self._tell(f"trial {trial + 1}")
            self.teacher.share = trial / max(1, trials - 1)  # nothing is learnt yet in the first
            reward = self._episode(self._controller, self.config.seed + trial).reward
            if len(self.teacher.inputs) < LEAST and trial < trials - 1:  # the planner goes on alone
                continue
            rows = np.array(self.teacher.inputs), np.array(self.teacher.labels)
            said = f"learning from {len(rows[0])} plans"
            trained = imitate(*rows, self.config.seed, tell=lambda epoch: self._tell(f"{said}, epoch {epoch}"))
            self.teacher.policy = self._controller.place.policy(**trained.network)
            history.append((reward, trained.missed))
        return self.teacher.policy, history

    def judge(self, policy: Policy, fewer: int, episodes: int, done: Tell = lambda name: None) -> dict[str, list[Judged]]:
        """Return what planner and policy do, alone and together, by name: in the same episodes each, none of them learnt from."""
        samples = self.config.planner.samples
        few = max(1, samples // fewer)
        alone = MpcController(self.config, self.model, self._file)
        alone.planner = Habit(alone.planner, policy)
        contenders = {
            f"planner {samples}": self._planner(samples, None),
            f"planner {few}": self._planner(few, None),
            f"planner {few}, policy": self._planner(few, policy),
            "policy": alone,
        }
        found: dict[str, list[Judged]] = {}
        for name, controller in contenders.items():
            for k in range(episodes):
                self._tell(f"judging: {name}")
                found.setdefault(name, []).append(self._episode(controller, self.config.seed + _JUDGED + k))
                done(name)
        return found

    def _planner(self, samples: int, policy: Policy | None) -> MpcController:
        planner = self.config.planner.model_copy(update={"samples": samples})
        controller = MpcController(self.config.model_copy(update={"planner": planner}), self.model, self._file)
        controller.policy = policy
        return controller

    def _episode(self, controller: MpcController, seed: int) -> Judged:
        controller.reset()
        self._runs += 1
        config = settled(self.config.model_copy(update={"seed": seed}))
        controller.config = controller.config.model_copy(update={"seed": seed})
        controller.pursue(config.goal)
        folder = self._folder / f"{self._runs:03d}"
        summary = Session(config, self._file, lockstep=True, model=self.model, plan=controller.plan).run(folder)
        if summary.interrupted:
            raise KeyboardInterrupt
        reward = summary.reward
        if reward is None:
            reward = float(rewards(config, self.model, read_log(folder / "log.csv"), self._best).sum())
        return Judged(reward, summary)


def distil(scenario: str, overrides: list[str], trials: int, fewer: int, episodes: int, out: Path) -> int:
    """Distil the planner of ``scenario`` into ``out``; return the exit code."""
    if out.suffix != ".npz":
        raise SpecError(f"expected a name that ends in .npz, found '{out}'", file="command line", key="--out")
    for key, value in (("--trials", trials), ("--fewer", fewer), ("--episodes", episodes)):
        if value < 1:
            raise SpecError(f"expected at least 1, found {value}", file="command line", key=key)
    config, file = load_run(scenario)
    config = with_overrides(config, overrides, scenario, file)
    if config.planner.policy is not None:
        raise SpecError("a planner is distilled without another policy; expected none", file=file, key="planner.policy")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"'{out.parent}' cannot be made: {error.strerror}", file="command line", key="--out") from None
    for module in ("torch", "mujoco", "pinocchio", "scipy"):
        need(module, "learn", "distilling")
    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with TemporaryDirectory() as folder, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building", total=trials + 4 * episodes)
        distiller = Distiller(config, file, Path(folder), lambda text: progress.update(task, description=text))
        policy, history = distiller.distil(trials)
        progress.advance(task, trials)
        policy.save(out)
        found = distiller.judge(policy, fewer, episodes, lambda name: progress.advance(task))
    console.print(
        f"{len(distiller.teacher.inputs)} plans of {trials} episodes; {history[-1][1]:.0%} of held-out plans' variance is missed",
        highlight=False,
        soft_wrap=True,
    )
    _screen(found, config, file.stem)
    console.print(
        f"wrote {out}; a planner begins with it: mbctrl run {scenario} --planner.policy {out}", highlight=False, soft_wrap=True
    )
    return 0


def _screen(found: dict[str, list[Judged]], config: RunConfig, name: str) -> None:
    episodes = len(next(iter(found.values())))
    title = f"{name}: {episodes} other episodes, medians (worst)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    moving, unit, scale = isinstance(config.goal, MOVING), "mm", 1e3
    if isinstance(config.goal, JointGoal):
        unit, scale = "rad", 1.0
    for heading in ("", "return", "reached", "after \\[s]", f"error \\[{unit}]", "CPU \\[ms]"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for who, judged in found.items():
        summaries = [one.summary for one in judged]
        targets = summaries[0].targets
        last = [one.reached[-1] if targets and len(one.reached) == targets else np.inf for one in summaries]
        errors = scale * np.array([one.tracking_rms if moving else one.position_error for one in summaries])
        table.add_row(
            who,
            _told([-one.reward for one in judged], ".1f", -1) if targets <= 1 else "",  # who is quick meets the next target's costs
            f"{sum(len(one.reached) for one in summaries)} of {episodes * targets}" if targets else "",
            _told(last, ".2f") if targets else "",
            _told(errors, ".2g") if np.isfinite(errors).all() else "",
            f"{1e3 * np.median([one.cpu for one in summaries]):.2f}",
        )
    console.print(table)


def _told(values: Any, form: str, sign: int = 1) -> str:
    worst = f" ({sign * np.max(values):{form}})" if len(values) > 1 else ""
    return f"{sign * np.median(values):{form}}{worst}"
