"""dm_control tasks planned through the simulator, and through a model learned from nothing in 1, 5 and 20 thousand steps."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from _common import Say, row
from _dmc import EPISODES, Job, played


class Known(NamedTuple):
    """What others reach on a task: an accurate model with a small CEM, one seed or two, and TD-MPC2 after 100,000 and 1,000,000
    steps (Hansen et al., "TD-MPC2: Scalable, robust world models for continuous control", 2024)."""

    oracle: str
    early: int
    late: int


TASKS = {
    "pendulum_swingup": Known("932, 942", 724, 819),
    "reacher_hard": Known("967, 983", 414, 981),
    "acrobot_swingup": Known("578", 179, 518),
    "cartpole_swingup": Known("812", 839, 876),
    "finger_turn_hard": Known("990", 484, 975),
    "ball_in_cup_catch": Known("998", 981, 986),
}
QUICK = ("pendulum_swingup", "reacher_hard", "cartpole_swingup")
BUDGETS = (1000, 5000, 20000)  # steps of the model; each is learned from in every scenario here


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return each task's returns over two seeds (quick: three tasks, one seed, up to 5000 steps)."""
    tasks, seeds = (QUICK, 1) if quick else (tuple(TASKS), 2)
    budgets = [steps for steps in BUDGETS if not quick or steps <= 5000]
    last = max(budgets)
    jobs: list[Job] = [(f"{task}_sim", seed, steps) for steps in (last, None) for task in tasks for seed in range(seeds)]
    found: dict[Job, Any] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(played, job): job for job in jobs}
        for future in as_completed(waiting):
            job = waiting[future]
            found[job] = future.result()
            what = "planned through the simulator" if job[2] is None else f"learned from {job[2]} steps"
            say(f"{len(found)} of {len(jobs)} runs, last: {job[0]} seed {job[1]}, {what}")
    out = []
    for task in tasks:
        ceiling, loops = ([found[f"{task}_sim", seed, steps] for seed in range(seeds)] for steps in (None, last))
        out += task_rows(task, ceiling, loops, budgets)
    return out


def task_rows(task: str, ceiling: list[float], loops: list[list[tuple[int, float]]], budgets: list[int]) -> list[dict[str, Any]]:
    """Return the returns of a task, means over its seeds, and what share of the simulator's return a learned model keeps."""
    known, best = TASKS[task], float(np.mean(ceiling))
    label = f"{task} ({len(ceiling)} seed{'s' * (len(ceiling) > 1)})"
    out = [row(f"{label}: planned through the simulator (elsewhere: {known.oracle})", best, "of 1000")]
    for steps in budgets:
        earned = float(np.mean([_after(trials, steps) for trials in loops]))
        beside = f" (TD-MPC2 at 100k: {known.early}, at 1M: {known.late})"
        out.append(row(f"{label}: learned, {steps} steps of 0.04 s{beside}", earned, "of 1000"))
        out.append(row(f"{label}: share of the simulator's, {steps} steps", earned / best, "1"))
    return out


def _after(trials: list[tuple[int, float]], steps: int) -> float:
    """Return the mean return of the first episodes planned with what so many steps taught."""
    return float(np.mean([earned for before, earned in trials if before >= steps][:EPISODES]))
