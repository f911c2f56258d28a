"""``mbctrl excite``: the progress bar, the result screen and the folder of an excitation trajectory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need
from mbctrl.base.logs import Log, LogWriter
from mbctrl.base.spec import dump_yaml, validate

if TYPE_CHECKING:
    from mbctrl.calibrate.excite import Excitation, ExciteSettings
    from mbctrl.dynamics.load import Model

console = Console()
_KINDS = ("mx", "my", "mz", "m", "Ixx", "Ixy", "Iyy", "Ixz", "Iyz", "Izz", "armature", "viscous", "coulomb")
_SHOWN = 6  # poorly excited parameters named on the screen


def excite(robot: str, arguments: dict[str, Any], out: Path | None) -> int:
    """Find an excitation trajectory for ``robot`` and leave a folder; return the exit code."""
    for module in ("mujoco", "pinocchio", "scipy", "matplotlib"):
        need(module, "sim", "finding an excitation trajectory")
    from mbctrl.calibrate.excite import ExciteSettings
    from mbctrl.dynamics.load import load_model

    with _flags(ExciteSettings.model_fields):
        settings = validate(ExciteSettings, {**arguments, "torque_noise": arguments["torque_noise"] or None}, "command line")
    model = load_model(robot)
    folder = out or Path("runs") / f"excite-{model.robot.name}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        raise SpecError("exists already", file=folder)
    with _flags(ExciteSettings.model_fields):
        found = _search(model, settings)
    with _whole_folder(folder) as unfinished:
        _write(found, model, unfinished)
    _screen(found)
    console.print(f"folder: {folder}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _flags(fields: Any) -> Iterator[None]:
    """Name a setting at fault as the command line spells it."""
    try:
        yield
    except SpecError as error:
        if (error.key or "").partition("[")[0] in fields:
            raise SpecError(error.message, file="command line", key="--" + error.key.replace("_", "-")) from None
        raise


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes its place on success and is removed on failure."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise SpecError(f"cannot be made: {error.strerror}", file=folder) from None
    try:
        yield hidden
        os.replace(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _search(model: Model, settings: ExciteSettings) -> Excitation:
    from mbctrl.calibrate.excite import excite as search

    columns = (TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading the model", total=None)
        return search(model, settings, lambda text, done, total: bar.update(task, description=text, completed=done, total=total))


# --- files --------------------------------------------------------------------------------------------------------------


def _write(found: Excitation, model: Model, folder: Path) -> None:
    from mbctrl.calibrate.excite import POOR
    from mbctrl.report.excitation import plot_excitation

    robot, (t, q, v, a, phase) = found.robot, found.trajectory()
    units = ["rad" if hinge else "m" for hinge in model.tree.revolute]
    groups = ((q, "q", ""), (v, "v", "/s"), (a, "a", "/s²"))
    columns = [(f"{name}.{joint}", unit + per) for _, name, per in groups for joint, unit in zip(robot.joints, units)]
    about = {
        "what": "excitation trajectory",
        "robot": robot.name,
        "joints": list(robot.joints),
        "rate": found.settings.rate,
        "phases": "0 from home to the start, 1 excitation, 2 back home",
        "settings": found.settings.model_dump(mode="json"),
    }
    writer = LogWriter(folder / "trajectory.csv", [("t", "s"), *columns, ("phase", "1")], about)
    try:
        for row in np.column_stack([t, q, v, a, phase]) + 0.0:  # no minus zeros
            writer.add(row)
    finally:
        writer.close()
    (folder / "excitation.yaml").write_text(dump_yaml(_about(found)), encoding="utf-8")
    with console.status("plotting …"):
        t, q, v, a, _ = found.trajectory(min(found.settings.rate, 100.0))
        tau = found.torque(q, v, a)
        torques = [(f"tau.{joint}", "N·m" if hinge else "N") for joint, hinge in zip(robot.joints, model.tree.revolute)]
        shown = [column for column in columns if not column[0].startswith("a.")]
        log = Log({}, dict([("t", "s"), *shown, *torques]), np.column_stack([t, q, v, tau]))
        title = f"{robot.name}: excitation, condition number {found.quality.condition:.0f}"
        plot_excitation(log, robot, found.ramp, found.base.labels(), found.relative(), POOR, folder / "plots.png", title)


def _about(found: Excitation) -> dict[str, Any]:
    """Return what excitation.yaml says; plain numbers and texts."""
    robot, base, series = found.robot, found.base, found.series
    nominal, relative, poor = base.nominal(), found.relative(), set(found.poor())
    return {
        "robot": robot.name,
        "settings": found.settings.model_dump(mode="json"),
        "series": {
            "velocity [rad/s]": "sum over k of a[k] cos(k w t) + b[k] sin(k w t), w = 2 pi / duration; position about offset",
            "ramp": found.ramp,
            "joints": {
                joint: {"offset": float(series.offset[i]), "a": series.a[i].tolist(), "b": series.b[i].tolist()}
                for i, joint in enumerate(robot.joints)
            },
        },
        "limits used": {kind: dict(zip(robot.joints, np.round(share, 4).tolist())) for kind, share in found.usage.shares.items()},
        "clearance": {"least": found.usage.clearance, "between": found.usage.pair, "not compared": list(found.unavoidable)},
        "condition number": {"random": found.before.condition, "optimised": found.quality.condition},
        "log det": {"random": found.before.logdet, "optimised": found.quality.logdet},
        "parameters": [
            {
                "name": base.names[column],
                "grouping": text,
                "unit": base.units[column],
                "nominal": float(nominal[i]),
                "expected sd": float(found.quality.sd[i]),
                "relative": None if np.isnan(relative[i]) else float(relative[i]),
                "poorly excited": i in poor,
            }
            for i, (column, text) in enumerate(zip(base.columns, base.groupings()))
        ],
    }


# --- the screen -----------------------------------------------------------------------------------------------------------


def _screen(found: Excitation) -> None:
    settings, usage = found.settings, found.usage
    length = settings.duration * settings.repeats + 2 * found.ramp
    title = f"{found.robot.name}: {length:.1f} s, {settings.harmonics} harmonics, seed {settings.seed}"
    console.print(f"[bold]{escape(title)}[/]; limits used, of {settings.margin:.0%} allowed", highlight=False)
    table = Table()
    table.add_column("joint")
    for kind in usage.shares:
        table.add_column(kind, justify="right")
    for i, joint in enumerate(found.robot.joints):
        table.add_row(f"{i + 1} {joint}", *(f"{share[i]:.0%}" for share in usage.shares.values()))
    console.print(table)
    absent = [kind for kind in ("acceleration", "jerk") if kind not in usage.shares]
    if absent:
        console.print(f"no limit given, none kept: {', '.join(absent)}", style="yellow", highlight=False)
    console.print(f"least clearance   {_clearance(found)}", highlight=False, soft_wrap=True)
    if found.unavoidable:
        console.print(
            f"not compared      {'; '.join(found.unavoidable)}: near wherever the joints go", highlight=False, soft_wrap=True
        )
    for name, key, form in (("condition number", "condition", ".0f"), ("log det", "logdet", ".1f")):
        before, after = getattr(found.before, key), getattr(found.quality, key)
        console.print(f"{name:<17} {before:{form}} best random motion, {after:{form}} optimised", highlight=False)
    console.print("expected standard deviation, % of nominal (±: absolute, SI, where that is 0)", style="bold")
    console.print(_parameters(found))
    _poor(found)


def _clearance(found: Excitation) -> str:
    text = f"{found.usage.clearance * 1e3:.0f} mm, {escape(found.usage.pair)}; {found.settings.clearance * 1e3:g} mm asked"
    return text + ("" if found.settings.floor else ", floor not looked at")


def _parameters(found: Excitation) -> Table:
    """Return the expected standard deviations, a row a joint, a column a kind."""
    base, relative, poor = found.base, found.relative(), set(found.poor())
    cells: dict[tuple[str, str], tuple[str, bool]] = {}
    for i, column in enumerate(base.columns):
        joint, _, kind = base.names[column].rpartition(".")
        text = f"±{found.quality.sd[i]:.1g}" if np.isnan(relative[i]) else _percent(relative[i])
        cells[joint, kind] = (text, i in poor)
    kinds = [kind for kind in _KINDS if any(kind == known for _, known in cells)]
    widths = [max(len(kind), *(len(text) for (_, known), (text, _) in cells.items() if known == kind), 1) for kind in kinds]
    table = Table(padding=(0, 0))
    # On a narrow screen names are cut, never figures; the numbers still say which joint.
    table.add_column("joint", no_wrap=True, max_width=max(8, console.width - sum(widths) - len(kinds) - 2))
    for kind, width in zip(kinds, widths):
        table.add_column(kind, justify="right", no_wrap=True, min_width=width)
    for i, joint in enumerate(found.robot.joints, 1):
        row = (cells.get((joint, kind), ("", False)) for kind in kinds)
        table.add_row(f"{i} {joint}", *(f"[bold yellow]{text}[/]" if bad else text for text, bad in row))
    return table


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.2g}" if percent < 100 else f"{percent:.0f}" if percent < 9999.5 else ">9999"


def _poor(found: Excitation) -> None:
    from mbctrl.calibrate.excite import POOR

    poor, labels, relative = found.poor(), found.base.labels(), found.relative()
    if not poor:
        console.print(f"every parameter is expected within {POOR:.0%}", style="green")
        return
    named = ", ".join(f"{labels[i]} {_percent(relative[i])} %" for i in poor[:_SHOWN])
    rest = f" and {len(poor) - _SHOWN} more" if len(poor) > _SHOWN else ""
    text = f"poorly excited, over {POOR:.0%}: {named}{rest}. --repeats averages noise, --margin and --duration widen the motion."
    console.print(text, style="yellow", highlight=False, soft_wrap=True)
