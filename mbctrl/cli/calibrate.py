"""``mbctrl calibrate``: logs in, a parameter file, a model file and a report out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbctrl import __version__
from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need

if TYPE_CHECKING:
    from mbctrl.calibrate.calibration import Outcome

console = Console()


def calibrate(recipe: str, logs: Sequence[str], held_out: Sequence[str], out: Path, command: Sequence[str] | None = None) -> int:
    """Fit ``recipe`` to ``logs``, judge it on ``held_out`` and write the results into ``out``; return the exit code."""
    if not logs:
        raise SpecError("expected at least one log", file="command line", key="LOG")
    for module in ("torch", "mujoco", "pinocchio", "scipy", "cvxpy", "jinja2", "matplotlib", "pandas"):
        need(module, "calibrate", "calibrating")
    from mbctrl.calibrate.calibration import Calibration
    from mbctrl.calibrate.recipe import load_recipe
    from mbctrl.dynamics.load import load_model

    start = time.perf_counter()
    spec, file = load_recipe(recipe)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading")
        model = load_model(spec.robot, file=file, key="robot")
        work = Calibration(spec, file, model, lambda text: progress.update(task, description=text))
        outcome = work.run(logs, held_out)
        progress.update(task, description="writing")
        seconds = time.perf_counter() - start
        paths = _write(outcome, out, file, list(command or ["mbctrl", "calibrate", recipe, *logs]), seconds)
    _screen(outcome, seconds)
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"use it: mbctrl run SCENARIO --robot.parameters {paths[0]}", highlight=False, soft_wrap=True)
    return 0


def _write(work: Outcome, out: Path, file: Path, command: list[str], seconds: float) -> list[Path]:
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


def _provenance(work: Outcome, file: Path, command: list[str]) -> dict[str, Any]:
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
            for one in (*work.trained, *work.held_out)
        ],
        "versions": {"mbctrl": __version__, "python": sys.version.split()[0], "pin": version("pin"), "mujoco": version("mujoco")},
    }


def _screen(work: Outcome, seconds: float) -> None:
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
