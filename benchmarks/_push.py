"""Pushing a box: runs that give data, and runs that are judged; imported by the processes that do them."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Say, row
from _residual import learned
from _runs import Job, gathered, logged

from mbctrl.dynamics.load import load_model
from mbctrl.learning.recipe import load_learning_recipe
from mbctrl.learning.transitions import Transitions, concatenate, read_transitions, write_transitions

SCENARIO = "panda_push_sim"
REACHED = 0.01, np.radians(10.0)  # [m], [rad] at the end of a run


def wandering(rng: np.random.Generator) -> dict[str, Any]:
    """Return the changes of a run that gives data: a goal somewhere, a contact off by up to two, few samples or many."""
    off = 2.0 ** rng.uniform(-1, 1, 3)
    return {
        "goal": {
            "position": [0.5 + rng.uniform(-0.06, 0.02), -0.07 + rng.uniform(0.06, 0.18), 0.03],
            "yaw": rng.uniform(-0.2, 0.8),
        },
        "planner": {"samples": int(rng.choice([48, 128, 512]))},
        "dynamics": {"contact": {"stiffness": 1e4 * off[0], "damping": 67.0 * off[1], "friction": 0.3 * off[2]}},
        "backend": {"start_noise": 0.03},
        "duration": 2.0,
    }


def judged(job: Job) -> dict[str, float]:
    """Run, and return where the box ended off its goal, ``position`` [m] and ``rotation`` [rad], and the force's ``peak`` [N]."""
    _, log, _ = logged(job)
    return {
        "position": float(log["error.position"][-1]),
        "rotation": float(log["error.rotation"][-1]),
        "peak": float(log["contact.force"].max()),
    }


def success(result: dict[str, float]) -> bool:
    """Return whether the box is within 1 cm and 10 deg of its goal."""
    return result["position"] < REACHED[0] and result["rotation"] < REACHED[1]


def push_rows(pool: ProcessPoolExecutor, folder: Path, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return how often the box ends where it should, over ten seeds (quick: three), and how far ahead the residual sees the box.

    Models: physics for which the box never moves; with the contact of the shipped controller; a residual on top of the first,
    learned from runs that hold 4000 transitions in contact (quick: 500).
    """
    wanted, seeds, rng = (500, 3, np.random.default_rng(7)) if quick else (4000, 10, np.random.default_rng(7))
    parts: list[Transitions] = []
    while sum(int(part.contact.sum()) for part in parts) < wanted:
        parts += pool.map(gathered, [Job(SCENARIO, wandering(rng), seed=5000 + len(parts) + k) for k in range(4)])
        say(f"pushing: {len(parts)} runs")
    write_transitions(folder / "push.parquet", concatenate(parts))
    say("pushing: training")
    free = {"contact": {"stiffness": 0.0, "damping": 0.0}}
    file = folder / "push.npz"
    pool.submit(taught, folder / "push.parquet", file).result()
    models: dict[str, dict[str, Any]] = {"no contact": free, "contact": {}, "residual": {**free, "residual": str(file)}}
    out = []
    for name, dynamics in models.items():
        say(f"pushing with {name}")
        results = list(pool.map(judged, [Job(SCENARIO, {"dynamics": dynamics}, seed=11 + k) for k in range(seeds)]))
        bar = (">=", 8.0) if name == "residual" and not quick else ()
        off = 1e3 * float(np.median([result["position"] for result in results]))
        out += [
            row(f"pushing, {name}: seeds within 1 cm and 10 deg", sum(map(success, results)), f"of {seeds}", *bar),
            row(f"pushing, {name}: off at the end, median", off, "mm"),
            row(f"pushing, {name}: highest force, median", float(np.median([result["peak"] for result in results])), "N"),
        ]
    return out


def taught(data: Path, out: Path) -> None:
    """Train the residual on top of a box that never moves."""
    torch.set_num_threads(1)
    recipe, _ = load_learning_recipe("panda_push_learn")
    learned("gated", read_transitions(data), load_model(recipe.robot.name), recipe, 0).save(out)
