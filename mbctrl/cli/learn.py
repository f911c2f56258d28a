"""``mbctrl train`` and ``mbctrl evaluate``: logs to a learned model, a learned model and logs to a report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need

if TYPE_CHECKING:
    from mbctrl.dynamics.load import Model
    from mbctrl.learning.evaluate import Errors
    from mbctrl.learning.expected import Expected
    from mbctrl.learning.fit import Epoch
    from mbctrl.learning.transitions import Transitions

console = Console()


def train(recipe: str, logs: Sequence[str], out: Path) -> int:
    """Learn what ``recipe`` says from ``logs`` and write it to ``out``; return the exit code."""
    _needs(logs, "training")
    from mbctrl.cli.build import load_arm
    from mbctrl.learning.fit import fit
    from mbctrl.learning.recipe import check_frames, load_learning_recipe
    from mbctrl.learning.samples import samples_of
    from mbctrl.learning.transitions import cut, split

    if out.suffix != ".npz":
        raise SpecError(f"expected a name that ends in .npz, found '{out}'", file="command line", key="--out")
    spec, file = load_learning_recipe(recipe)
    arm = load_arm(spec.robot, file)
    check_frames(spec, arm.tree, file)
    every = _read(logs, arm, spec.dt, spec)
    every = cut(every, spec.episode) if spec.episode is not None else every
    samples_of(every, arm, spec)  # what is no number is refused by the row it has in its file
    training, validation, test = split(every, (spec.training.validation, spec.training.test), spec.training.seed)
    sets = [samples_of(part, arm, spec) for part in (training, validation)]
    console.print(
        f"{len(every)} transitions: {len(training)} to learn from, {len(validation)} to stop by, {len(test)} to judge by; "
        f"{len(sets[0])}, {len(sets[1])} near enough to be taught",
        highlight=False,
        soft_wrap=True,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=spec.training.epochs)
        fitted = fit(*sets, arm, spec, lambda epoch: progress.update(task, completed=epoch.number, description=_told(epoch)))
    out.parent.mkdir(parents=True, exist_ok=True)
    fitted.residual.save(out)
    console.print(_told(fitted.history[-1]), highlight=False)
    _screen(_compared({out.name: fitted.residual}, arm, test, spec.integrator))
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    console.print(f"judge it on other logs: mbctrl evaluate {out} LOG", highlight=False, soft_wrap=True)
    return 0


def evaluate(
    model: Path,
    logs: Sequence[str],
    out: Path | None,
    beside: Sequence[Path],
    robot: str | None,
    parameters: str | None,
    command: Sequence[str],
) -> int:
    """Judge ``model`` on ``logs``, beside others and the physics alone, and write report.html into ``out``."""
    _needs(logs, "evaluating")
    need("jinja2", "learn", "a report")
    need("matplotlib", "learn", "a report")
    from mbctrl.base.config import RobotSpec
    from mbctrl.cli.build import load_arm
    from mbctrl.dynamics.residual import load_residual, peek
    from mbctrl.learning.evaluate import FEWEST, coverage, gates_over, tool_of, windows_of
    from mbctrl.learning.expected import expected
    from mbctrl.learning.report import Evaluation, write_report
    from mbctrl.learning.samples import learned_model

    name, dt = peek(model)
    arm = load_arm(RobotSpec(name=robot or name, parameters=parameters), model)
    residuals = {path.name: load_residual(path, arm.robot, arm.tree, dt) for path in (model, *beside)}
    if len(residuals) != 1 + len(beside):
        raise SpecError("expected models with different file names", file="command line", key="--beside")
    own = residuals[model.name]
    every = _read(logs, arm, own.dt, next((each for each in residuals.values() if each.base == "analytic"), None))
    hybrid = learned_model(arm, own)
    errors = _compared(residuals, arm, every, own.integrator)
    out = out or Path("runs") / f"evaluate-{model.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    seen = Evaluation(
        name=model.name,
        residual=own,
        arm=arm,
        errors=tuple(errors),
        coverage=tuple(coverage(hybrid, every)),
        expected=tuple(expected(hybrid, windows_of(every), arm)),
        transitions=every,
        tool=tool_of(arm, every.x[None, :: max(1, len(every) // 2000), : arm.tree.n].transpose(0, 2, 1))[0],
        gates=gates_over(hybrid, arm, 4000, seed=0) if own.base == "analytic" else None,
        command=" ".join(command),
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    write_report(out / "report.html", seen)
    _screen(errors)
    for group in seen.coverage:
        if group.count < FEWEST:
            continue
        shares = ", ".join(f"{100 * share:.0f}" for share in group.inside)
        console.print(f"90 % intervals hold [%], {group.group}: {shares}", highlight=False, markup=False, soft_wrap=True)
    _ahead(seen.expected)
    console.print(f"wrote {out / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


def _ahead(every: Sequence[Expected], steps: int = 25) -> None:
    """Print what intervals of the first way hold some steps ahead."""
    from mbctrl.learning.evaluate import FEWEST, KINDS

    for one in every[:1]:
        found = [(kind, *one.covered(steps, k)) for k, kind in enumerate(KINDS)]
        told = ", ".join(
            f"{kind} {100 * speeds:.0f} and {100 * tool:.0f}" for kind, speeds, tool, count in found if count >= FEWEST
        )
        what = f"90 % intervals {steps} steps ahead ({one.way}) hold [%] of speeds and tool"
        console.print(f"{what}: {told or 'too few stretches are that long'}", highlight=False, markup=False, soft_wrap=True)


def _needs(logs: Sequence[str], purpose: str) -> None:
    if not logs:
        raise SpecError("expected at least one log", file="command line", key="LOG")
    for module in ("torch", "pyarrow", "mujoco", "pinocchio"):
        need(module, "learn", purpose)


def _read(logs: Sequence[str], arm: Model, dt: float, gated: Any) -> Transitions:
    """Return the transitions of logs; gaps are measured where something gated says to what."""
    from mbctrl.learning.runs import read_all, source_of
    from mbctrl.learning.samples import with_gaps

    every = read_all(logs, source_of(arm.robot, arm.tree.revolute, dt))
    return every if gated is None else with_gaps(every, arm, gated)


def _compared(residuals: dict[str, Any], arm: Model, every: Transitions, integrator: str) -> list[Errors]:
    from mbctrl.learning.evaluate import open_loop, windows_of
    from mbctrl.learning.samples import analytic_model, learned_model

    windows = windows_of(every)
    models = {name: learned_model(arm, residual, every.source.dt) for name, residual in residuals.items()}
    models["analytic"] = analytic_model(arm, every.source.dt, integrator)
    contacts = [residual.contact for residual in residuals.values() if residual.contact is not None]
    beneath = next((contact for contact in contacts if contact.stiffness > 0 or contact.damping > 0), None)
    if beneath is not None:
        models["with its contact"] = analytic_model(arm, every.source.dt, integrator, beneath)
    return [open_loop(name, model, windows, arm) for name, model in models.items()]


def _told(epoch: Epoch) -> str:
    best = " ".join(f"{loss:.4f}" for loss in epoch.best)
    now = " ".join(f"{loss:.3f}" for loss in epoch.training)
    return f"epoch {epoch.number}: training loss {now}, held out {best}, {int(epoch.active.sum())} members learn"


def _short(value: float) -> str:
    return "0" if value < 1e-6 else f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _screen(errors: Sequence[Errors]) -> None:
    from mbctrl.learning.evaluate import HORIZONS, KINDS

    names = [one.name for one in errors]
    table = Table(title="tool error in open loop \\[mm], median / 95 %", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "steps", "stretches", *names):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for k, kind in enumerate(KINDS):
        for step in HORIZONS:
            found = [one.summary(step, k) for one in errors]
            if found[0][1]:
                cells = [" / ".join(_short(1e3 * value) for value in np.asarray(values)[-1]) for values, _ in found]
                table.add_row(kind, str(step), str(found[0][1]), *cells)
    console.print(table)
