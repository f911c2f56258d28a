"""What wrong parameters cost: a UR10e heavier and stiffer to move than its model, planned for with and without knowing it."""

from __future__ import annotations

import math
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row
from _recover import calibrated
from _tracking import AHEAD, tracked

SCENARIO, ROBOT = "ur10e_reach_sim", "ur10e"
HEAVIER = 1.3  # mass and inertia of every link
FRICTION = (8.0, 8.0, 5.0, 2.0, 2.0, 2.0)  # Coulomb friction more than the model's [N·m]
VISCOUS = (8.0, 8.0, 5.0, 2.0, 2.0, 2.0)  # viscous friction more than the model's [N·m·s/rad]


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return the figures of each belief over three seeds (quick: one).

    The simulated arm is always the same; the planner and the arm's own gravity compensation go by the belief: the model's
    own parameters; what a calibration makes of a simulated log of the true arm, excited as ``mbctrl excite`` says; or the
    truth. $MBCTRL_FITTED adds a parameter file of yours.
    """
    seeds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.yaml"
        write_truth(path)
        say("calibrating from a simulated log")
        fitted = Path(folder) / "calibrated.yaml"
        calibrated(ROBOT, path, fitted)
        beliefs = {"nominal": None, "calibrated": str(fitted), "true": str(path)}
        if os.environ.get("MBCTRL_FITTED"):
            beliefs["your"] = os.environ["MBCTRL_FITTED"]
        jobs = [
            (SCENARIO, seed, {"robot": {"name": ROBOT, "parameters": belief}, "backend": {"parameters": str(path)}})
            for belief in beliefs.values()
            for seed in range(seeds)
        ]
        results = []
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for result in pool.map(tracked, jobs):
                results.append(result)
                say(f"{len(results)} of {len(jobs)} runs, {len(result[0].reached)} targets reached")
    out = []
    for i, name in enumerate(beliefs):
        out += belief_rows(f"{name} belief ({seeds} seed{'s' * (seeds > 1)})", results[i * seeds : (i + 1) * seeds])
    return out


def write_truth(path: Path) -> None:
    """Write the parameters of the arm that is simulated."""
    from mbctrl.base.parameters import FittedParameters, JointParameters, write_parameters
    from mbctrl.dynamics.load import load_model
    from mbctrl.dynamics.parameters import parameters_of

    model = load_model(ROBOT)
    joints = {}
    for (name, own), friction, viscous in zip(parameters_of(model.mj, model.tree, ROBOT).joints.items(), FRICTION, VISCOUS):
        joints[name] = JointParameters(
            mass=own.mass * HEAVIER,
            inertia=tuple(HEAVIER * value for value in own.inertia),
            friction=own.friction + friction,
            damping=own.damping + viscous,
        )
    write_parameters(path, FittedParameters(robot=ROBOT, joints=joints))


def belief_rows(label: str, results: list[tuple[Any, float]]) -> list[dict[str, Any]]:
    """Return what the runs with one belief achieved."""
    runs = [run for run, _ in results]
    last = [run.reached[-1] if len(run.reached) == run.targets else math.inf for run in runs]
    errors = [position for run in runs for position, _ in run.reach_errors]
    final = [run.position_error for run in runs]
    rms = math.sqrt(np.mean([error**2 for _, error in results]))
    return [
        row(f"{label}: targets reached, least", min(len(run.reached) for run in runs), f"of {runs[0].targets}"),
        row(f"{label}: time to the last, median", float(np.median(last)), "s"),
        row(f"{label}: position error when held, worst", max(errors, default=math.inf) * 1e3, "mm"),
        row(f"{label}: position error at the end, worst", max(final) * 1e3, "mm"),
        row(f"{label}: joints off the plan {AHEAD:g} s old, RMS", rms * 1e3, "mrad"),
    ]
