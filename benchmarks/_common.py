"""What benchmarks share: rows, medians, and runs of scenarios in lockstep."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


def row(name: str, value: float, unit: str, op: str | None = None, bar: float | None = None) -> dict[str, Any]:
    """Return one figure; ``bar`` is the acceptance figure it is held against with ``op``."""
    return {"name": name, "value": float(value), "unit": unit, "bar": bar, "op": op}


def median_time(call: Callable[[], Any], repeat: int = 15) -> float:
    """Return the median wall time of ``call`` [s], after two calls to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _one(job: tuple[str, int, dict[str, Any]]):
    """Run one scenario in lockstep with one thread; return its Summary."""
    import torch

    from mbctrl.base.config import RunConfig, load_run, merged
    from mbctrl.cli.session import Session

    torch.set_num_threads(1)
    name, seed, changes = job
    config, file = load_run(name)
    over = merged({"seed": seed, "dynamics": {"threads": 1}}, changes)
    config = RunConfig.model_validate(merged(config.model_dump(), over))
    with tempfile.TemporaryDirectory() as folder:
        return Session(config, file, lockstep=True).run(Path(folder) / "run")


def run_all(jobs: list[tuple[str, int, dict[str, Any]]], say: Say) -> list[Any]:
    """Run (scenario, seed, changes) jobs in lockstep, a process a core; return their summaries in order."""
    results = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for done, summary in enumerate(pool.map(_one, jobs), 1):
            results.append(summary)
            name, seed, _ = jobs[done - 1]
            figure = f"return {summary.reward:.0f}" if summary.reward is not None else f"{len(summary.reached)} targets reached"
            say(f"{done} of {len(jobs)} runs, last: {name} seed {seed}, {figure}, {len(summary.violations)} limits exceeded")
    return results
