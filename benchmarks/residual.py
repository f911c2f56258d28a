"""Pressing and wiping with what was learnt: errors many steps ahead, intervals, and what planning with it costs.

A Panda wipes a table (``panda_wipe_sim``). Models, from the same transitions: the physics without any contact; with a contact
fitted; a fully learned one; a residual everywhere; one gated near the table, on top of no contact and of the fitted one; and the
physics with the simulated contact's own numbers, ``true``, which is the oracle here: as a planner's model MuJoCo itself does
worse with as many samples, because it is not smooth at 20 ms.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row
from _payload import payload_rows
from _push import push_rows
from _residual import LEARNED, Made, Training, made
from _runs import Job, gathered
from _wipe import SCENARIO, circle, judged, planned, wandering

from mbctrl.base.config import merged

RECIPE, RUNS, TESTS = "panda_wipe_learn", 66, 12
BUDGETS, SEEDS = (300, 1000, 4000, 16000), 3
DATA = {"in distribution": ("all", (-0.12, 0.12)), "unseen half": ("half", (-0.14, -0.06))}
"""Where a model is judged: the transitions it is made from, and where along y [m] they are."""
SETS: dict[str, tuple[tuple[float, float], dict[str, Any], float | None]] = {
    "in distribution": ((-0.12, 0.12), {}, None),
    "unseen half": ((0.06, 0.14), {}, None),
    "unseen spring": ((-0.12, 0.12), {}, 3000.0),
    "unseen payload": ((-0.12, 0.12), {"backend": {"payload": {"mass": 1.0, "at": [0.001]}}}, None),
}
"""What models are judged on: where along y [m], changes to the runs, and the spring under the table [N/m], half as stiff again as
believed; the payload [kg] is not the model's."""
SIDES = {"in distribution": 0.0, "unseen half": 0.08}
KINDS = ("contact", *LEARNED)


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return prediction errors, coverage and closed-loop figures over budgets and 3 seeds (quick: 4000 transitions, one seed)."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come; there is one a core
    budgets, seeds = ((4000,), 1) if quick else (BUDGETS, SEEDS)
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):
        folder = Path(name)
        tests = {label: folder / f"test{k}.parquet" for k, label in enumerate(SETS)}
        for k, (label, (sides, changes, spring)) in enumerate(SETS.items()):
            gather(pool, tests[label], wanderings(TESTS, sides, 100 + k, changes, spring), say)
        for k, (file, sides) in enumerate(DATA.values()):
            gather(pool, folder / f"{file}.parquet", wanderings(max(20, RUNS * max(budgets) // 16000), sides, k), say)
        models = trained(pool, folder, tests, budgets, seeds, say)
        out = predicted(models, seeds)
        out += driven(pool, models, budgets, seeds, quick, say)
        out += push_rows(pool, folder, quick, say)
        out += timed(models["in distribution", "gated", 4000, 0], say)
    return out + payload_rows(quick, say)


def wanderings(
    runs: int, sides: tuple[float, float], seed: int, changes: dict[str, Any] | None = None, spring: float | None = None
) -> list[Job]:
    """Return runs that give data, circles' centres between ``sides`` along y [m]."""
    rng = np.random.default_rng(seed)
    return [Job(SCENARIO, merged(wandering(rng, sides), changes or {}), 1000 * seed + k, spring) for k in range(runs)]


def gather(pool: ProcessPoolExecutor, path: Path, jobs: list[Job], say: Say) -> None:
    """Write the transitions of runs, an episode each."""
    from mbctrl.learning.transitions import concatenate, write_transitions

    parts = []
    for part in pool.map(gathered, jobs):
        parts.append(part)
        say(f"{path.stem}: {len(parts)} of {len(jobs)} runs")
    write_transitions(path, concatenate(parts))


def trained(
    pool: ProcessPoolExecutor, folder: Path, tests: dict[str, Path], budgets: tuple[int, ...], seeds: int, say: Say
) -> dict[tuple[str, str, int, int], Made]:
    """Return every model by data, kind, budget and seed; ``analytic`` and ``true`` need none of the last two."""
    jobs = {}
    for label, (file, _) in DATA.items():
        seen = {label: tests[label]} if label == "unseen half" else {k: v for k, v in tests.items() if k != "unseen half"}
        several = [(kind, budget, seed) for kind in KINDS for budget in budgets for seed in range(seeds)]
        for kind, budget, seed in [("analytic", 300, 0), ("true", 300, 0), *several]:
            out = folder / f"{file}-{kind.replace(' ', '-')}-{budget}-{seed}.npz"
            jobs[label, kind, budget, seed] = Training(RECIPE, SCENARIO, kind, folder / f"{file}.parquet", budget, seed, seen, out)
    models = {}
    for key, model in zip(jobs, pool.map(made, jobs.values())):
        models[key] = model
        say(f"{len(models)} of {len(jobs)} models, last: {', '.join(map(str, key))}")
    return models


def predicted(models: dict[tuple[str, str, int, int], Made], seeds: int) -> list[dict[str, Any]]:
    """Return medians over seeds of the tool's error, and how many velocities 90 % intervals hold."""
    out = []
    for (label, kind, budget, seed), model in models.items():
        if seed:
            continue
        same = [models[label, kind, budget, s] for s in range(seeds) if (label, kind, budget, s) in models]
        name = kind if kind in ("analytic", "true") else f"{kind}, {budget}"
        for test in model.errors:
            for stretch, steps in (("free", 25), ("impact", 25), ("in contact", 1), ("in contact", 25)):
                values = [one.errors[test][stretch, steps] for one in same]
                middle, high = (1e3 * float(np.median([value[k] for value in values])) for k in (0, 1))
                out.append(row(f"{test}: {name}: {steps} steps {stretch}, median", middle, "mm"))
                out.append(row(f"{test}: {name}: {steps} steps {stretch}, 95 %", high, "mm"))
            for group in model.covered.get(test, {}):
                inside = np.median([one.covered[test][group].mean() for one in same if group in one.covered[test]])
                out.append(row(f"{test}: {name}: 90 % intervals hold, {group}", 100 * inside, "%"))
    return out + ratios(models, seeds)


def ratios(models: dict[tuple[str, str, int, int], Made], seeds: int) -> list[dict[str, Any]]:
    """Return by how much a fully learned model is worse than the gated residual in contact."""
    out, label = [], "in distribution"
    for budget in sorted({key[2] for key in models if key[1] == "gated"}):
        full, gated = (
            np.median([models[label, kind, budget, s].errors[label]["in contact", 25][0] for s in range(seeds)])
            for kind in ("full", "gated")
        )
        bar = (">=", 2.0) if budget in (4000, 16000) else ()
        out.append(row(f"{label}, {budget}: error of full over gated, 25 steps in contact", full / gated, "x", *bar))
    return out


def timed(model: Made, say: Say) -> list[dict[str, Any]]:
    """Return the time of a plan with three networks 2 x 96, compiled and in torch, free and in contact."""
    out = []
    for backend in ("kernel", "torch"):
        for pressed in (False, True):
            say(f"a plan's time, {backend}")
            where = "in contact" if pressed else "free"
            bar = ("<=", 5.0) if backend == "kernel" else ()
            took = 1e3 * planned(model.dynamics, pressed, backend)
            out.append(row(f"plan of 512 x 16 with 3 networks 2 x 96, {where}, {backend}, all cores", took, "ms", *bar))
    return out


def driven(
    pool: ProcessPoolExecutor,
    models: dict[tuple[str, str, int, int], Made],
    budgets: tuple[int, ...],
    seeds: int,
    quick: bool,
    say: Say,
) -> list[dict[str, Any]]:
    """Return what wiping costs with each model; other budgets than 4000 with the first seed's models only."""
    jobs = {}
    for label, side in SIDES.items():
        for (data, kind, budget, seed), model in models.items():
            if data == label and (seed == 0 or budget == 4000):
                jobs[label, kind, budget, seed] = Job(SCENARIO, {**circle(side), "dynamics": model.dynamics}, seed=seed)
        for seed in range(seeds):  # the planner's own luck is the same for all models
            jobs[label, "true", 300, seed] = Job(SCENARIO, circle(side), seed)
        if not quick and label == "in distribution":
            few = {**circle(side), "planner": {"samples": 256}}
            jobs[label, "true, 256 samples", 300, 0] = Job(SCENARIO, few)
            jobs[label, "MuJoCo, 256 samples", 300, 0] = Job(SCENARIO, {**few, "dynamics": {"backend": "mujoco"}})
    found = {}
    for key, result in zip(jobs, pool.map(judged, jobs.values())):
        found[key] = result
        say(f"{len(found)} of {len(jobs)} wipes, last: {', '.join(map(str, key))}: cost {result['cost']:.3f}")
    out = []
    for (label, kind, budget, seed), _ in found.items():
        if seed == 0:
            same = [found[label, kind, budget, s] for s in range(seeds) if (label, kind, budget, s) in found]
            oracle = np.median([found[label, "true", 300, s]["cost"] for s in range(len(same))])
            out += wiped(label, kind, budget, same, float(oracle))
    return out


def wiped(label: str, kind: str, budget: int, same: list[dict[str, float]], oracle: float) -> list[dict[str, Any]]:
    """Return the figures of the runs with one kind of model: medians over seeds, the worst peak."""
    barred = budget == 4000 and kind in ("gated", "gated on fitted contact")
    name = f"{label}: wiping, {kind}" if budget == 300 and kind not in KINDS else f"{label}: wiping, {kind}, {budget}"
    cost, force, path, plan = (float(np.median([one[key] for one in same])) for key in ("cost", "force", "path", "plan"))
    peak = max(one["peak"] for one in same)
    return [
        row(f"{name}: cost", cost, ""),
        row(f"{name}: cost over the oracle's", cost / oracle, "x", *(("<=", 1.5) if barred else ())),
        row(f"{name}: force error, RMS", force, "N", *(("<=", 1.0) if barred else ())),
        row(f"{name}: peak at touch, worst seed", peak, "N", *(("<=", 20.0) if barred else ())),
        row(f"{name}: path error, RMS", 1e3 * path, "mm"),
        row(f"{name}: CPU time a plan", 1e3 * plan, "ms"),
    ]
