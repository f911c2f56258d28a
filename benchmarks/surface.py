"""A table that becomes another one in the midst of a wipe: with the model learnt on the first, with its last layer refitted, with
models of other tables at hand, with both, and with the model learnt on the other table from the beginning."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row
from _residual import learned
from _surface import SURFACES, Wipe, gathered, judged

from mbctrl.dynamics.load import load_model
from mbctrl.learning.recipe import load_learning_recipe
from mbctrl.learning.transitions import concatenate

RECIPE, RUNS = "panda_wipe_learn", {"as before": 16, "pad": 8, "dry": 8}
"""Runs of 250 transitions that a model is learnt from."""
FIRST = 10  # seed of the runs that are judged


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return costs and force errors over three seeds (quick: one), medians."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come; there is one a core
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        models = {}
        for surface, runs in RUNS.items():
            say(f"runs on the table {surface}")
            parts = list(pool.map(gathered, [Wipe(surface, 100 + k) for k in range(runs)]))
            recipe, _ = load_learning_recipe(RECIPE)
            models[surface] = Path(name) / f"{surface.replace(' ', '-')}.npz"
            say(f"learning the table {surface}")
            learned("gated", concatenate(parts), load_model(recipe.robot.name), recipe, 0).save(models[surface])
        return _driven(pool, models, 1 if quick else 3, say)


def _driven(pool: ProcessPoolExecutor, models: dict[str, Path], seeds: int, say: Say) -> list[dict[str, Any]]:
    own, others = models["as before"], [str(path) for surface, path in models.items() if surface != "as before"]
    ways: dict[str, dict[str, Any] | None] = {
        "as learnt": None,
        "last layer": {"kind": "model", "last_layer": True},
        "models at hand": {"kind": "model", "models": others},
        "both": {"kind": "model", "last_layer": True, "models": others},
    }
    jobs = {}
    for surface in SURFACES:
        for seed in range(FIRST, FIRST + seeds):
            for way, adapt in ways.items():
                jobs[surface, way, seed] = Wipe(surface, seed, own, adapt)
            if surface in models and models[surface] != own:
                jobs[surface, "its own model", seed] = Wipe(surface, seed, models[surface])
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for key, result in zip(jobs, pool.map(judged, jobs.values())):
        found[key] = result
        say(f"{len(found)} of {len(jobs)} wipes, last: {', '.join(map(str, key))}: cost {result['turn']:.3f}")
    out = []
    for surface, way in dict.fromkeys((surface, way) for surface, way, _ in found):
        same = [found[surface, way, seed] for seed in range(FIRST, FIRST + seeds)]
        for key, what, unit in (
            ("turn", "cost of the turn after", ""),
            ("late", "cost from 1.5 s after on", ""),
            ("late force", "force error from 1.5 s after on, RMS", "N"),
            ("before", "cost of the turn before", ""),
        ):
            if key != "before" or surface == "as before":
                out.append(row(f"{surface}, {way}: {what}", float(np.median([one[key] for one in same])), unit))
    for way in ways:
        cpu = np.median([one["plan"] for (_, of, _), one in found.items() if of == way])
        out.append(row(f"CPU time a plan, {way}, mean", 1e3 * float(cpu), "ms"))
    return out
