"""Wiping a table that becomes another one in the midst of it; imported by the processes that do it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _runs import DT
from _wipe import SCENARIO, circle, wandering

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.logs import Log, read_log
from mbctrl.cli.session import Live, Session
from mbctrl.learning.runs import from_run, source_of
from mbctrl.learning.transitions import Transitions

CHANGE = 7.0  # [s] when the table becomes another one: after one turn
SURFACES: dict[str, dict[str, float]] = {
    "as before": {},
    "pad": {"softer": 0.1},
    "dry": {"friction": 1.2},
    "oily": {"friction": 0.1},
    "stiffer spring": {"spring": 3000.0},
    "1 kg in the grip": {"payload": 1.0},
}
"""What is true and not believed: the pair's stiffness times that, its friction (0.5), the table's spring (2000 N/m)."""


@dataclass(frozen=True)
class Wipe:
    """One run on a surface: one of those that give data, or, with a ``model``, one that is judged and ``adapt``s."""

    surface: str
    seed: int
    model: Path | None = None
    adapt: dict[str, Any] | None = None


def alter(session: Session, surface: str) -> None:
    """Make the simulated table another one."""
    mj, truth = session.driver.model, SURFACES[surface]
    if "softer" in truth:
        k, d = mj.pair_solref[0]
        mj.pair_solref[0] = k * truth["softer"], d * truth["softer"] ** 0.5
    if "friction" in truth:
        mj.pair_friction[0][:2] = truth["friction"]
    if "spring" in truth:
        table = mj.joint("table").id
        mj.jnt_stiffness[table] = truth["spring"]
        mj.qpos_spring[mj.jnt_qposadr[table]] = float(mj.body("table").mass[0]) * 9.81 / truth["spring"]  # it stands where it stood


def gathered(wipe: Wipe) -> Transitions:
    """Return the transitions of a run that gives data, on the surface from its beginning."""
    change = wandering(np.random.default_rng((wipe.seed, 1)), (-0.12, 0.12))
    change["planner"]["samples"] = min(256, change["planner"]["samples"])
    softer = SURFACES[wipe.surface].get("softer", 1.0)
    contact = change["dynamics"]["contact"]
    contact.update(stiffness=contact["stiffness"] * softer, damping=contact["damping"] * softer**0.5)
    with tempfile.TemporaryDirectory() as folder:
        session = _session(wipe, change)
        alter(session, wipe.surface)
        session.run(Path(folder) / "run")
        model = session.model
        return from_run(Path(folder) / "run" / "log.csv", source_of(model.robot, model.tree.revolute, DT))


def judged(wipe: Wipe) -> dict[str, float]:
    """Run two turns, the second on the surface; return costs before and after the change, and force errors RMS [N] after it.

    The cost is the mean of (path error / 1 cm)² + (force error / 5 N)²; ``late``: from 1.5 s after the change on.
    """
    change: dict[str, Any] = {**circle(), "duration": CHANGE + 4.0, "adapt": wipe.adapt}
    change["dynamics"] = {"residual": str(wipe.model), "contact": {"stiffness": 0.0, "damping": 0.0}}
    if "payload" in SURFACES[wipe.surface]:
        change["backend"] = {"payload": {"mass": SURFACES[wipe.surface]["payload"], "at": [CHANGE]}}
    changed: list[float] = []

    def watch(live: Live) -> None:
        if live.t >= CHANGE and not changed:
            changed.append(live.t)
            alter(session, wipe.surface)

    session = _session(wipe, change, watch)
    with tempfile.TemporaryDirectory() as folder:
        session.run(Path(folder) / "run")
        log, plans = (read_log(Path(folder) / "run" / name) for name in ("log.csv", "plans.csv"))
    out = {"before": _cost(log, CHANGE - 4.0, CHANGE)[0], "plan": float(np.mean(plans["cpu"]))}
    for name, start in (("turn", CHANGE), ("late", CHANGE + 1.5)):
        out[name], out[f"{name} force"] = _cost(log, start, CHANGE + 4.0)
    return out


def _cost(log: Log, start: float, end: float) -> tuple[float, float]:
    chosen = (log["t"] >= start) & (log["t"] < end)
    off = np.linalg.norm(log["tcp"][:, :2] - log["target"][:, :2], axis=1)[chosen]
    error = log["contact.force"][chosen] - 15.0
    return float(np.mean((off / 0.01) ** 2 + (error / 5.0) ** 2)), float(np.sqrt(np.mean(error**2)))


def _session(wipe: Wipe, change: dict[str, Any], watch: Any = None) -> Session:
    torch.set_num_threads(1)
    config, file = load_run(SCENARIO)
    over = merged({"seed": wipe.seed, "dynamics": {"threads": 1}}, change)
    return Session(RunConfig.model_validate(merged(config.model_dump(), over)), file, lockstep=True, watch=watch)
