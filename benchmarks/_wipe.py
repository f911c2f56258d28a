"""Wiping a table: runs that give data, and runs that are judged; imported by the processes that do them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from _runs import DT, Job, logged

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.plan import PlanRequest
from mbctrl.cli.build import build_controller, load_run_model

SCENARIO = "panda_wipe_sim"
TABLE = (0.5, 0.25)  # [m] where its middle is, and its height
WIDE = [0.03, 0.03, 0.03, 0.03, 0.05, 0.05, 0.05]
"""How widely runs that give data explore [rad]: twice as widely as the controller."""
PLAN = {"planner": {"samples": 512, "horizon": 0.32}}
"""The plan that is timed: 16 steps."""
PRESSED = (-0.027, -0.039, -0.087, -2.366, -0.026, 2.373, 0.690, -0.0074)  # [rad], [m] on the table in mid-circle, with 15 N


def wandering(rng: np.random.Generator, sides: tuple[float, float]) -> dict[str, Any]:
    """Return the changes of a run that gives data: a circle somewhere, pressed on somehow, planned with a contact off by up to a
    factor of two and with few samples or many, so that motions are of all kinds.

    Args:
        sides: least and most of the circle's centre along y [m]; its radius stays within 6 cm of it.
    """
    off = 2.0 ** rng.uniform(-1, 1, 3)
    return {
        "goal": {
            "center": [TABLE[0] + rng.uniform(-0.05, 0.05), rng.uniform(*sides), TABLE[1]],
            "radius": rng.uniform(0.02, 0.06),
            "period": rng.uniform(3.0, 6.0),
            "delay": rng.uniform(1.5, 3.0),
            "force": rng.uniform(5.0, 25.0),
        },
        "planner": {"samples": int(rng.choice([48, 128, 512])), "sigma": WIDE},
        "dynamics": {"contact": {"stiffness": 3e4 * off[0], "damping": 200.0 * off[1], "friction": 0.5 * off[2]}},
        "backend": {"start_noise": 0.1},
        "duration": 5.0,
    }


def circle(side: float = 0.0) -> dict[str, Any]:
    """Return the changes of a run that is judged: 12 cm wide, 15 N, 4 s a turn, its centre at y = ``side`` [m]."""
    goal = {"center": [TABLE[0], side, TABLE[1]], "radius": 0.06, "period": 4.0, "delay": 3.0, "force": 15.0}
    return {"goal": goal, "duration": 8.0}


def judged(job: Job) -> dict[str, float]:
    """Run, and return cost, force error RMS [N], force peak in the first second of contact [N], path error RMS [m], plan time [s].

    The cost is the mean over the turn of (path error / 1 cm)² + (force error / 5 N)².
    """
    session, log, plans = logged(job)
    goal, t, force = session.config.goal, log["t"], log["contact.force"]
    turn = (t >= goal.delay) & (t < goal.delay + goal.period)
    off = np.linalg.norm(log["tcp"][:, :2] - log["target"][:, :2], axis=1)[turn]
    error = force[turn] - goal.force
    touched = t[np.argmax(force > 0)] if (force > 0).any() else np.inf
    first = force[(t >= touched) & (t <= touched + 1.0)]
    return {
        "cost": float(np.mean((off / 0.01) ** 2 + (error / 5.0) ** 2)),
        "force": float(np.sqrt(np.mean(error**2))),
        "peak": float(first.max(initial=0.0)),
        "path": float(np.sqrt(np.mean(off**2))),
        "plan": float(np.median(plans["cpu"])),
    }


def planned(dynamics: dict[str, Any], pressed: bool, backend: str, plans: int = 40) -> float:
    """Return the median time of a plan [s] of 512 samples and 16 steps, on all cores.

    Args:
        dynamics: the model's.
        pressed: from a state on the table, pressed 7 mm down, where every gate is open; else from home, where none is.
        backend: ``kernel`` or ``torch``.
    """
    config, file = load_run(SCENARIO)
    change = merged({**circle(), **PLAN}, {"dynamics": {**dynamics, "backend": backend, "threads": 0}})
    config = RunConfig.model_validate(merged(config.model_dump(), change))
    model = load_run_model(config, file)
    controller = build_controller(config, file, model)
    x = np.concatenate([PRESSED if pressed else model.robot.home, np.zeros(model.robot.nq)])
    times = []
    for k in range(plans):
        start = time.perf_counter()
        controller.plan(PlanRequest(DT * k, x, goal=0, goal_time=DT * k))
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])
