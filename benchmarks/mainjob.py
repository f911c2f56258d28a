"""The main job's acceptance figures: dynamics errors, closed-loop quality over seeds, and what latency costs."""

from __future__ import annotations

from typing import Any

import dynamics
import quality
from _common import Say, row, run_all

from mbctrl.base.find import names


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return every figure (quick: two seeds instead of ten)."""
    out = []
    for name in [*names("robots"), "dm_control:jaco_arm"]:
        say(f"dynamics of {name}")
        out += dynamics.error_rows(name)
    return out + latency_rows(quick, say) + quality.rows(quick, say)


def latency_rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return panda_track_sim's error with 50 ms of planning latency, predicted and ignored, over the error at zero."""
    seeds = 1 if quick else 3
    variants = {
        "latency 0 ms": {"latency": 0.0},
        "latency 50 ms, predicted": {"latency": 0.05},
        "latency 50 ms, ignored": {"latency": 0.05, "predict": False},
    }
    # The same replanning rate for all: with 50 ms of latency no more than 20 Hz is possible.
    jobs = [("panda_track_sim", seed, {"loop": {**loop, "rate": 20.0}}) for loop in variants.values() for seed in range(seeds)]
    results = run_all(jobs, say)
    means = {}
    for i, name in enumerate(variants):
        means[name] = sum(run.tracking_rms for run in results[i * seeds : (i + 1) * seeds]) / seeds
    base = means["latency 0 ms"]
    out = [row(f"panda_track at 20 Hz, {name}", rms * 1e3, "mm") for name, rms in means.items()]
    out.append(row("panda_track, 50 ms predicted over 0 ms", means["latency 50 ms, predicted"] / base, "x", "<=", 1.1))
    out.append(row("panda_track, 50 ms ignored over 0 ms", means["latency 50 ms, ignored"] / base, "x"))
    return out
