"""A payload that nobody tells of, picked up, put down and picked up again: the tool's error with and without adaptation."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row

SCENARIO = "panda_reach_payload_sim"
RECOVERED = 2.0
"""[s] in which tracking has to recover: the acceptance figure."""
_POSE = {"position": [0.5, 0.25, 0.4], "rpy": [3.14159265, 0.0, 0.0]}
_DOING = {"figure eight": None, "held pose": {"kind": "poses", "targets": [_POSE], "hold": 100.0}}


def payload_rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return the figures over five seeds (quick: two) of an arm that follows a figure eight, and of one that holds a pose.

    Errors are the tool's, RMS, medians over the seeds: over the 2 s before the pick-up, the largest over 0.2 s within 2 s
    after it, and from 2 s after it on. Recovery is when the error over 0.2 s is below 1.5 times the one before again; the
    worst seed's, infinite where one never was.
    """
    seeds = 2 if quick else 5
    kinds = [(doing, adapt) for doing in _DOING for adapt in (True, False)]
    jobs = [(doing, adapt, seed) for doing, adapt in kinds for seed in range(seeds)]
    found = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for job, changes in zip(jobs, pool.map(_changes, jobs)):
            found[job] = changes
            say(f"{len(found)} of {len(jobs)} runs, back in {', '.join(f'{change.recovery:.2f}' for change in changes)} s")
    out = []
    for doing, adapt in kinds:
        runs = [found[doing, adapt, seed] for seed in range(seeds)]
        name = f"{doing}, {'adapting' if adapt else 'not adapting'} ({seeds} seeds)"
        for what, field in (("before", "before"), ("just after", "peak"), ("2 s after", "after")):
            out.append(row(f"{name}: error {what}", 1e3 * np.median([getattr(run[0], field) for run in runs]), "mm"))
        for k, what in enumerate(("picked up", "put down", "picked up again") if adapt else ("picked up",)):
            times = [run[k].recovery for run in runs]
            worst = max(time if np.isfinite(time) else np.inf for time in times)
            bar = ("<=", RECOVERED) if adapt else (None, None)
            out.append(row(f"{name}: recovery, {what}", worst, "s", *bar))
    return out


def _changes(job: tuple[str, bool, int]) -> list[Any]:
    """Run once in lockstep with one thread; return what each change of the payload did."""
    import torch

    from mbctrl.base.config import RunConfig, load_run
    from mbctrl.base.logs import read_log
    from mbctrl.base.spec import validate
    from mbctrl.cli.session import Session
    from mbctrl.report.payload import payload_changes

    torch.set_num_threads(1)
    doing, adapt, seed = job
    config, file = load_run(SCENARIO)
    data = config.model_dump()
    data["seed"], data["dynamics"]["threads"], data["goal"] = seed, 1, _DOING[doing] or data["goal"]
    data["duration"], data["backend"]["payload"]["at"] = 14.0, [4.0, 8.0, 11.0]
    if not adapt:
        data |= {"adapt": None, "duration": 8.0}
    with tempfile.TemporaryDirectory() as folder:
        Session(validate(RunConfig, data), file, lockstep=True).run(Path(folder) / "run")
        return payload_changes(read_log(Path(folder) / "run" / "log.csv"))
