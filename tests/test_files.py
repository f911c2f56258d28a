"""Every file of the declarative folders loads, agrees with the rest and steps."""

from __future__ import annotations

import numpy as np
import pytest

from mbctrl.base.config import load_controller, load_run
from mbctrl.base.find import names
from mbctrl.base.plan import PlanRequest
from mbctrl.base.spec import import_name
from mbctrl.cli.build import build_controller, check_goal, load_run_model
from mbctrl.cli.session import Session
from mbctrl.planning.rules import RULES
from mbctrl.planning.rules.base import Rule


@pytest.mark.parametrize("name", names("controllers"))
def test_controller_names_its_rule_first(name):
    first = names("controllers")[name].read_text().splitlines()[0]
    key, _, value = first.partition(": ")
    assert key == "rule" and issubclass(import_name(value, RULES), Rule)
    assert load_controller(name).rule == value


@pytest.mark.parametrize("name", names("launch"))
def test_scenario_plans_and_steps(name, tmp_path):
    config, file = load_run(name)
    model = load_run_model(config, file)
    check_goal(config, model, file)
    short = config.model_copy(update={"duration": 0.1})
    still = tuple((np.asarray(obstacle.position, float), np.zeros(3)) for obstacle in config.obstacles)
    target = (np.zeros(3), None) if config.goal.kind == "backend" else None
    x = np.concatenate([model.robot.home, np.zeros(model.robot.nq)])
    plan = build_controller(short, file, model).plan(PlanRequest(0.0, x, target=target, obstacles=still))
    assert np.isfinite(plan.u).all() and np.isfinite(plan.x).all() and plan.info["nonfinite"] == 0
    summary = Session(short, file, lockstep=True, model=model).run(tmp_path / "run")
    assert summary.ticks >= 2 and not summary.violations
