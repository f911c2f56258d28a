"""A scenario in lockstep, with how well the arm keeps to its plans."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

AHEAD = 0.1  # [s], several plans later: a plan in force starts from the measured state, so it is hardly ever wrong yet


def tracked(job: tuple[str, int, dict[str, Any]]) -> tuple[Any, float]:
    """Run (scenario, seed, changes) with one thread; return its Summary and its prediction error.

    That is the RMS over time and joints [rad] of where the arm is less where its plan had it 0.1 s before.
    """
    import torch

    from mbctrl.base.config import RunConfig, load_run, merged
    from mbctrl.base.logs import read_log
    from mbctrl.cli.session import Session

    torch.set_num_threads(1)
    name, seed, changes = job
    config, file = load_run(name)
    over = merged({"seed": seed, "dynamics": {"threads": 1}}, changes)
    config = RunConfig.model_validate(merged(config.model_dump(), over))
    planned: list[tuple[float, np.ndarray]] = []

    def watch(live: Any) -> None:
        if live.plan is not None:
            planned.append((live.t + AHEAD, live.plan.state(live.t + AHEAD)[: len(live.q)]))

    with tempfile.TemporaryDirectory() as folder:
        summary = Session(config, file, lockstep=True, watch=watch).run(Path(folder) / "run")
        log = read_log(Path(folder) / "run" / "log.csv")
    t, q, logged = log["t"], log["q"], [(when, where) for when, where in planned if when <= log["t"][-1]]
    error = [where - q[min(np.searchsorted(t, when - 1e-6), len(q) - 1)] for when, where in logged]
    return summary, float(np.sqrt(np.mean(np.square(error))))
