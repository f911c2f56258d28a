"""Pre-arm checks: what must be true of a robot before it takes commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import RobotState


@dataclass(frozen=True)
class ArmingSettings:
    """What counts as ready.

    Args:
        rest_speed: [rad/s] highest speed of a joint at rest.
        margin: [rad] smallest distance of a joint to its position limits.
        torque: share of a joint's effort limit by which the torque measured at rest may differ from the model's gravity
            torque; friction at rest and an unknown load are within it, another robot or a wrong mounting is not.
    """

    rest_speed: float = 0.02
    margin: float = 0.01
    torque: float = 0.1


def arming_refusals(
    robot: Robot,
    state: RobotState,
    *,
    joints: Sequence[str] | None = None,
    gravity: np.ndarray | None = None,
    settings: ArmingSettings | None = None,
) -> list[str]:
    """Return why the robot may not be armed, one text each; empty when it may.

    Args:
        state: a measurement.
        joints: the names the robot reports for its joints, in order; None: it reports none.
        gravity: (nu,) torque the model needs to hold the arm at ``state.q`` [N·m]; None where the driver senses no torque
            (``Driver.senses_torque``) or no model is at hand.
    """
    settings = settings or ArmingSettings()
    found = []
    if not state.status.usable:
        found.append(f"status: found {state.status.value}, expected ok")
    if joints is not None and tuple(joints) != robot.joints:
        found.append(f"joints: found {', '.join(joints) or 'none'}, expected {', '.join(robot.joints)}")
    for name, size in (("q", robot.nq), ("v", robot.nq), ("tau", robot.nu), ("gravity", robot.nu)):
        part = np.asarray(getattr(state, name))
        if part.shape != (size,):
            found.append(f"{name}: found {part.size} values, expected {size}")
        elif not np.isfinite(part).all():
            found.append(f"{name}: found a number that is not finite")
    if found:  # nothing more can be said of numbers that are not there, or not of this robot
        return found
    return [*_posture(robot, state, settings), *_torque(robot, state, gravity, settings)]


def _posture(robot: Robot, state: RobotState, settings: ArmingSettings) -> list[str]:
    """At rest, and inside the limits with a margin."""
    found = []
    lows, highs = robot.limits.position_lower, robot.limits.position_upper
    for joint, q, v, low, high in zip(robot.joints, state.q, state.v, lows, highs):
        if abs(v) > settings.rest_speed:
            found.append(f"{joint}: moves at {v:.3g} rad/s, expected at most {settings.rest_speed:g} rad/s")
        if not low + settings.margin <= q <= high - settings.margin:
            found.append(f"{joint}: found at {q:.4g} rad, expected {low + settings.margin:.4g} to {high - settings.margin:.4g} rad")
    return found


def _torque(robot: Robot, state: RobotState, gravity: np.ndarray | None, settings: ArmingSettings) -> list[str]:
    """The torque that holds the arm is the model's: the right robot, mounted as modelled, with the load the model has."""
    if gravity is None:
        return []
    found = []
    for joint, tau, model, effort in zip(robot.driven, state.tau, np.asarray(gravity, float), robot.limits.effort):
        allowed = settings.torque * effort
        if not abs(tau - model) <= allowed:
            found.append(f"{joint}: found {tau:.3g} N·m at rest, expected the model's {model:.3g} ± {allowed:.3g} N·m")
    return found
