"""``mbctrl replay``: what a deployed robot's log says, on one screen and in one figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mbctrl.base.errors import ExtraError, SpecError
from mbctrl.runtime.logfile import Recording, read_recording

console = Console()
_EVENTS = 12  # on the screen
_COLOURS = {"warning": "yellow", "error": "red"}


def replay(path: str | Path) -> int:
    """Print a log's result screen and write plots.png beside it; return the exit code.

    Errors:
        SpecError: naming the file, where it is no log.
        ExtraError: without the package mcap.
    """
    path = Path(path)
    recording = read_recording(path)
    if not len(recording.topics.get("/state", {}).get("t", ())):
        raise SpecError("has no measurement in it", file=path)
    console.print(_screen(recording, path))
    try:
        from mbctrl.report.recording import plot_recording

        plot_recording(recording, path.with_name("plots.png"), f"{recording.header.get('robot', '')}, {path.name}")
        console.print(f"wrote {path.with_name('plots.png')}", highlight=False, markup=False, soft_wrap=True)
    except ExtraError as error:
        console.print(f"[yellow]no plots.png:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    except OSError as error:
        console.print(f"[yellow]no plots.png:[/] {escape(str(error.strerror or error))}", highlight=False, soft_wrap=True)
    return 0


def _screen(recording: Recording, path: Path) -> Table:
    header = recording.header
    table = Table(title=f"{header.get('robot', 'robot')}, {path.name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    if not recording.whole:
        table.add_row("file", "[yellow]cut off or damaged: what came before is shown[/]")
    for key, label in (("bundle", "bundle"), ("versions", "versions")):
        if header.get(key):
            value = header[key][:12] if key == "bundle" else header[key]
            table.add_row(label, escape(", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)))
    table.add_section()
    for label, value in [*_times(recording), *_plans(recording)]:
        table.add_row(label, value)
    table.add_section()
    for label, value in limits_used(recording).items():
        table.add_row(label, value)
    table.add_row("changed by", _clamped(recording))
    table.add_row("ladder", " → ".join(f"{name} {t:.3f} s" for t, name in transitions(recording)) or "not in the log")
    table.add_section()
    for event in recording.events[-_EVENTS:]:
        colour = _COLOURS.get(event["level"])
        text = escape(f"{event['t']:.3f} s  {event['text']}")
        table.add_row(escape(event["level"]), f"[{colour}]{text}[/]" if colour else text)
    earlier = len(recording.events) - _EVENTS
    table.add_row("events", f"{earlier} earlier ones" if earlier > 0 else f"{len(recording.events)}")
    return table


def _times(recording: Recording) -> list[tuple[str, str]]:
    t = recording.topics["/state"]["t"]
    rows = [("duration", f"{t[-1] - t[0]:.3f} s, {len(t)} records")]
    if len(t) > 1:
        steps = np.diff(t)
        asked = recording.header.get("rate")
        rate = f"{1 / max(np.median(steps), 1e-9):.1f} Hz" + (f" of {asked:g} Hz" if asked else "")
        rows.append(("control rate", f"{rate}, longest gap {steps.max() * 1e3:.1f} ms"))
    seq = recording.topics["/state"].get("seq")
    if seq is not None and len(seq) > 1:
        rows.append(("measurements", f"{np.mean(np.diff(seq) <= 0):.1%} of the records without a new one"))
    return rows


def _plans(recording: Recording) -> list[tuple[str, str]]:
    plan = recording.topics.get("/plan")
    if plan is None or "latency" not in plan:
        return []
    latency = plan["latency"][np.isfinite(plan["latency"])] * 1e3
    spread = f", latency p50 {np.median(latency):.1f} ms, p99 {np.percentile(latency, 99):.1f} ms" if len(latency) else ""
    return [("plans", f"{len(plan['t'])}{spread}")]


def limits_used(recording: Recording) -> dict[str, str]:
    """Return by quantity how much of its limit was used, and by which joint; empty where the header has no limits."""
    limits, state = recording.header.get("limits", {}), recording.topics["/state"]
    joints, found = recording.header.get("joints", []), {}
    if "position_lower" in limits:
        low, high = np.array(limits["position_lower"]), np.array(limits["position_upper"])
        found["position used"] = (np.abs(state["q"] - (low + high) / 2) / ((high - low) / 2), joints)
    for label, column, key, names in (
        ("velocity used", "v", "velocity", joints),
        ("torque used", "tau", "effort", recording.header.get("actuated", joints)),
    ):
        if key in limits:
            found[label] = (np.abs(state[column]) / np.array(limits[key]), names)
    return {label: _worst(share, names) for label, (share, names) in found.items()}


def _worst(share: np.ndarray, names: list[str]) -> str:
    share = np.where(np.isfinite(share), share, 0.0)
    joint = int(share.max(0).argmax())
    text = f"{share.max():.0%} of the limit by {names[joint]}"
    return f"[red]{escape(text)}[/]" if share.max() > 1 else escape(text)


def _clamped(recording: Recording) -> str:
    clamped = recording.topics.get("/command", {}).get("clamped")
    if clamped is None:
        return "not in the log"
    names = recording.header.get("clamps", [])
    if not names:
        return f"{int((clamped != 0).sum())} of {len(clamped)} records"
    bits = {name: int((clamped.astype(np.int64) >> bit & 1).sum()) for bit, name in enumerate(names)}
    return escape(", ".join(f"{name} {count}" for name, count in bits.items())) + f" of {len(clamped)} records"


def transitions(recording: Recording) -> list[tuple[float, str]]:
    """Return the (time [s], mode) every mode began at; names are the header's ``modes``."""
    command = recording.topics.get("/command", {})
    if "mode" not in command or not len(command["mode"]):
        return []
    mode, names = command["mode"].astype(int), recording.header.get("modes", [])
    begins = [0, *(np.flatnonzero(np.diff(mode)) + 1)]
    return [(float(command["t"][i]), names[mode[i]] if mode[i] < len(names) else str(mode[i])) for i in begins]
