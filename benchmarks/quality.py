"""Closed-loop quality of every shipped scenario over ten seeds, in lockstep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from _common import Say, row, run_all

SCENARIOS = (
    "panda_reach_sim",
    "panda_track_sim",
    "panda_avoid_sim",
    "ur10e_reach_sim",
    "arm2_swingup_sim",
    "cartpole_swingup_sim",
    "reacher_hard_sim",
)


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return each scenario's figures over ten seeds (quick: two)."""
    seeds = 2 if quick else 10
    jobs = [(name, seed, {}) for name in SCENARIOS for seed in range(seeds)]
    results = run_all(jobs, say)
    out = []
    for i, name in enumerate(SCENARIOS):
        out += scenario_rows(name, results[i * seeds : (i + 1) * seeds])
    return out


def scenario_rows(name: str, runs: list[Any]) -> list[dict[str, Any]]:
    """Return what ``runs`` of one scenario achieved, the worst of all seeds where a bar is every seed's."""
    label = f"{name.removesuffix('_sim')} ({len(runs)} seeds)"
    out = []
    if name.startswith(("cartpole", "reacher")):
        bar = 800 if name.startswith("cartpole") else 900
        returns = [run.reward for run in runs]
        return [
            row(f"{label}: return, median", float(np.median(returns)), "1", ">=", bar),
            row(f"{label}: return, least", min(returns), "1"),
        ]
    if name == "panda_track_sim":
        out.append(row(f"{label}: RMS after lap 1, worst", max(run.tracking_rms for run in runs) * 1e3, "mm", "<=", 10))
    else:
        targets = runs[0].targets
        out.append(row(f"{label}: targets reached, least", min(len(run.reached) for run in runs), f"of {targets}", ">=", targets))
        last = [run.reached[-1] if run.reached else math.inf for run in runs]
        out.append(row(f"{label}: time to the last, median", float(np.median(last)), "s"))
    if name in ("panda_reach_sim", "panda_avoid_sim", "ur10e_reach_sim"):
        errors = [error for run in runs for error in run.reach_errors]
        out.append(
            row(f"{label}: position error when held, worst", max(p for p, _ in errors) * 1e3 if errors else math.inf, "mm", "<=", 5)
        )
        out.append(
            row(
                f"{label}: rotation error when held, worst",
                math.degrees(max(r for _, r in errors)) if errors else math.inf,
                "deg",
                "<=",
                2,
            )
        )
    if name == "panda_avoid_sim":
        from mbctrl.base.config import load_run

        margin = load_run(name)[0].task["avoid"]["margin"]
        out.append(row(f"{label}: clearance, least", min(run.clearance for run in runs) * 1e3, "mm", ">=", margin * 1e3))
    out.append(row(f"{label}: seeds that exceed a limit", sum(bool(run.violations) for run in runs), "seeds", "<=", 0))
    out.append(
        row(f"{label}: largest share of a limit", max(share for run in runs for share, _ in run.limits.values()), "1", "<=", 1)
    )
    return out
