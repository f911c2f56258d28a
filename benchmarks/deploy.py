"""Exported planners: latency by engine, agreement with torch, cold starts, lateness of control, runs over real protocols."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row
from _deploy import SPAWN, Deployed, cold_start, deployed, export_command, judged, planned, size, supervisor_memory, without_cache
from _planners import Exported, exported, latency_rows, measured, on_engine, parity_rows, resolved, write_ensemble
from quality import scenario_rows

from mbctrl.base.config import merged
from mbctrl.base.errors import MbctrlError
from mbctrl.runtime.bundle import Bundle

SCENARIO = "panda_reach_sim"
ACCEPTANCE: tuple[str, dict[str, Any]] = (SCENARIO, {"planner": {"samples": 512}, "steps": 16})
"""The planner the issue's latencies are of: 512 samples, 16 steps, and the ensemble below."""
ENSEMBLE = (4, (32, 32))
"""Networks of the residual, and the units of their hidden layers."""
PARITY: dict[str, tuple[str, dict[str, Any]]] = {
    "panda_reach": (SCENARIO, {}),
    "ur10e_reach": ("ur10e_reach_sim", {}),
    "panda_reach, CEM": (SCENARIO, {"rule": "cem", "settings": {"elites": 64}}),
    "panda_avoid": ("panda_avoid_sim", {}),
    "panda_track": ("panda_track_sim", {}),
    "arm2_swingup": ("arm2_swingup_sim", {}),
}
"""Every controller with a graph (not those that plan with MuJoCo), and one with elites."""
REAL = (("ur", "ur10e_reach_sim"), ("franka", SCENARIO))
JITTER = (("ur10e_reach_sim", 500), (SCENARIO, 1000))
CORES = os.cpu_count() or 1


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return every figure.

    Quick: one size, no torch.compile, three planners and 20 cases of parity, runs of 10 to 15 s, one seed.
    """
    with tempfile.TemporaryDirectory() as base:
        bundles = _Bundles(Path(base), say)
        out = _export_rows(bundles)
        out += _latency_rows(bundles, quick, say)
        out += _acceptance_rows(bundles, quick, say)
        out += _parity_rows(bundles, quick, say)
        out += _start_rows(bundles(SCENARIO).bundle, say)
        out += _jitter_rows(bundles, quick, say)
        out += _real_rows(bundles, quick, say)
        return out + _quality_rows(bundles, quick, say)


class _Bundles:
    """Exports each planner once."""

    def __init__(self, base: Path, say: Say) -> None:
        self.base, self._say = base, say
        self._made: dict[str, Exported] = {}

    def folder(self, name: str, changes: dict[str, Any] | None = None) -> Path:
        """Return the folder of a planner's bundle, which may not be there yet."""
        config = resolved(name, changes or {})[0].model_dump_json()
        return self.base / f"{name}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"

    def __call__(self, name: str, changes: dict[str, Any] | None = None) -> Exported:
        """Return a scenario's planner with ``changes``, exported."""
        folder = self.folder(name, changes)
        if folder.name not in self._made:
            if not folder.exists():
                self._say(f"exporting {name}{f', {changes}' if changes else ''}")
            self._made[folder.name] = exported(name, changes or {}, folder)
        return self._made[folder.name]


def _export_rows(bundles: _Bundles) -> list[dict[str, Any]]:
    bundles._say(f"mbctrl export {SCENARIO}")
    folder = bundles.folder(SCENARIO)
    seconds = export_command(SCENARIO, [], folder)
    return [
        row(f"{_short(SCENARIO)}: export, the whole command", seconds, "s", "<=", 60),
        row(f"{_short(SCENARIO)}: bundle", size(folder), "MB", "<=", 2),
    ]


def _latency_rows(bundles: _Bundles, quick: bool, say: Say) -> list[dict[str, Any]]:
    out = []
    for samples in (1024,) if quick else (256, 1024, 4096):
        of = bundles(SCENARIO, {"planner": {"samples": samples}})
        out += latency_rows(f"{_short(SCENARIO)}, N = {samples}", of, quick, say)
    return out


def _acceptance_rows(bundles: _Bundles, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return one iteration of the issue's planner, with its ensemble and for comparison without, and their agreement with torch."""
    name, changes = ACCEPTANCE
    path, out = bundles.base / "ensemble.npz", []
    write_ensemble(path, name, *ENSEMBLE)
    networks, hidden = ENSEMBLE
    learnt = merged(changes, {"dynamics": {"residual": str(path)}})
    for what, given, bars in (("no residual", changes, (None, None)), (f"{networks} networks of {hidden}", learnt, (30, 3))):
        of = bundles(name, given)
        label = f"iteration N = {of.config.planner.samples}, H = {of.bundle.manifest['knots']['steps']}, {what}"
        engines = (("onnxruntime CPU, one thread", "onnx"), ("the kernel engine, one thread", "kernel"))
        for (engine, key), bar in zip(engines, bars):
            say(f"{label}, {engine}")
            used = measured(on_engine(of.bundle, key), quick) * 1e3
            out.append(row(f"{label}, {engine}: p50", np.median(used), "ms", bar and "<=", bar))
            out.append(row(f"{label}, {engine}: p99", np.percentile(used, 99), "ms"))
        out.append(row(f"{label}: bundle", size(of.bundle.folder), "MB", "<=", 2))
    return out + parity_rows(label, of, 20 if quick else 100)


def _parity_rows(bundles: _Bundles, quick: bool, say: Say) -> list[dict[str, Any]]:
    out = []
    for label, (name, changes) in list(PARITY.items())[: 3 if quick else None]:
        of = bundles(name, changes)
        say(f"parity of {label}")
        out += parity_rows(label, of, 20 if quick else 100)
    return out


def _start_rows(bundle: Bundle, say: Say) -> list[dict[str, Any]]:
    """Return cold starts of the planner alone, without torch and MuJoCo, and of a whole deployment over ``link``."""
    out, folder = [], bundle.folder
    cold_start(folder, "kernel")  # fills the cache
    starts = {
        "kernel": lambda: cold_start(folder, "kernel"),
        "kernel, nothing compiled yet": lambda: without_cache(folder, "kernel"),
        "onnxruntime CPU": lambda: cold_start(folder, "onnx"),
    }
    for engine, start in starts.items():
        say(f"cold start, {engine}")
        runs = [start() for _ in range(3)]
        best = min(runs, key=lambda run: run["import"] + run["load"] + run["build"])
        name = f"planner from nothing, {engine}"
        out.append(row(f"{name}: best of 3", best["import"] + best["load"] + best["build"], "s"))
        out += [row(f"{name}: of that, {part}", best[part], "s") for part in ("import", "load", "build")]
        out.append(row(f"{name}: resident", best["VmRSS"], "MiB"))
        out.append(row(f"{name}: resident at most", best["VmHWM"], "MiB"))
    out.append(row("supervisor: resident, mbctrl deploy's imports and the bundle", supervisor_memory(folder), "MiB", "<=", 120))
    for engine in ("kernel", "onnx"):
        say(f"import to armed, {engine}")
        run = _tried(lambda engine=engine: deployed(bundle, "link", 3.0, say, engine), say)
        armed = run.armed if run else math.nan
        out.append(row(f"deploy over link, {engine}: start to armed", armed, "s", "<", 2))
        for who in ("planner", "servo", "driver", "log"):
            held = run.held.get(who, math.nan) if run else math.nan
            out.append(row(f"deploy over link, {engine}: {who} process, resident", held, "MiB", "<", 120))
    return out


def _jitter_rows(bundles: _Bundles, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return how late control periods begin in the real runtime, planner, driver and simulated robot beside it."""
    out, duration = [], 10.0 if quick else 60.0
    for name, rate in JITTER:
        bundle = bundles(name).bundle
        assert bundle.robot.control.rate == rate
        for burners, load in ((0, "idle"), (CORES, f"{CORES} burners")):
            say(f"lateness at {rate} Hz, {load}, {duration:g} s")
            run = _tried(lambda: deployed(bundle, "link", duration, say, burners=burners), say)
            out += _lateness(f"{rate} Hz, {load}, {duration:g} s", run, rate == 500 and burners > 0, say)
    return out


def _lateness(label: str, run: Deployed | None, barred: bool, say: Say) -> list[dict[str, Any]]:
    late = run.summary["lateness"] * 1e3 if run else np.full(1, math.nan)
    notes = run.summary["notes"] if run else []
    for note in notes:
        say(f"{label}: {note}")
    permitted = not any("real-time priority" in note for note in notes)
    label = f"{label}, {'real-time' if permitted else 'default'} scheduling"
    bar = ("<=", 0.2) if barred and permitted else (None, None)
    missed, ticks = (run.summary["missed"], run.summary["ticks"]) if run else (math.nan, math.nan)
    return [
        row(f"{label}: periods missed", missed, f"of {ticks:g}"),
        row(f"{label}: late, p50", np.percentile(late, 50), "ms"),
        row(f"{label}: late, p99", np.percentile(late, 99), "ms", *bar),
        row(f"{label}: late, p99.9", np.percentile(late, 99.9), "ms"),
        *_ages(label, "command age at the robot", run.taken if run else np.zeros(0)),
    ]


def _real_rows(bundles: _Bundles, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return runs against simulated arms behind their vendors' own protocols and clients."""
    out, duration = [], 15.0 if quick else 60.0
    for protocol, name in REAL:
        bundle = bundles(name).bundle
        say(f"{duration:g} s over {protocol}")
        run = _tried(lambda: deployed(bundle, protocol, duration, say), say)
        out += _real(f"{bundle.robot.name} over {protocol}, {duration:g} s", run, bundle)
    return out


def _real(label: str, run: Deployed | None, bundle: Bundle) -> list[dict[str, Any]]:
    targets = len(bundle.config.goal.targets)
    if run is None:
        return [row(f"{label}: targets reached", 0, f"of {targets}", "==", targets)]
    s, (violations, halts) = run.summary, judged(run, bundle.robot)
    faults = sum(bool(fault) for *_, fault in s["changes"])
    out = [
        row(f"{label}: targets reached", len(s["reached"]), f"of {targets}", "==", targets),
        row(f"{label}: limit violations in the robot's log", violations, "1", "<=", 0),
        row(f"{label}: stops by the robot's own watchdog or protection", halts, "1", "<=", 0),
        row(f"{label}: faults on the ladder", faults, "1", "<=", 0),
        row(f"{label}: time to the last target", s["reached"][-1] if len(s["reached"]) == targets else math.inf, "s"),
        row(f"{label}: position error when held, worst", max((p for p, _ in s["errors"]), default=math.inf) * 1e3, "mm"),
        row(f"{label}: rotation error when held, worst", math.degrees(max((r for _, r in s["errors"]), default=math.inf)), "deg"),
        row(f"{label}: plan latency, p99", np.percentile(s["latencies"], 99) * 1e3 if len(s["latencies"]) else math.inf, "ms"),
        row(f"{label}: the server's own late periods", int((run.server.late > run.server.period).sum()), f"of {len(run.server.t)}"),
    ]
    return out + _ages(label, "age of a command's measurement at the start of its control period", run.sent)


def _ages(label: str, what: str, ages: np.ndarray) -> list[dict[str, Any]]:
    ages = ages if len(ages) else np.full(1, math.nan)
    return [row(f"{label}: {what}, p{p:g}", np.percentile(ages, p) * 1e3, "ms") for p in (50, 99, 99.9)]


def _quality_rows(bundles: _Bundles, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return what the closed loop achieves in lockstep with the exported planner and with the run's own."""
    engines, seeds, names = ("unexported", "kernel", "onnx"), 1 if quick else 10, (SCENARIO, "ur10e_reach_sim")
    jobs = [(name, seed, {}, engine, bundles(name).bundle.folder) for name in names for engine in engines for seed in range(seeds)]
    results = []
    with ProcessPoolExecutor(CORES, mp_context=SPAWN) as pool:
        for summary in pool.map(planned, jobs):
            results.append(summary)
            name, seed, _, engine, _ = jobs[len(results) - 1]
            say(f"{len(results)} of {len(jobs)} runs, last: {name} seed {seed}, {engine}, {len(summary.reached)} targets reached")
    out = []
    for k, (name, engine) in enumerate((name, engine) for name in names for engine in engines):
        made = scenario_rows(name, results[k * seeds : (k + 1) * seeds])
        out += [each | {"name": f"{engine} planner: {each['name']}"} for each in made]
    return out


def _tried(run: Callable[[], Deployed], say: Say) -> Deployed | None:
    """Return a run, or None after saying what kept it from running: the other figures are still worth having."""
    try:
        return run()
    except MbctrlError as error:
        say(str(error))
        return None


def _short(name: str) -> str:
    return name.removesuffix("_sim")
