"""Closed-loop quality of the Panda's scenarios at 500 replans a second, in lockstep."""

from __future__ import annotations

from typing import Any

from _common import Say, run_all
from quality import scenario_rows

SCENARIOS = ("panda_reach_sim", "panda_track_sim", "panda_avoid_sim")
RATE = 500.0


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return each scenario's figures over ten seeds (quick: two)."""
    seeds = 2 if quick else 10
    changes = {"loop": {"rate": RATE}, "dynamics": {"backend": "kernel"}}
    results = run_all([(name, seed, changes) for name in SCENARIOS for seed in range(seeds)], say)
    out = []
    for i, name in enumerate(SCENARIOS):
        out += scenario_rows(name, results[i * seeds : (i + 1) * seeds])
    return out
