"""``mbctrl run``: overrides, the live line, the result screen and the run folder."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mbctrl.base.config import RobotSpec, RunConfig, load_run, merged
from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.extras import need
from mbctrl.base.logs import read_log
from mbctrl.base.spec import validate

console = Console()


def run(scenario: str, overrides: list[str], lockstep: bool, viewer_port: int | None, out: Path | None) -> int:
    """Run ``scenario`` and leave a run folder; return the exit code."""
    config, file = load_run(scenario)
    config = with_overrides(config, overrides, scenario, file)
    folder = out or Path("runs") / f"{file.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        raise SpecError("exists already", file=folder)
    for module in ("torch", "mujoco", "pinocchio", "scipy"):
        need(module, "sim", "running a scenario")
    from mbctrl.cli.result import result_screen
    from mbctrl.cli.session import Session

    with console.status("building model and planner …"):
        viewer = None
        if viewer_port is not None:
            from mbctrl.cli.live import ViewerPort

            viewer = ViewerPort(config, file, viewer_port)
        line = _Line(config, viewer)
        session = Session(config, file, lockstep=lockstep, watch=line, fan=24 if viewer else 0)
    try:
        if viewer:
            console.print(f"viewer: {viewer.url}")
        with line.progress:
            summary = session.run(folder)
        result_screen(console, config, summary, file.stem, lockstep)
        _pictures(session, config, folder, file.stem, summary.interrupted)
    finally:
        if viewer:
            viewer.close()
    console.print(f"run folder: {folder}")
    return 130 if summary.interrupted else 0


def show_options(scenario: str) -> int:
    """Print every setting of ``scenario`` with its value."""
    config, file = load_run(scenario)
    try:
        with_overrides(config, ["--help"], scenario, file)
    except SystemExit:
        pass
    return 0


def with_overrides(config: RunConfig, arguments: list[str], scenario: str, file: Path) -> RunConfig:
    """Return ``config`` with command-line settings such as ``--planner.samples 2048`` applied.

    Errors:
        SpecError: naming the setting.
    """
    config, arguments = _other_robot(config, arguments)
    if not arguments:
        return config
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            about = f"Settings of {file}."
            changed = tyro.cli(FixedRun, default=config, args=arguments, prog=f"mbctrl run {scenario}", description=about)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise SpecError(f"{fault['msg']}, found {fault['input']!r}", file="command line", key=f"--{key}") from None
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise _one_line(said.getvalue()) from None
    return validate(RunConfig, merged(config.model_dump(), changed.model_dump()), "command line")


def _other_robot(config: RunConfig, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """Take ``--robot NAME`` out of the arguments: as in a scenario, a plain name stands for a robot as its model says."""
    rest = list(arguments)
    for i in [i for i, word in enumerate(arguments) if word.partition("=")[0] == "--robot"][:1]:
        name = arguments[i].partition("=")[2] or "".join(arguments[i + 1 : i + 2])
        if not name or name.startswith("--"):
            raise SpecError("expected a robot's name", file="command line", key="--robot")
        config = config.model_copy(update={"robot": RobotSpec(name=name)})
        del rest[i : i + (1 if "=" in arguments[i] else 2)]
    return config, rest


def _one_line(box: str) -> SpecError:
    """Return what tyro says in a box, over several lines, as an error of one line."""
    text = " ".join(re.sub(r"[─-╿]+|-{5,}", " ", box).split())
    fault = re.search(
        r"Error parsing (\S+): \d+ validation errors? for \w+(?: (?!Value error)(\S+))?(?: .*?`)?"
        r" (?:Value error, )?(.*?) \[type=\w+, input_value=(.*?), input_type",
        text,
    )
    if fault:
        group, field, message, found = fault.groups()
        key = field if group == "RunConfig" else group if field is None else f"{group}.{field}"
        told = message if ", found" in message else f"{message}, found {found}"  # of a rule over several fields it says itself
        return SpecError(told, file="command line", key="--" + re.split(r"\.`|\.\w+-", key)[0])
    text = re.split(r"Argument helptext|For full helptext|Full helptext|Available subcommands", text)[0]
    text = re.sub(r" in mbctrl --help|Invalid choice (?=invalid)", "", text)
    return SpecError(
        re.sub(r"^(Value error|Invalid choice|Parsing error|Unrecognized options?)\s*", "", text).strip(), file="command line"
    )


# The goal's kind is the scenario's: no subcommands to choose another.
FixedRun = tyro.conf.AvoidSubcommands[RunConfig]


class _Line:
    """The live line: time, error, plan rate and latency; passes what it sees to the viewer."""

    def __init__(self, config: RunConfig, viewer: Any) -> None:
        self.progress = Progress(
            TextColumn("{task.fields[clock]}"),
            BarColumn(24),
            TextColumn("{task.fields[text]}"),
            console=console,
            auto_refresh=False,
        )
        self._task = self.progress.add_task("", total=config.duration, clock="starting the planner …", text="")
        self._duration, self._viewer = config.duration, viewer
        self._seen, self._since, self._rate, self._drawn = 0, 0.0, 0.0, 0.0

    def __call__(self, live: Any) -> Any:
        target = self._viewer.exchange(live) if self._viewer else None
        if time.monotonic() - self._drawn < 0.25:
            return target
        self._drawn = time.monotonic()
        seq = live.plan.seq if live.plan else 0
        if live.t > self._since + 0.2:
            self._rate, self._seen, self._since = (seq - self._seen) / (live.t - self._since), seq, live.t
        text = f"{_goal_text(live)}  plans {self._rate:.0f}/s  latency {live.latency * 1e3:.0f} ms"
        self.progress.update(self._task, completed=live.t, clock=f"{live.t:5.1f} s", text=text)
        self.progress.refresh()
        return target


def _goal_text(live: Any) -> str:
    progress = live.progress
    count = f"target {min(len(progress.reached) + 1, progress.count)}/{progress.count}  " if progress.count > 1 else ""
    if live.reward is not None and not np.isfinite(progress.position_error):
        return f"return {live.reward:.0f}"
    if np.isfinite(progress.rotation_error):
        return f"{count}error {progress.position_error * 1e3:6.1f} mm {np.degrees(progress.rotation_error):5.1f} deg"
    return f"{count}error {progress.position_error:.3f} rad"


def _pictures(session: Any, config: RunConfig, folder: Path, name: str, interrupted: bool) -> None:
    """Make plots and video; what cannot be made is said, and the run stays good."""
    log, plans = read_log(folder / "log.csv"), read_log(folder / "plans.csv")
    if len(log.data) < 2:
        return
    if config.record.plots:
        _degrade("plots.png", lambda: _plot(session, log, plans, folder, name))
    if config.record.video and not interrupted:
        _degrade("video.mp4", lambda: _video(session, config, log, folder))


def _plot(session: Any, log: Any, plans: Any, folder: Path, name: str) -> None:
    from mbctrl.report.plots import plot_run

    with console.status("plotting …"):
        plot_run(log, plans, session.robot, folder / "plots.png", name)


def _video(session: Any, config: RunConfig, log: Any, folder: Path) -> None:
    from mbctrl.report.video import render_video

    with Progress(
        TextColumn("rendering"), BarColumn(24), TextColumn("{task.percentage:>3.0f} %"), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        render_video(
            session.model.mj,
            log,
            folder / "video.mp4",
            joints=list(session.robot.joints),
            obstacles=config.obstacles,
            goal=config.goal,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _degrade(what: str, make: Callable[[], None]) -> None:
    try:
        make()
    except MbctrlError as error:
        console.print(f"[yellow]no {what}:[/] {error}", highlight=False)
    except KeyboardInterrupt:
        console.print(f"[yellow]no {what}:[/] interrupted")
