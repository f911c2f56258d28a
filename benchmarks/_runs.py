"""Runs in lockstep that give data or are judged; imported by the processes that do them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.logs import Log, read_log
from mbctrl.cli.session import Session
from mbctrl.learning.runs import from_run, source_of
from mbctrl.learning.transitions import Transitions

DT = 0.02  # [s] the controllers' time step


@dataclass(frozen=True)
class Job:
    """One run of a ``scenario`` with ``changes`` and a ``seed``.

    ``spring`` [N/m] is what the simulated table truly rests on, where that is not what the planner's model says.
    """

    scenario: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    spring: float | None = None


def alone(config: RunConfig, seed: int) -> RunConfig:
    """Return a run with another seed, planned on one thread: there is a process a core."""
    return config.model_copy(update={"seed": seed, "dynamics": config.dynamics.model_copy(update={"threads": 1})})


def logged(job: Job) -> tuple[Session, Log, Log]:
    """Run with one thread; return what ran, its log and its plans."""
    with tempfile.TemporaryDirectory() as folder:
        session = _run(job, Path(folder) / "run")
        return session, *(read_log(Path(folder) / "run" / name) for name in ("log.csv", "plans.csv"))


def gathered(job: Job) -> Transitions:
    """Run, and return the transitions of the log."""
    with tempfile.TemporaryDirectory() as folder:
        model = _run(job, Path(folder) / "run").model
        return from_run(Path(folder) / "run" / "log.csv", source_of(model.robot, model.tree.revolute, DT))


def _run(job: Job, folder: Path) -> Session:
    torch.set_num_threads(1)
    config, file = load_run(job.scenario)
    over = merged({"seed": job.seed, "dynamics": {"threads": 1}}, job.changes)
    session = Session(RunConfig.model_validate(merged(config.model_dump(), over)), file, lockstep=True)
    if job.spring is not None:
        mj = session.driver.model  # the simulated arm's own
        table = mj.joint("table").id
        mj.jnt_stiffness[table] = job.spring
        mj.qpos_spring[mj.jnt_qposadr[table]] = float(mj.body("table").mass[0]) * 9.81 / job.spring  # it stands where it stood
    session.run(folder)
    return session
