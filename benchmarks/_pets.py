"""One learning loop; imported by the processes that run them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from mbctrl.base.config import load_run
from mbctrl.base.logs import read_log
from mbctrl.cli.loops import Loop
from mbctrl.learning.loops import load_loop

LAST = 100  # steps of a pendulum's trial that are judged


def learned(job: tuple[str, int, bool]) -> tuple[list[float], np.ndarray]:
    """Run a loop: a scenario, its seed, and whether angles are encoded.

    Return its trials' returns and how far from upright the last steps were [rad] (the pendulum).
    """
    torch.set_num_threads(1)
    name, seed, encode = job
    config, file = load_run(name)
    dynamics = config.dynamics.model_copy(update={"threads": 1})
    config = config.model_copy(update={"seed": seed, "dynamics": dynamics})
    spec, recipe = load_loop(file, config)
    network = recipe.network.model_copy(update={"encode_angles": encode})
    recipe = recipe.model_copy(update={"network": network})
    with tempfile.TemporaryDirectory() as folder:
        trials = Loop(config, file, spec, recipe, Path(folder) / "out").run()
        log = read_log(Path(folder) / "out" / f"trial-{trials[-1].number:02d}" / "log.csv")
    angle = log["q"][-LAST:, -1]
    return [trial.reward for trial in trials], np.abs(angle % (2 * np.pi) - np.pi)
