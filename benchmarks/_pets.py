"""One learning loop; imported by the processes that run them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from _runs import alone

from mbctrl.base.config import RunConfig, load_run
from mbctrl.base.logs import read_log
from mbctrl.cli.episodes import rewards
from mbctrl.cli.loops import Loop
from mbctrl.cli.session import Session
from mbctrl.dynamics.load import load_model
from mbctrl.learning.loops import load_loop

LAST = 100  # steps of a pendulum's trial that are judged


def learned(job: tuple[str, int, bool]) -> tuple[list[float], np.ndarray]:
    """Run a loop: a scenario, its seed, and whether angles are encoded.

    Return its trials' returns and how far from upright the last steps were [rad] (the pendulum).
    """
    torch.set_num_threads(1)
    name, seed, encode = job
    config, file = load_run(name)
    config = alone(config, seed)
    spec, recipe = load_loop(file, config)
    network = recipe.network.model_copy(update={"encode_angles": encode})
    recipe = recipe.model_copy(update={"network": network})
    with tempfile.TemporaryDirectory() as folder:
        trials = Loop(config, file, spec, recipe, Path(folder) / "out").run()
        log = read_log(Path(folder) / "out" / f"trial-{trials[-1].number:02d}" / "log.csv")
    angle = log["q"][-LAST:, -1]
    return [trial.reward for trial in trials], np.abs(angle % (2 * np.pi) - np.pi)


def driven(job: tuple[str, int, bool]) -> tuple[list[float], list[float]]:
    """Run a loop, or its trials with the true physics: a scenario, its seed, and whether it learns.

    Return of each trial, the random one first where it learns, its return and how far from its target the tool, or what it
    moves, was in the last second (median) [m].
    """
    torch.set_num_threads(1)
    name, seed, learns = job
    config, file = load_run(name)
    config = alone(config, seed)
    spec, recipe = load_loop(file, config)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if learns:
            trials = Loop(config, file, spec, recipe, out).run()
            return [trial.reward for trial in trials], [_off(out / f"trial-{trial.number:02d}") for trial in trials]
        model, totals, off = load_model(config.robot.name), [], []
        for number in range(1, spec.trials + 1):
            run: RunConfig = config.model_copy(update={"seed": seed + number})
            Session(run, file, lockstep=True, model=model).run(out / f"{number}")
            totals.append(float(rewards(run, model, read_log(out / f"{number}" / "log.csv"), spec.best).sum()))
            off.append(_off(out / f"{number}"))
    return totals, off


def _off(folder: Path) -> float:
    log = read_log(folder / "log.csv")
    return float(np.median(log["error.position"][log["t"] > log["t"][-1] - 1.0]))
