"""The one-screen result of a run."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Console
from rich.table import Table

from mbctrl.base.config import RunConfig
from mbctrl.base.scene import JointGoal
from mbctrl.report.payload import SPAN, Change
from mbctrl.report.summary import Summary


def result_screen(console: Console, config: RunConfig, summary: Summary, name: str, lockstep: bool) -> None:
    """Print what the run achieved and what went wrong."""
    table = Table(
        title=f"{name}, seed {config.seed}, {'lockstep' if lockstep else 'real time'}", show_header=False, title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column()
    for label, value in _goal_rows(config, summary):
        table.add_row(label, value)
    table.add_section()
    rate = config.loop.rate
    slow = summary.plan_rate < 0.9 * rate
    table.add_row("plans", _mark(f"{summary.plan_rate:.1f} /s of {rate:g} /s asked", slow))
    table.add_row("plan latency", f"p50 {summary.latency_p50 * 1e3:.1f} ms, p99 {summary.latency_p99 * 1e3:.1f} ms")
    table.add_row("CPU time a plan", f"{summary.cpu * 1e3:.1f} ms")
    table.add_row("effective samples", f"{summary.ess:.1f} of {config.planner.samples}")
    table.add_row("late plans", _mark(f"{summary.late} of {summary.plans}", summary.late > 0.02 * summary.plans))
    table.add_row("missed periods", _mark(f"{summary.missed} of {summary.ticks}", summary.missed > 0.01 * summary.ticks))
    if summary.held or summary.nonfinite:
        table.add_row(
            "without a valid plan", _mark(f"{summary.held} periods; {summary.nonfinite} rollouts not finite", summary.held > 0)
        )
    table.add_section()
    clamps = ", ".join(f"{kind} {count}" for kind, count in summary.clamps.items()) or "none"
    table.add_row("safety clamps", _mark(clamps, bool(summary.clamps)))
    used = ", ".join(f"{kind} {share:.0%}" for kind, (share, _) in summary.limits.items())
    table.add_row("limits used", used)
    if summary.violations:
        table.add_row("limits exceeded", _mark("; ".join(summary.violations), True))
    console.print(table)
    if slow or summary.late > 0.02 * summary.plans:
        console.print(_advice(summary), style="bold yellow")
    if summary.interrupted:
        console.print("interrupted: the log holds what was run", style="yellow")


def _goal_rows(config: RunConfig, summary: Summary) -> list[tuple[str, str]]:
    rows = [("ran", f"{summary.duration:.2f} s")]
    if summary.reward is not None:
        rows.append(("return", f"{summary.reward:.1f}"))
    if summary.targets:
        times = ", ".join(f"{t:.2f}" for t in summary.reached)
        text = f"{len(summary.reached)} of {summary.targets}" + (f", at {times} s" if times else "")
        rows.append(("targets reached", _mark(text, len(summary.reached) < summary.targets)))
    if isinstance(config.goal, JointGoal):
        rows.append(("final error", f"{summary.position_error:.4f} rad"))
    elif summary.reach_errors:
        rows.append(("error when held", ", ".join(f"{p * 1e3:.1f} mm {math.degrees(r):.2f} deg" for p, r in summary.reach_errors)))
    if not isinstance(config.goal, JointGoal) and np.isfinite(summary.position_error):
        rows.append(("final error", f"{summary.position_error * 1e3:.1f} mm, {math.degrees(summary.rotation_error):.2f} deg"))
    if np.isfinite(summary.tracking_rms):
        rows.append(
            ("tracking error", f"RMS {summary.tracking_rms * 1e3:.1f} mm after the first lap ({summary.tracking_from:.1f} s)")
        )
    if np.isfinite(summary.touched):
        rows.append(("peak force at touch", f"{summary.force_peak:.1f} N, at {summary.touched:.2f} s"))
    if np.isfinite(summary.force_rms):
        rows.append(("force error", f"RMS {summary.force_rms:.2f} N after the first lap"))
    for change in summary.payload:
        rows.append((f"{'picked up' if change.mass else 'put down'} at {change.t:.2f} s", _payload(change)))
    if np.isfinite(summary.carried):
        rows.append(("payload planned with", f"{summary.carried:.2f} kg at the end"))
    if np.isfinite(summary.clearance):
        rows.append(("least clearance", _mark(f"{summary.clearance * 1e3:.0f} mm", summary.clearance < 0)))
    return rows


def _payload(change: Change) -> str:
    """Return what picking up or putting down did to the tool."""
    figures = (change.before, change.peak, change.after)
    before, peak, after = (f"{figure * 1e3:.1f}" if np.isfinite(figure) else "?" for figure in figures)
    back = f"back in {change.recovery:.2f} s" if np.isfinite(change.recovery) else "not back"
    return _mark(f"error RMS {before} mm before, {peak} mm at most, {after} mm after 2 s; {back}", not change.recovery <= SPAN)


def _advice(summary: Summary) -> str:
    return (
        f"The planner cannot keep its rate here: {summary.late} of {summary.plans} plans were late. Fewer samples "
        "(--planner.samples), a shorter horizon (--planner.horizon) or a lower rate (--loop.rate) help; --lockstep shows "
        "what the controller does on a machine that is fast enough."
    )


def _mark(text: str, bad: bool) -> str:
    return f"[bold yellow]{text}[/]" if bad else text
