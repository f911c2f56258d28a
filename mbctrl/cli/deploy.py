"""``mbctrl deploy``: a bundle on a robot; the live line, a person's word, the result screen."""

from __future__ import annotations

import inspect
import ipaddress
import math
import select
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from mbctrl.base.config import RunConfig, merged, settled
from mbctrl.base.errors import MbctrlError, SpecError, suggest
from mbctrl.base.robot import load_robot
from mbctrl.base.spec import import_name, load_yaml, parse_yaml, validate
from mbctrl.runtime.bundle import Bundle, check_robot, load_bundle
from mbctrl.runtime.deploy import Deployment, Settings, make_folder
from mbctrl.runtime.ladder import Mode
from mbctrl.runtime.servo import BLACK_BOX, LOG, ServoJob

console = Console()
DRIVERS = {
    "sim": "mbctrl.sim.inprocess:InProcessRobot",
    "link": "mbctrl.drivers.link:LinkDriver",
    "ur": "mbctrl.drivers.ur:UrDriver",
    "franka": "mbctrl.drivers.franka:FrankaDriver",
    "servo": "mbctrl.drivers.servo:ServoDriver",
}
_STOPPED = 3
_HOLDS = 4  # more than these are counted, not listed


def deploy(
    bundle: Path,
    driver: str,
    host: str,
    options: tuple[str, ...],
    *,
    engine: str,
    provider: str,
    threads: int,
    goal: Path | None,
    robot: str | None,
    duration: float | None,
    realtime: bool,
    yes: bool,
    out: Path | None,
) -> int:
    """Run ``bundle`` on a robot; return 0, or 3 where a fault ended the run."""
    checked = load_bundle(bundle)
    if robot is not None:
        check_robot(checked, load_robot(robot))
    config = _config(checked, goal, duration)
    make = import_name(driver, DRIVERS, file="command line", key="--driver")
    given = {"host": host, **_options(options, make)}
    _engine(engine, provider, threads)
    _ask(checked, driver, host, yes)
    folder = make_folder(out or Path("runs") / f"deploy-{bundle.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}")
    job = ServoJob(bundle.resolve(), Path(), folder.resolve(), config, make, given, realtime, seal=checked.seal)
    line = _Line(config)
    deployment = Deployment(job, Settings(engine, provider, threads), line, lambda text: console.print(text, markup=False))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's word is a Ctrl-C
    try:
        with line.progress:
            summary = deployment.run()
    except (MbctrlError, KeyboardInterrupt):
        _discard(folder)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    _result(f"{bundle.resolve().name} on {driver}", checked, summary, deployment)
    if len(summary["latencies"]) and summary["late"] > 0.1 * summary["plans"]:
        advice = "the planner cannot keep its rate here: --engine kernel is many times quicker, an export with fewer samples too"
        console.print(f"[bold yellow]{advice}[/]")
    console.print(f"log: {folder / LOG}, shown by: mbctrl replay {folder / LOG}", highlight=False)
    if (folder / BLACK_BOX).exists():
        console.print(f"the last seconds before the stop: {folder / BLACK_BOX}", highlight=False)
    return _STOPPED if any(fault and Mode[after] >= Mode.STOP for _, _, after, _, fault in summary["changes"]) else 0


def _config(bundle: Bundle, goal: Path | None, duration: float | None) -> RunConfig:
    changes: dict[str, Any] = {}
    if goal is not None:
        changes["goal"] = load_yaml(goal)
    if duration is not None:
        changes["duration"] = duration
    config = settled(validate(RunConfig, merged({**bundle.config.model_dump(), **changes}, {}), goal or "command line"))
    if (config.goal.kind == "joints") != (bundle.config.goal.kind == "joints"):
        raise SpecError(
            f"the bundle plans for goals like {bundle.config.goal.kind}, found {config.goal.kind}", file=goal, key="kind"
        )
    return config


def _engine(engine: str, provider: str, threads: int) -> None:
    """Refuse settings of the planner that would mean nothing."""
    if engine != "onnx" and provider != "cpu":
        raise SpecError(f"the {engine} engine has no providers; expected --engine onnx", file="command line", key="--provider")
    if threads < 0:
        raise SpecError(f"expected at least 0, found {threads}", file="command line", key="--threads")


def _options(options: tuple[str, ...], make: Any) -> dict[str, Any]:
    """Return the driver's options by name; ``make`` is what makes it: what it does not take is refused."""
    taken = inspect.signature(make).parameters
    known = [name for name, at in taken.items() if at.kind is at.KEYWORD_ONLY and name != "epoch"]
    out = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise SpecError(f"expected KEY=VALUE, found {option!r}", file="command line", key="--option")
        name = key.replace("-", "_")
        if name not in taken and not any(at.kind is at.VAR_KEYWORD for at in taken.values()):
            raise SpecError(f"unknown option '{key}'{suggest(name, known)}", file="command line", key="--option")
        out[name] = parse_yaml(value, "command line")
    return out


def _ask(bundle: Bundle, driver: str, host: str, yes: bool) -> None:
    """Ask before something real moves."""
    real = driver == "servo" or driver not in DRIVERS or (driver != "sim" and not _here(host))
    if not real or yes:
        return
    if not sys.stdin.isatty():
        raise SpecError("a robot will move: say --yes, nobody is here to be asked", file="command line", key="--yes")
    said = console.input(f"{bundle.robot.name} at {host} will move. Is it clear, and the emergency stop at hand? \\[y/N] ")
    if said.strip().lower() not in ("y", "yes"):
        raise SpecError("not confirmed", file="command line")


def _here(host: str) -> bool:
    """Return whether ``HOST`` or ``HOST:PORT`` is this machine."""
    name = host if host.count(":") > 1 else host.partition(":")[0]
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _discard(folder: Path) -> None:
    """Remove a run's folder that holds nothing yet."""
    try:
        folder.rmdir()
    except OSError:
        pass


class _Line:
    """The live line; reads a person's word: r re-arms, q ends."""

    def __init__(self, config: RunConfig) -> None:
        self.progress = Progress(
            TextColumn("{task.fields[clock]}"),
            BarColumn(24),
            TextColumn("{task.fields[text]}"),
            console=console,
            auto_refresh=False,
        )
        self._task = self.progress.add_task("", total=config.duration, clock="starting …", text="")
        self.progress.refresh()
        self._asks = sys.stdin is not None and sys.stdin.isatty()
        self._told = False

    def __call__(self, record: np.void) -> str | None:
        mode = Mode(int(record["mode"]))
        text = f"{mode.name}  target {record['index'] + 1}  error {record['position'] * 1e3:6.1f} mm"
        text += f"  plans {record['plans']}  latency {record['latency'] * 1e3:.0f} ms"
        self.progress.update(self._task, completed=float(record["t"]), clock=f"{record['t']:5.1f} s", text=text)
        self.progress.refresh()
        if mode is Mode.STOP and self._asks and not self._told:
            console.print(f"stopped: {record['reason'].decode()}; r and Enter re-arms, q and Enter ends", markup=False)
        self._told = mode is Mode.STOP
        if mode is Mode.STOP and not self._asks:
            return "end"  # nobody is here to re-arm
        return self._word() if self._asks else None

    @staticmethod
    def _word() -> str | None:
        if not select.select([sys.stdin], [], [], 0)[0]:
            return None
        return {"r": "rearm", "q": "end"}.get(sys.stdin.readline().strip().lower())


def _result(name: str, bundle: Bundle, summary: dict[str, Any], deployment: Deployment) -> None:
    table = Table(title=name, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for label, value in _rows(bundle, summary, deployment):
        table.add_row(label, value)
    console.print(table)
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)


def _rows(bundle: Bundle, s: dict[str, Any], deployment: Deployment) -> list[tuple[str, str]]:
    rows = [("ran", f"{s['duration']:.2f} s")]
    if s["targets"]:
        times = ", ".join(f"{t:.2f}" for t in s["reached"])
        rows.append(("targets reached", f"{len(s['reached'])} of {s['targets']}" + (f", at {times} s" if times else "")))
    if s["errors"] and math.isfinite(s["errors"][0][1]):
        held = ", ".join(f"{p * 1e3:.1f} mm {math.degrees(r):.2f} deg" for p, r in s["errors"])
        rows.append(("error when held", held))
    if math.isfinite(s["tracking"]):
        rows.append(("tracking error", f"RMS {s['tracking'] * 1e3:.1f} mm after the first lap"))
    latencies, lateness = s["latencies"], s["lateness"]
    if len(latencies):
        p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
        rows.append(("plans", f"{s['plans']}, {s['late']} late, latency p50 {p50:.1f} ms, p99 {p99:.1f} ms"))
    if len(lateness):
        p99, p999 = np.percentile(lateness, [99, 99.9]) * 1e3
        figures = f"p99 {p99:.2f} ms, p99.9 {p999:.2f} ms late"
        rows.append(("control periods", f"{s['ticks']}, {s['missed']} missed, {s['held']} without a plan; {figures}"))
    rows.append(("gate", _counts(s["clamps"])))
    rows.append(
        ("references", f"at most {s['furthest'] * 1e3:.1f} mrad from the plan's, to keep acceleration and jerk within limits")
    )
    rows.append(("measurements", _counts({key: count for key, count in s["sensors"].items() if count})))
    if s["rejected"]:
        rows.append(("plans refused", _counts(s["rejected"])))
    if deployment.restarts:
        rows.append(("planner restarts", str(len(deployment.restarts))))
    held = sum(after == "HOLD" for _, _, after, _, _ in s["changes"])
    for t, before, after, reason, fault in s["changes"]:
        if held > _HOLDS and "HOLD" in (before, after) and t > 0:
            continue
        mark = f"[bold yellow]{t:.3f} s: {before} -> {after}, {reason}[/]" if fault else f"{t:.3f} s: {before} -> {after}, {reason}"
        rows.append(("ladder", mark))
    if held > _HOLDS:
        rows.append(("ladder", f"[bold yellow]held {held} times for want of a plan; {LOG} has them all[/]"))
    return rows


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"
