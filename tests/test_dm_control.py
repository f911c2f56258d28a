"""dm_control's suite: its versions fit, it steps, and importing it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import mujoco
import numpy as np
import pytest

from mbctrl.base.errors import ExtraError
from mbctrl.dynamics.dm_control import import_dm_control

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
