"""Calibrated parameters and MuJoCo models: a model's own values as a parameter file has them, and a file's put in a model."""

from __future__ import annotations

import mujoco
import numpy as np

from mbctrl.base.errors import ModelError, SpecError, suggest
from mbctrl.base.parameters import FittedParameters, JointParameters, inertia_matrix, inertia_values
from mbctrl.base.poses import align_z, quaternion_from_rotation
from mbctrl.dynamics.tree import RigidTree

_INERTIAL = ("mass", "com", "inertia")
_EXACT, _SMALL = 1e-9, 1e-6  # relative; and absolute where the number is nought or nearly so


def parameters_of(mj: mujoco.MjModel, tree: RigidTree, robot: str) -> FittedParameters:
    """Return every value of ``tree`` in a parameter file's frames.

    A tree with other numbers than the model's (``dataclasses.replace``) is how identified parameters get into a file.
    Of several joints in one body all but the last carry no link, so they have no inertial values.

    Args:
        mj: the model, for the frames of its bodies.
        tree: ``tree_from_mujoco`` of it.
        robot: the robot's name.
    """
    joints = {}
    for j, name in enumerate(tree.joints):
        values = {key: float(getattr(tree, key)[j]) for key in ("armature", "damping", "friction")}
        if tree.mass[j] > 0:
            turn = align_z(mj.jnt_axis[j])  # link to body
            values["mass"] = float(tree.mass[j])
            values["com"] = tuple(map(float, turn @ tree.com[j] + mj.jnt_pos[j]))
            values["inertia"] = inertia_values(turn @ tree.inertia[j] @ turn.T)
        joints[name] = JointParameters(**values)
    return FittedParameters(robot=robot, joints=joints)


def completed(parameters: FittedParameters, mj: mujoco.MjModel, tree: RigidTree) -> dict[str, JointParameters]:
    """Return the parameters of every joint: those given, and the model's own for the rest.

    Errors:
        SpecError: for joints the model does not have, and for inertial values of a joint that carries no link.
    """
    own = dict(parameters_of(mj, tree, parameters.robot).joints)
    for name, given in parameters.joints.items():
        where = {"file": parameters.path, "key": f"joints.{name}"}
        if name not in own:
            raise SpecError(f"{parameters.robot} has no such joint{suggest(name, own)}", **where)
        values = {key: value for key, value in given if value is not None}
        carried = values.keys() & set(_INERTIAL)
        if carried and own[name].mass is None:
            raise SpecError(f"no {' or '.join(sorted(carried))} expected: the link belongs to a later joint of its body", **where)
        own[name] = own[name].model_copy(update=values)
    return own


def apply_parameters(spec: mujoco.MjSpec, mj: mujoco.MjModel, values: dict[str, JointParameters]) -> None:
    """Put parameters in a model that is yet to be compiled.

    Every link's inertial becomes an explicit one of the body that has its joint, and zero in the bodies welded to that.

    Args:
        spec: changed in place.
        mj: the same model, compiled unchanged.
        values: ``completed`` parameters.
    """
    compiler = spec.compiler
    if compiler.inertiafromgeom == mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_TRUE:
        compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_AUTO
    compiler.settotalmass, compiler.boundmass, compiler.boundinertia = -1, 0, 0  # they are in the compiled numbers already
    for joint in [joint for joint in spec.joints if joint.name in values]:
        own, j = values[joint.name], mj.joint(joint.name).id
        joint.armature, joint.frictionloss = own.armature, own.friction
        joint.damping = [own.damping, 0, 0]
        joint.stiffness, joint.springdamper = [mj.jnt_stiffness[j], 0, 0], [0, 0]  # it would follow the inertia
        if own.mass is not None:
            _set_inertial(joint.parent, own.mass, np.asarray(own.com), inertia_matrix(own.inertia))
            _clear_welded(joint.parent)


def check_applied(mj: mujoco.MjModel, tree: RigidTree, wanted: dict[str, JointParameters], source: str) -> None:
    """Refuse a model whose compiler made other numbers of the parameters than those given.

    Args:
        mj, tree: the model with the parameters, compiled.
        wanted: ``completed`` parameters.
        source: the model's file, for the error.

    Errors:
        ModelError: naming the joint.
    """
    for name, found in parameters_of(mj, tree, "").joints.items():
        for key, value in wanted[name]:
            if value is None:
                continue
            scale = np.abs(value).max()
            if not np.allclose(getattr(found, key), value, rtol=0, atol=_EXACT * max(scale, _SMALL)):
                raise ModelError(f"{key} became {getattr(found, key)} in the model, given was {value}", file=source, key=name)


def principal(inertia: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal moments (3,) of an inertia (3, 3) and the quaternion (w, x, y, z) of its axes.

    MuJoCo's own decomposition leaves 1e-12 kg·m² off the diagonal, which a light link notices.
    """
    moments, axes = np.linalg.eigh(inertia)
    if np.linalg.det(axes) < 0:
        axes[:, 0] *= -1
    return moments, quaternion_from_rotation(axes)


def _set_inertial(body: mujoco.MjsBody, mass: float, com: np.ndarray, inertia: np.ndarray) -> None:
    moments, quaternion = principal(inertia)
    body.explicitinertial, body.fullinertia = True, np.full(6, np.nan)
    body.ialt.type = mujoco.mjtOrientation.mjORIENTATION_QUAT
    body.mass, body.ipos, body.iquat, body.inertia = mass, com, quaternion, moments


def _clear_welded(body: mujoco.MjsBody) -> None:
    """Make every body welded to ``body`` massless: what it weighs is in the link's inertial."""
    for child in body.bodies:
        if not child.joints:
            _set_inertial(child, 0.0, np.zeros(3), np.zeros((3, 3)))
            _clear_welded(child)
