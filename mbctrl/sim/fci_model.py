"""The model a Franka arm sends to its clients: a URDF, written from the compiled MuJoCo model."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import mujoco
import numpy as np

from mbctrl.base.errors import ModelError
from mbctrl.base.robot import Robot

_FLANGE = "link8"  # the vendor's client looks for it, and for joint1 to joint7
_DECELERATION = 10.0  # [rad/s²], of a robot without a limit of its own


def urdf(mj: mujoco.MjModel, robot: Robot) -> str:
    """Return the model as URDF: frames, inertias and limits, no shapes.

    Every joint has the ``position_based_velocity_limits`` that the vendor's client asks for; the offset of 0 rad/s says
    that the arm stops at a limit when it brakes with its acceleration limit.

    Errors:
        ModelError: for a body with several joints, or a joint off its body's origin.
    """
    tree = ElementTree.Element("robot", name=robot.name)
    ElementTree.SubElement(tree, "link", name="world")
    order = [mj.joint(name).id for name in robot.driven]
    for body in range(1, mj.nbody):
        _link(tree, mj, body)
        joint = _joint(tree, mj, body)
        if mj.body_jntnum[body] == 0:
            joint.set("type", "fixed")
            continue
        index = int(mj.body_jntadr[body])
        if mj.body_jntnum[body] > 1 or index not in order or np.any(mj.jnt_pos[index]):
            raise ModelError("expected one driven joint at the body's origin", file=robot.model_path, key=mj.body(body).name)
        _limits(joint, mj, robot, index, order.index(index))
    last = mj.body(mj.jnt_bodyid[order[-1]]).name
    if _FLANGE not in {link.get("name") for link in tree.iter("link")}:
        ElementTree.SubElement(tree, "link", name=_FLANGE)
        joint = ElementTree.SubElement(tree, "joint", name="flange", type="fixed")
        ElementTree.SubElement(joint, "parent", link=last)
        ElementTree.SubElement(joint, "child", link=_FLANGE)
    return ElementTree.tostring(tree, encoding="unicode")


def _link(tree: ElementTree.Element, mj: mujoco.MjModel, body: int) -> None:
    link = ElementTree.SubElement(tree, "link", name=mj.body(body).name)
    if mj.body_mass[body] == 0:
        return
    inertial = ElementTree.SubElement(link, "inertial")
    _origin(inertial, mj.body_ipos[body], mj.body_iquat[body])
    ElementTree.SubElement(inertial, "mass", value=repr(float(mj.body_mass[body])))
    diagonal = dict(zip(("ixx", "iyy", "izz"), (repr(float(value)) for value in mj.body_inertia[body])))
    ElementTree.SubElement(inertial, "inertia", **diagonal, ixy="0", ixz="0", iyz="0")


def _joint(tree: ElementTree.Element, mj: mujoco.MjModel, body: int) -> ElementTree.Element:
    name = mj.body(body).name
    joint = ElementTree.SubElement(tree, "joint", name=f"{name}_fixed")
    ElementTree.SubElement(joint, "parent", link=mj.body(mj.body_parentid[body]).name)
    ElementTree.SubElement(joint, "child", link=name)
    _origin(joint, mj.body_pos[body], mj.body_quat[body])
    return joint


def _limits(joint: ElementTree.Element, mj: mujoco.MjModel, robot: Robot, index: int, number: int) -> None:
    limits, i = robot.limits, robot.command_index[number]
    joint.set("type", "revolute")
    joint.set("name", f"joint{number + 1}")
    ElementTree.SubElement(joint, "axis", xyz=_text(mj.jnt_axis[index]))
    values = {
        "lower": limits.position_lower[i],
        "upper": limits.position_upper[i],
        "velocity": limits.velocity[i],
        "effort": limits.effort[number],
    }
    ElementTree.SubElement(joint, "limit", {key: repr(value) for key, value in values.items()})
    braking = _DECELERATION if limits.acceleration is None else limits.acceleration[i]
    ElementTree.SubElement(joint, "position_based_velocity_limits", velocity_offset="0.0", deceleration_limit=repr(braking))


def _origin(parent: ElementTree.Element, position: np.ndarray, quaternion: np.ndarray) -> None:
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    r = matrix.reshape(3, 3)
    pitch = np.arctan2(-r[2, 0], np.hypot(r[0, 0], r[1, 0]))
    if np.hypot(r[0, 0], r[1, 0]) > 1e-9:
        roll, yaw = np.arctan2(r[2, 1], r[2, 2]), np.arctan2(r[1, 0], r[0, 0])
    else:  # the axes of roll and yaw coincide: all of it is yaw
        roll, yaw = 0.0, np.arctan2(-r[0, 1], r[1, 1])
    ElementTree.SubElement(parent, "origin", xyz=_text(position), rpy=_text((roll, pitch, yaw)))


def _text(values) -> str:
    return " ".join(repr(float(value)) for value in values)
