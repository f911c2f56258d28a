"""``mbctrl check BUNDLE``: whether a bundle is whole, whose it is, and how fast it plans here; needs no torch and no MuJoCo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mbctrl.base.errors import BundleError, ExtraError, MbctrlError
from mbctrl.base.extras import need
from mbctrl.base.find import names
from mbctrl.base.robot import load_robot
from mbctrl.runtime.bundle import MANIFEST, Bundle, check_robot, load_bundle

console = Console()
_TIMED = 25  # iterations an engine


def is_bundle(name: str) -> bool:
    """Return whether ``name`` is to be taken for a bundle: a folder with a manifest, or the manifest itself."""
    path = Path(name)
    return (path / MANIFEST).is_file() or (path.name == MANIFEST and path.is_file())


def check_bundle(name: str) -> None:
    """Check a bundle and print one screen on it.

    Errors:
        BundleError: for a file that is damaged or missing, or an engine that answers the golden vectors otherwise.
    """
    path = Path(name)
    bundle = load_bundle(path.parent if path.name == MANIFEST else path)
    table = Table(title=f"{bundle.folder}: {bundle.robot.name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for label, value in [*_contents(bundle), ("robot", _robot(bundle)), *_engines(bundle)]:
        table.add_row(label, value)
    console.print(table)


def _contents(bundle: Bundle) -> list[tuple[str, str]]:
    manifest, config = bundle.manifest, bundle.config
    size, planner = sum(len(data) for data in bundle.files.values()), config.planner
    versions = manifest.get("versions", {})
    made = ", ".join(f"{name} {versions[name]}" for name in ("mbctrl", "torch", "onnx") if name in versions)
    steps, dt = manifest["knots"]["steps"], config.dynamics.dt
    rule = config.rule.rpartition(":")[2].lower()
    drawn = f"{planner.samples} samples × {steps} steps of {dt * 1e3:g} ms"
    return [
        ("bundle", f"{bundle.seal[:12]}, format {manifest['format']}, opset {manifest.get('opset', 'unknown')}; made with {made}"),
        ("files", f"{len(bundle.files)}, {size / 1e3:.0f} kB, all as their SHA-256 says"),
        ("planner", f"{rule}, {drawn}, {planner.iterations} iteration{'s' * (planner.iterations > 1)} a plan"),
        ("goal", f"{config.goal.kind}; terms {', '.join(manifest.get('terms', config.task))}"),
        ("rates", f"control {bundle.robot.control.rate:g} Hz, plans {config.loop.rate:g} Hz"),
    ]


def _robot(bundle: Bundle) -> str:
    """Compare with the description of that name that is found here, if there is one."""
    name = bundle.robot.name
    joints = f"{name}, {bundle.robot.nq} joints"
    if name not in names("robots"):
        return f"{joints}; no robots/{name} is found here to compare it with"
    try:
        check_robot(bundle, load_robot(name))
    except BundleError as error:
        return f"{joints}; [yellow]differs from robots/{name}:[/] {escape(f'{error.key}: {error.message}')}"
    except MbctrlError as error:
        return f"{joints}; [yellow]not compared:[/] {escape(str(error))}"
    return f"{joints}; matches robots/{name}"


def _engines(bundle: Bundle) -> list[tuple[str, str]]:
    rows = [("kernel", _engine(bundle, "kernel", "cpu"))]
    try:
        need("onnxruntime", "deploy", "the onnx engine")
    except ExtraError as error:
        return [*rows, ("onnx", _missing(error))]
    from mbctrl.runtime.onnx_planner import PROVIDERS, usable

    found = usable()
    rows += [(f"onnx, {provider}", _engine(bundle, "onnx", provider)) for provider in found]
    absent = [provider for provider in PROVIDERS if provider not in found]
    return [*rows, *([("", f"not usable here: {', '.join(absent)}")] if absent else [])]


def _engine(bundle: Bundle, engine: str, provider: str) -> str:
    from mbctrl.runtime.planner import build_planner, golden_error, iteration_times

    try:
        mpc = build_planner(bundle, engine, provider, threads=1)
    except ExtraError as error:
        return _missing(error)
    times = np.array(iteration_times(bundle, mpc, _TIMED)[2:]) * 1e3  # the first ones set things up
    p50, most = np.median(times), times.max()
    return (
        f"golden vectors to {golden_error(bundle, mpc.planner):.0e}; one iteration {p50:.1f} ms, at most {most:.1f} ms, one thread"
    )


def _missing(error: ExtraError) -> str:
    return f"[yellow]not here:[/] {escape(str(error))}"
