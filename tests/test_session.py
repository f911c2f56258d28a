"""The main job, end to end in lockstep: reach, track under latency, keep clear."""

from __future__ import annotations

import numpy as np
import pytest

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.logs import read_log
from mbctrl.cli.session import Session


def run(name, folder, **changes):
    config, file = load_run(name)
    config = RunConfig.model_validate(merged(config.model_dump(), changes))
    return Session(config, file, lockstep=True).run(folder)


def test_panda_reaches_a_pose_within_its_limits(tmp_path):
    summary = run("panda_reach_sim", tmp_path / "run", duration=3.5, seed=11)
    assert len(summary.reached) >= 1, f"errors {summary.position_error * 1e3:.1f} mm, {np.degrees(summary.rotation_error):.1f} deg"
    assert all(p <= 0.005 and r <= 0.035 for p, r in summary.reach_errors)
    assert not summary.violations
    log = read_log(tmp_path / "run" / "log.csv")
    assert np.nanmin(log["error.position"]) < 0.005


def test_prediction_removes_what_planning_latency_costs(tmp_path):
    short = {"duration": 3.5, "backend": {"start_noise": 0.0}}
    error = {}
    for name, loop in {
        "none": {"latency": 0.0},
        "predicted": {"latency": 0.05},
        "ignored": {"latency": 0.05, "predict": False},
    }.items():
        run("panda_track_sim", tmp_path / name, loop={**loop, "rate": 20.0}, **short)
        log = read_log(tmp_path / name / "log.csv")
        error[name] = float(np.sqrt(np.mean(log["error.position"][log["t"] > 1.5] ** 2)))
    assert error["predicted"] <= 1.1 * error["none"], error
    assert error["ignored"] >= 1.3 * error["none"], error


def test_panda_keeps_clear_of_the_ball(tmp_path):
    summary = run("panda_avoid_sim", tmp_path / "run", duration=3.0, seed=5)
    assert summary.clearance >= 0.03


@pytest.mark.parametrize("rule", ["predictive_sampling", "cem", "icem", "mppi"])
def test_every_rule_moves_the_arm_towards_its_target(rule, tmp_path):
    settings = {"ess": 0.03} if rule == "mppi" else {}
    config, file = load_run("panda_reach_sim")
    config = RunConfig.model_validate({**config.model_dump(), "duration": 1.0, "rule": rule, "settings": settings})
    Session(config, file, lockstep=True).run(tmp_path / "run")
    error = read_log(tmp_path / "run" / "log.csv")["error.position"]
    assert error[-1] < 0.8 * error[0], f"from {error[0] * 1e3:.0f} mm to {error[-1] * 1e3:.0f} mm"
