"""Calibration against known truth: simulated arms, excited as ``mbctrl excite`` says, with sensors as they are."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from _common import Say, row
from _recover import ROBOTS, motion_of, one_seed


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return coverage, friction, delay and payload errors over 100 seeds an arm (quick: 10)."""
    seeds = 10 if quick else 100
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes to come; there is one a core
    out = []
    for name in ROBOTS:
        say(f"{name}: excitation")
        motion = motion_of(name)
        say(f"{name}: {seeds} seeds")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            found = list(pool.map(one_seed, [(name, seed, motion) for seed in range(seeds)]))
        within = np.concatenate([one["within"] for one in found])
        whole = np.concatenate([one["covered"] for one in found])
        label = f"{name} ({seeds} seeds)"
        out += [
            row(f"{label}: base parameters within 3 standard errors", 100 * within.mean(), "%", ">=", 95.0),
            row(f"{label}: within their 95 % intervals", 100 * whole.mean(), "%"),
            row(f"{label}: friction at 0.5 rad/s, worst joint and seed", 100 * max(o["friction"] for o in found), "%", "<=", 2.0),
            row(
                f"{label}: Coulomb or viscous alone, median of worst", 100 * np.median([o["parts"] for o in found]), "%", "<=", 2.0
            ),
            row(f"{label}: Coulomb or viscous alone, worst joint and seed", 100 * max(o["parts"] for o in found), "%"),
            row(f"{label}: delay, worst error", 1e3 * max(o["delay"] for o in found), "ms", "<=", 1.0),
            row(f"{label}: links that could not exist", sum(o["impossible"] for o in found), "links", "<=", 0),
            row(f"{label}: payload of 2 kg, median error", 100 * np.median([o["payload"] for o in found]), "%"),
            row(f"{label}: payload of 2 kg, worst seed", 100 * max(o["payload"] for o in found), "%", "<=", 1.0),
        ]
    return out
