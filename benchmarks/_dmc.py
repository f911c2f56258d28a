"""One dm_control task, planned through the simulator or learned from nothing; imported by the processes that run them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _runs import alone

from mbctrl.base.config import load_run
from mbctrl.cli.loops import Loop
from mbctrl.cli.session import Session
from mbctrl.learning.loops import load_loop

Job = tuple[str, int, int | None]
"""A scenario, its seed, and steps of the model to learn from; None: an episode planned through the simulator."""
EPISODES = 2  # after each training, at least


def played(job: Job) -> float | list[tuple[int, float]]:
    """Return the episode's return, or for each trial the steps before it, random ones first, and its return."""
    torch.set_num_threads(1)
    name, seed, steps = job
    config, file = load_run(name)
    config = alone(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if steps is None:
            return float(Session(config, file, lockstep=True).run(out).reward)
        spec, recipe = load_loop(file, config)
        a_trial = int(config.duration / recipe.dt)
        trials = -(-(steps - spec.random) // a_trial) + EPISODES
        found = Loop(config, file, spec.model_copy(update={"trials": trials}), recipe, out).run()
        return [(spec.random + a_trial * (trial.number - 1), trial.reward) for trial in found[1:]]
