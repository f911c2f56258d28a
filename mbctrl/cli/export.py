"""``mbctrl export``: from a scenario or a controller to a bundle, and one screen on what is in it."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mbctrl.base.config import RunConfig, load_run
from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need
from mbctrl.base.find import find, names
from mbctrl.base.spec import load_yaml
from mbctrl.cli.run import with_overrides

console = Console()


def export(name: str, overrides: list[str], out: Path | None) -> int:
    """Export ``name``'s planner to ``out``; return the exit code."""
    config, file = scenario_of(name)
    config = with_overrides(config, overrides, name, file)
    for module in ("torch", "onnx", "onnxscript", "mujoco", "pinocchio", "scipy"):
        need(module, "export", "exporting a planner")
    folder = out or Path("bundles") / file.stem.removesuffix("_sim")
    if folder.exists():
        raise SpecError("exists already", file=folder)
    from mbctrl.cli.build import check_goal, load_run_model
    from mbctrl.export.bundle import export_bundle

    start = time.monotonic()
    with console.status("loading the robot …") as status:
        model = load_run_model(config, file)
        check_goal(config, model, file)
        written = export_bundle(config, model, folder, file, lambda text: status.update(f"{text} …"))
    seconds = time.monotonic() - start
    table = Table(title=f"{folder}: {model.robot.name}, {file.stem}", title_justify="left")
    for heading in ("file", "kB", "operators a run", "one run, one thread"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    with console.status("timing …"):
        latencies = _latencies(folder)
    for file_name, size in written.sizes.items():
        count, latency = written.nodes.get(file_name), latencies.get(file_name)
        table.add_row(
            file_name,
            f"{size / 1e3:.0f}",
            "" if count is None else str(count),
            "" if latency is None else f"{latency * 1e3:.2f} ms",
        )
    console.print(table)
    total = sum(written.sizes.values())
    console.print(f"{total / 1e3:.0f} kB in {seconds:.0f} s. Try it without torch: mbctrl check {folder}", highlight=False)
    return 0


def _latencies(folder: Path) -> dict[str, float]:
    """Return the median time of one iteration [s] by file, on onnxruntime's processor and of the compiled kernel."""
    from mbctrl.runtime.bundle import ROLLOUT, load_bundle
    from mbctrl.runtime.planner import build_planner, iteration_times

    bundle = load_bundle(folder)
    found = {}
    for file, engine in (("iter.onnx", "onnx"), (ROLLOUT, "kernel")):
        times = iteration_times(bundle, build_planner(bundle, engine, threads=1), 15)
        found[file] = sorted(times)[len(times) // 2]
    return found


def scenario_of(name: str) -> tuple[RunConfig, Path]:
    """Return the run ``name`` stands for: a scenario, or the one scenario that uses the controller of that name.

    Errors:
        SpecError: for a controller that no scenario uses, or more than one.
    """
    path = Path(name)
    known = name in names("launch") or "launch" in path.parts
    if not known and (name in names("controllers") or (path.suffix and "rule" in load_yaml(find("controllers", name)))):
        wanted = find("controllers", name).resolve()
        users = [scenario for scenario, file in names("launch").items() if _uses(file, wanted)]
        if len(users) != 1:
            found = ", ".join(users) or "none"
            raise SpecError(f"a controller alone names no robot; expected one scenario that uses it, found {found}", file=name)
        return load_run(users[0])
    return load_run(name)


def _uses(file: Path, controller: Path) -> bool:
    named = load_yaml(file).get("controller")
    try:
        return named is not None and find("controllers", str(named), file=file).resolve() == controller
    except SpecError:
        return False
