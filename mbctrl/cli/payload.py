"""``mbctrl payload``: what an arm carries, or the drive gains a known load gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need

console = Console()


def payload(recipe: str, bare: str, loaded: str, mass: float | None, frame: str | None, out: Path | None) -> int:
    """Print the payload of ``loaded`` or, where its ``mass`` is given, the drive gains; return the exit code."""
    if mass is not None and not (np.isfinite(mass) and mass > 0):
        raise SpecError(f"expected a mass above 0 kg, found {mass}", file="command line", key="--mass")
    if out is not None and mass is not None:
        raise SpecError("holds a payload, which is not looked for where --mass is given", file="command line", key="--out")
    if out is not None and not out.name.endswith("_fitted.yaml"):
        raise SpecError(f"expected a name that ends in _fitted.yaml, found {out.name}", file="command line", key="--out")
    for module in ("mujoco", "pinocchio", "scipy", "pandas"):
        need(module, "calibrate", "weighing a payload")
    from mbctrl.calibrate.reading import read
    from mbctrl.calibrate.recipe import load_recipe
    from mbctrl.dynamics.load import load_model

    spec, file = load_recipe(recipe)
    with console.status("reading and fitting …"):
        model = load_model(spec.robot, file=file, key="robot")
        logs = [read(log, spec, file, model) for log in (bare, loaded)]
        pair = [[log.signals] for log in logs]
        found = _weigh(pair, model, frame) if mass is None else _gains(pair, model, mass, frame, spec)
    for log in logs:
        for note in log.notes:
            console.print(f"[yellow]note[/] {escape(note)}", highlight=False, soft_wrap=True)
    (_payload_screen if mass is None else _gains_screen)(found)
    if out is not None:
        _write(out, model, found, [log.recording for log in logs])
    return 0


def _weigh(pair: list[list[Any]], model: Any, frame: str | None) -> Any:
    from mbctrl.calibrate.payload import identify_payload

    return identify_payload(*pair, model.tree, frame=frame)


def _gains(pair: list[list[Any]], model: Any, mass: float, frame: str | None, spec: Any) -> Any:
    from mbctrl.calibrate.gains import drive_gains

    start = np.array(spec.log.gains) if spec.log.gains else np.ones(model.tree.n)
    return drive_gains(*pair, model.tree, mass, start_gains=start, frame=frame)


def _payload_screen(found: Any) -> None:
    console.print(f"mass {found.mass:.4g} ± {found.mass_error:.2g} kg", highlight=False)
    where = found.frame or f"the frame of the link that {found.joint} moves"
    values = ", ".join(f"{value:.4f} ± {error:.4f}" for value, error in zip(found.com, found.com_error))
    console.print(f"centre of mass {values} m in {where}", highlight=False)
    known = [
        f"{a}{b} {found.inertia[i, j]:.3g} ± {found.inertia_error[i, j]:.2g}"
        for (i, j), (a, b) in {(i, j): ("xyz"[i], "xyz"[j]) for i in range(3) for j in range(i, 3)}.items()
        if f"inertia {a}{b}" not in found.unknown
    ]
    console.print(
        f"inertia about it {', '.join(known)} kg·m²" if known else "inertia about it: not told by these logs", highlight=False
    )
    if found.unknown:
        console.print(f"not identified: {', '.join(found.unknown)}", highlight=False, soft_wrap=True)


def _gains_screen(found: Any) -> None:
    table = Table(title="drive gains", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("joint", "N·m/A", "±", "residual [A]", ""):
        table.add_column(column, justify="left" if column in ("joint", "") else "right", no_wrap=True)
    for j, joint in enumerate(found.joints):
        kept = joint in found.kept
        error = "" if kept else f"{found.errors[j]:.2g}"
        table.add_row(
            joint, f"{found.gains[j]:.4g}", error, f"{found.residual[j]:.3g}", "as given: the load does not show" if kept else ""
        )
    console.print(table)
    console.print(
        "as log.gains in a recipe: [" + ", ".join(f"{gain:.5g}" for gain in found.gains) + "]", highlight=False, markup=False
    )


def _write(out: Path, model: Any, found: Any, recordings: list[Any]) -> None:
    from mbctrl.base.parameters import write_parameters
    from mbctrl.dynamics.parameters import parameters_of

    logs = [{"file": Path(one.file).name, "sha256": one.sha256} for one in recordings]
    carried = {"mass": found.mass, "standard_error": found.mass_error, "com": [float(value) for value in found.com]}
    own = parameters_of(model.mj, found.tree(model.tree), model.robot.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_parameters(out, own.model_copy(update={"provenance": {"payload": carried, "logs": logs}}))
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
