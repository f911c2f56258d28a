"""Pre-arm checks: each thing that must refuse does, and names what it found."""

from __future__ import annotations

import copy
from dataclasses import replace

import mujoco
import numpy as np
import pytest

from mbctrl.base.robot import load_robot
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.runtime.arming import ArmingSettings, arming_refusals
from mbctrl.runtime.driver import RobotState, Status
from mbctrl.sim.plant import Plant

ROBOT = load_robot("panda")
ZERO = np.zeros(7)
READY = RobotState(0.0, 1, np.array(ROBOT.home), ZERO, ZERO, ZERO)


def changed(part: str, joint: int, value: float) -> RobotState:
    values = getattr(READY, part).copy()
    values[joint] = value
    return replace(READY, **{part: values})


def test_a_robot_that_is_ready_is_armed() -> None:
    assert arming_refusals(ROBOT, READY, joints=ROBOT.joints, gravity=ZERO) == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (changed("v", 2, 0.05), ("joint3", "0.05 rad/s", "0.02 rad/s")),
        (changed("v", 2, -0.05), ("joint3", "-0.05 rad/s")),
        (changed("q", 5, 3.75), ("joint6", "3.75 rad", "3.743")),
        (changed("q", 3, -0.06), ("joint4", "-0.06", "-0.0798")),
        (changed("q", 0, -9.0), ("joint1", "-9")),
        (changed("q", 0, np.nan), ("q", "not finite")),
        (changed("tau", 0, np.inf), ("tau", "not finite")),
        (replace(READY, q=np.zeros(6)), ("q", "6 values", "expected 7")),
        (replace(READY, status=Status.PROTECTIVE_STOP), ("status", "protective stop", "ok")),
        (changed("tau", 1, 20.0), ("joint2", "20 N·m", "8.7")),
    ],
)
def test_a_bad_state_is_refused(state: RobotState, words: tuple[str, ...]) -> None:
    refused = arming_refusals(ROBOT, state, gravity=ZERO)
    assert len(refused) == 1 and all(word in refused[0] for word in words), refused


def test_every_joint_at_fault_is_named() -> None:
    refused = arming_refusals(ROBOT, replace(READY, v=np.ones(7)))
    assert [text.split(":")[0] for text in refused] == list(ROBOT.joints)


@pytest.mark.parametrize("joints", [(), ROBOT.joints[:6], ROBOT.joints[::-1], (*ROBOT.joints[:6], "wrist")])
def test_other_joint_names_are_another_robot(joints: tuple[str, ...]) -> None:
    refused = arming_refusals(ROBOT, READY, joints=joints)
    assert len(refused) == 1 and "joints: found" in refused[0] and "joint1" in refused[0]


def test_torque_that_is_not_sensed_is_not_compared() -> None:
    assert arming_refusals(ROBOT, changed("tau", 1, 80.0)) == []


def test_a_margin_is_a_setting() -> None:
    near = changed("q", 0, 2.85)
    assert arming_refusals(ROBOT, near) == []
    assert len(arming_refusals(ROBOT, near, settings=ArmingSettings(margin=0.1))) == 1


def test_a_simulated_arm_at_rest_is_armed_and_one_with_a_load_is_not() -> None:
    model = load_model("panda")
    gravity = ReferenceDynamics(model.tree).gravity(READY.q)
    plant = Plant(model.mj, model.robot)
    state = [plant.tick() for _ in range(300)][-1]
    assert np.abs(state.tau).max() > 5 and arming_refusals(model.robot, state, gravity=gravity) == []
    loaded = Plant(_loaded(model.mj, 5.0), model.robot)
    state = [loaded.tick() for _ in range(1000)][-1]
    refused = arming_refusals(model.robot, state, gravity=gravity)
    assert any("N·m at rest" in text for text in refused)


def _loaded(mj: mujoco.MjModel, mass: float) -> mujoco.MjModel:
    heavy = copy.copy(mj)
    heavy.body_mass[-1] += mass
    return heavy
