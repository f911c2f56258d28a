"""``mbctrl calibrate``: logs in, a parameter file, a model file and a report out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbctrl import __version__
from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need

console = Console()
_FAR = 5.0  # extrapolation beyond which a held-out log says little


def calibrate(recipe: str, logs: Sequence[str], held_out: Sequence[str], out: Path, command: Sequence[str] | None = None) -> int:
    """Fit ``recipe`` to ``logs``, judge it on ``held_out`` and write the results into ``out``; return the exit code."""
    if not logs:
        raise SpecError("expected at least one log", file="command line", key="LOG")
    for module in ("torch", "mujoco", "pinocchio", "scipy", "cvxpy", "jinja2", "matplotlib", "pandas"):
        need(module, "calibrate", "calibrating")
    from mbctrl.calibrate.recipe import load_recipe

    start = time.perf_counter()
    spec, file = load_recipe(recipe)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading")
        outcome = _Work(spec, file, lambda text: progress.update(task, description=text)).run(logs, held_out)
        progress.update(task, description="writing")
        seconds = time.perf_counter() - start
        paths = _write(outcome, out, file, list(command or ["mbctrl", "calibrate", recipe, *logs]), seconds)
    _screen(outcome, seconds)
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"use it: mbctrl run SCENARIO --robot.parameters {paths[0]}", highlight=False, soft_wrap=True)
    return 0


class _Work:
    """One calibration, step by step."""

    def __init__(self, recipe: Any, file: Path, advance: Any) -> None:
        from mbctrl.dynamics.load import load_model

        self.recipe, self.file, self.advance = recipe, file, advance
        self.model = load_model(recipe.robot, file=file, key="robot")
        self.refined: Any = None
        self.encoders: Any = None
        self.warnings: list[str] = []

    def run(self, logs: Sequence[str], held_out: Sequence[str]) -> _Work:
        from mbctrl.calibrate.identify import Identification
        from mbctrl.calibrate.signals import CalibrationError

        trained, others = [self._read(log) for log in logs], [self._read(log) for log in held_out]
        self.trained, self.others = ([recording for recording, _ in pairs] for pairs in (trained, others))
        identification = Identification(self.model, self.recipe.fit, self.advance)
        motions, held = ([identification.motion(signals) for _, signals in pairs] for pairs in (trained, others))
        try:
            motions, held = self._fit(identification, motions, held)
            self.warnings += self.fit.warnings
            self._refine()
        except CalibrationError as error:
            raise CalibrationError(error.message, file=error.file or self.file, key=error.key) from None
        self._validate(motions, held)
        return self

    def _fit(self, identification: Any, motions: list[Any], held: list[Any]) -> tuple[list[Any], list[Any]]:
        """Fit, correct the recordings by what that tells of delay and encoders, fit anew; return the recordings."""
        commands = self._commands(identification) if self._instrumental else ()
        self.fit = identification.fit(motions, commands)
        late = self.fit.delay
        if self.recipe.fit.delay == "remove" or (self.recipe.simulate and "delay" in self.recipe.simulate.parameters):
            self.advance("fitting without the delay")
            motions, held = (identification.undelayed(group, self.fit) for group in (motions, held))
            self.fit = replace(identification.fit(motions, commands), delay=late)
        if self.recipe.fit.encoders == "free":
            self.advance("encoder offsets")
            self.encoders = identification.encoders(motions, self.fit)
            motions, held = (identification.rezeroed(group, self.encoders) for group in (motions, held))
            self.fit = replace(identification.fit(motions, commands), delay=late)
        return motions, held

    def _refine(self) -> None:
        if self.recipe.simulate is None:
            return
        from mbctrl.calibrate.refine import refine

        spec = self.recipe.simulate
        self.refined = refine(self.model, self.fit, spec, self.trained, self.recipe.filter, self.advance)
        self.fit = replace(self.fit, tree=self.refined.tree)

    def _validate(self, motions: list[Any], held: list[Any]) -> None:
        from mbctrl.calibrate.validate import validate_on

        self.advance("validating")
        self.validations = [("training log", validate_on(self.fit, motions[0], motions))]
        for recording, motion in zip(self.others, held):
            seen, name = validate_on(self.fit, motion, motions), Path(recording.file).name
            self.validations.append((f"held out: {name}", seen))
            if seen.extrapolation > _FAR:
                self.warnings.append(
                    f"{name} moves in directions the training logs hardly did (leverage {seen.extrapolation:.1f} times "
                    "theirs): its errors say little of the model"
                )

    @property
    def _instrumental(self) -> bool:
        return self.recipe.fit.estimator == "instrumental"

    def _read(self, log: str) -> tuple[Any, Any]:
        from mbctrl.calibrate.reading import read

        self.advance(f"reading {log}")
        found = read(log, self.recipe, self.file, self.model)
        self.warnings += found.notes
        return found.recording, found.signals

    def _commands(self, identification: Any) -> list[Any]:
        """Return the recordings along the commanded motion, whose columns are the instruments."""
        from mbctrl.calibrate.signals import prepare

        if any(recording.command is None for recording in self.trained):
            raise SpecError("needs log.command", file=self.file, key="fit.estimator: instrumental")
        along = [replace(recording, q=recording.command, v=None) for recording in self.trained]
        return [identification.motion(prepare(recording, self.recipe.filter)) for recording in along]


def _write(work: _Work, out: Path, file: Path, command: list[str], seconds: float) -> list[Path]:
    """Write parameter file, model and report; every one whole or not at all."""
    from mbctrl.base.parameters import write_parameters
    from mbctrl.calibrate.report import Report, write_report
    from mbctrl.calibrate.result import encoder_estimates, fitted_parameters
    from mbctrl.dynamics.write import export_mjcf, export_urdf

    out.mkdir(parents=True, exist_ok=True)
    name = work.model.robot.name
    provenance = _provenance(work, file, command)
    parameters = fitted_parameters(work.model, work.fit, provenance)
    if work.encoders is not None:
        parameters = parameters.model_copy(update={"estimates": (*parameters.estimates, *encoder_estimates(work.encoders))})
    if work.refined is not None:
        parameters = parameters.model_copy(update={"estimates": (*parameters.estimates, *work.refined.estimates())})
    paths = [out / f"{name}_fitted.yaml", out / f"{name}_fitted.xml", out / f"{name}_report.html"]
    write_parameters(paths[0], parameters)
    export_mjcf(work.recipe.robot, parameters, paths[1])
    if Path(work.model.robot.model_path).suffix == ".urdf":
        paths.append(out / f"{name}_fitted.urdf")
        export_urdf(work.recipe.robot, parameters, paths[-1])
    report = Report(
        title=f"Calibration of {name}",
        recipe=file.name,
        robot=name,
        command=" ".join(command),
        fit=work.fit,
        trained=tuple(work.trained),
        validations=tuple(work.validations),
        warnings=tuple(work.warnings),
        provenance=provenance,
        seconds=seconds,
    )
    write_report(paths[2], report)
    return paths


def _provenance(work: _Work, file: Path, command: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": " ".join(command),
        "recipe": {"file": file.name, **work.recipe.model_dump(mode="json", exclude_unset=True)},
        "logs": [
            {
                "file": Path(one.file).name,
                "sha256": one.sha256,
                "samples": len(one.t),
                "lines": [int(one.lines[0]), int(one.lines[-1])],
            }
            for one in (*work.trained, *work.others)
        ],
        "versions": {"mbctrl": __version__, "python": sys.version.split()[0], "pin": version("pin"), "mujoco": version("mujoco")},
    }


def _screen(work: _Work, seconds: float) -> None:
    fit = work.fit
    label, seen = work.validations[-1]
    title = f"{label}: torque not explained [%], and the planner's model"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("joint", "model", "fit", "floor", "armature", "friction", "damping"):
        table.add_column(column, justify="left" if column == "joint" else "right", no_wrap=True)
    for j, joint in enumerate(fit.tree.joints):
        table.add_row(
            joint,
            *(f"{100 * values[j]:.1f}" for values in (seen.prior.relative, seen.fit.relative, seen.fit.floor)),
            *(f"{values[j]:.3g}" for values in (fit.tree.armature, fit.tree.friction, fit.tree.damping)),
        )
    console.print(table)
    mean = [100 * float(np.mean(values)) for values in (seen.prior.relative, seen.fit.relative, seen.fit.floor)]
    console.print(
        f"torque not explained: {mean[1]:.1f} % (model file {mean[0]:.1f} %, filtering alone {mean[2]:.1f} %)", highlight=False
    )
    if seen.after is not None:
        parts = [f"{1e3 * error:.1f} mrad at {h:g} s" for h, error in zip(seen.after.horizons, seen.after.total)]
        before = "" if seen.before is None else f" (model file {1e3 * seen.before.total[1]:.1f} at {seen.before.horizons[1]:g} s)"
        console.print(f"open loop: {', '.join(parts)}{before}", highlight=False)
    side = "after" if fit.delay > 0 else "before"
    timing = f"efforts {1e3 * abs(fit.delay):.1f} ms {side} the motion they go with"
    console.print(f"friction: {fit.friction.name}; {timing}", highlight=False, soft_wrap=True)
    if work.encoders is not None:
        zeros = [
            f"{joint} {1e3 * value:+.2f} ± {1e3 * se:.2f}" if value == value else f"{joint} not identified"
            for joint, value, se in zip(work.encoders.joints, work.encoders.value, work.encoders.se)
        ]
        console.print(f"encoder offsets [mrad]: {', '.join(zeros)}", highlight=False, markup=False, soft_wrap=True)
    if work.refined is not None:
        own = work.refined.fit
        for name, unit, value, (low, high) in zip(own.names, own.units, own.values, own.interval()):
            console.print(f"simulated: {name} {value:.4g} {unit}, 95 % {low:.4g} to {high:.4g}", highlight=False)
    for note in work.warnings:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False, soft_wrap=True)
