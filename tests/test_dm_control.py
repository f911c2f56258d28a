"""dm_control's suite: its versions fit, it steps, and importing it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes.util import find_library
from importlib.metadata import version
from pathlib import Path

import mujoco
import numpy as np
import pytest

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import ExtraError
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.robot import load_robot
from mbctrl.base.spec import validate
from mbctrl.cli.session import Session
from mbctrl.dynamics.dm_control import import_dm_control
from mbctrl.dynamics.load import load_model
from mbctrl.runtime.clock import LockstepClock
from mbctrl.sim.suite import SuiteDriver

IMPORT = """
import os, sys, warnings
warnings.simplefilter("error")
from mbctrl.dynamics.dm_control import import_dm_control
before = dict(os.environ)
suite = import_dm_control("suite", "cartpole-swingup")
assert dict(os.environ) == before, "the environment changed"
suite.load("cartpole", "swingup").step(0.0)
"""


def test_mujoco_is_one_dm_control_works_with() -> None:
    found = version("mujoco")
    assert int(found.split(".")[0]) < 4, f"dm_control 1.0.50 needs the field flex_vertedge, which MuJoCo {found} does not have"
    assert mujoco.__version__ == found


def test_the_suite_loads_and_steps() -> None:
    environment = import_dm_control("suite", "cartpole-swingup").load("cartpole", "swingup", task_kwargs={"random": 0})
    environment.reset()
    steps = [environment.step(np.ones(1)) for _ in range(20)]
    assert all(np.isfinite(step.reward) and 0 <= step.reward <= 1 for step in steps)
    assert environment.physics.data.qpos[0] > 0.01, environment.physics.data.qpos  # pushed to the right
    assert abs(environment.physics.data.time - 20 * environment.control_timestep()) < 1e-9


@pytest.mark.parametrize("setting", [None, "egl", "glfw", "disabled", "osmesa"])
def test_importing_is_silent_and_leaves_the_renderer_setting(setting: str | None) -> None:
    if setting == "osmesa" and find_library("OSMesa") is None:
        pytest.skip("without OSMesa MuJoCo itself cannot be imported with it")
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    if setting:
        environment["MUJOCO_GL"] = setting
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.stdout, done.stderr) == ("", ""), done.stdout + done.stderr


@pytest.mark.parametrize("before", [None, "egl"])
def test_a_failed_import_leaves_the_renderer_setting(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.setitem(sys.modules, "dm_control.suite", None)
    monkeypatch.delenv("MUJOCO_GL", raising=False) if before is None else monkeypatch.setenv("MUJOCO_GL", before)
    with pytest.raises(ExtraError, match=r'dm_control:cartpole-swingup: dm_control models need: pip install "mbctrl\[sim\]"'):
        import_dm_control("suite", "cartpole-swingup")
    assert os.environ.get("MUJOCO_GL") == before


@pytest.mark.parametrize(
    ("robot", "task", "expected"), [("acrobot", "acrobot-swingup", (0, 0, 4)), ("ball_in_cup", "ball_in_cup-catch", None)]
)
def test_the_target_is_the_task_s_where_it_is_fixed(robot: str, task: str, expected: tuple[float, ...] | None) -> None:
    driver = SuiteDriver(task, load_robot(robot), LockstepClock(), 0)
    driver.open()
    assert driver.target is None if expected is None else np.array_equal(driver.target, expected)


def test_every_episode_has_a_target_of_its_own() -> None:
    """Held against the task's own reading of where the target is, from the hinge of the body that is turned."""
    found = []
    for seed in (0, 1):
        driver = SuiteDriver("finger-turn_hard", load_robot("finger"), LockstepClock(), seed)
        driver.open()
        hinge = driver.physics.named.data.xanchor["hinge"]
        np.testing.assert_allclose((driver.target - hinge)[[0, 2]], driver.physics.target_position(), atol=1e-12)
        found.append(driver.target)
    assert np.linalg.norm(found[0] - found[1]) > 0.01


def test_gravity_that_is_switched_off_is_none() -> None:
    assert not load_model("finger").tree.gravity.any() and load_model("acrobot").tree.gravity[2] == pytest.approx(-9.81)


def test_planning_through_the_simulator_earns_reward(tmp_path: Path) -> None:
    """The ball is in the cup within 2 s; without any force it stays below."""
    config, file = load_run("ball_in_cup_catch_sim")
    few = {"duration": 2.02, "seed": 1, "planner": {"samples": 24}, "dynamics": {"threads": 1}}
    config = validate(RunConfig, merged(config.model_dump(), few), file)

    def idle(request: PlanRequest) -> Plan:
        return Plan(
            0, request.stamp, request.stamp, 0.04, np.zeros((2, 2)), info=dict.fromkeys(("cpu", "best", "ess", "nonfinite"), 0.0)
        )

    returns = [Session(config, file, lockstep=True, plan=plan).run(tmp_path / str(plan is None)).reward for plan in (None, idle)]
    assert returns[0] > 25 and returns[1] == 0, returns
