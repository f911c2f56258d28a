"""From a robot.yaml, a MJCF, a URDF or a dm_control name to a compiled model and a checked rigid-body tree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mujoco
import numpy as np

from mbctrl.base.errors import ModelError, SpecError, suggest
from mbctrl.base.parameters import FittedParameters, JointParameters
from mbctrl.base.poses import align_z, rotation_from_quaternion
from mbctrl.base.robot import Control, Limits, Robot, load_robot
from mbctrl.dynamics.dm_control import dm_control_model, dm_control_spec
from mbctrl.dynamics.parameters import apply_parameters, check_applied, completed
from mbctrl.dynamics.reference import self_check
from mbctrl.dynamics.tree import Capsule, Frame, RigidTree

_log = logging.getLogger(__name__)
_SUPPORTED = (int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE))
_COLLISION_GROUP = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """A robot ready for use: its description, the compiled MuJoCo model and the rigid-body tree; ``error`` is the
    largest relative disagreement of MuJoCo and Pinocchio the self-check found; ``parameters`` are the calibrated ones that
    mj and tree have, None: the robot's own."""

    robot: Robot
    mj: mujoco.MjModel
    tree: RigidTree
    error: float
    parameters: FittedParameters | None = None


def load_model(
    name: str, parameters: FittedParameters | None = None, *, file: str | Path | None = None, key: str | None = None
) -> Model:
    """Load a robot by name, by robot.yaml, by MJCF or URDF path, or by ``dm_control:DOMAIN-TASK`` / ``dm_control:jaco_arm``.

    The MuJoCo model and a Pinocchio model built from its arrays must agree on M(q), bias and gravity at random states.

    Args:
        parameters: calibrated ones to take in place of the model's own.
        file, key: where the name was written, for the error.

    Errors:
        SpecError, ModelError: naming the file and the joint or body.
    """
    robot, source = described(name, parameters, file=file, key=key)
    mj = compile_model(source) if parameters is None else calibrated(source, parameters)[1]
    tree = tree_from_mujoco(mj, source)
    robot = robot or _robot_from_mujoco(mj, tree, source)
    if robot.joints != tree.joints:
        raise ModelError(
            f"expected the model's joints {list(tree.joints)}, found {list(robot.joints)}", file=robot.path, key="joints"
        )
    if robot.tool not in tree.frames:
        raise ModelError(f"the model has no site '{robot.tool}'{suggest(robot.tool, tree.frames)}", file=robot.path, key="tool")
    return Model(robot, mj, tree, self_check(mj, tree, source), parameters)


def described(
    name: str, parameters: FittedParameters | None = None, *, file: str | Path | None = None, key: str | None = None
) -> tuple[Robot | None, str]:
    """Return a robot's description, None for a bare model, and its model: a file or a ``dm_control:`` name.

    Errors:
        SpecError: for a name that is unknown, and for ``parameters`` of another robot.
    """
    bare = name.startswith("dm_control:") or Path(name).suffix in (".xml", ".urdf", ".mjcf")
    robot = None if bare else load_robot(name, file=file, key=key)
    called = robot.name if robot else _stem(name)
    if parameters is not None and parameters.robot != called:
        raise SpecError(
            f"expected parameters of '{called}', found those of '{parameters.robot}'", file=parameters.path, key="robot"
        )
    return robot, robot.model_path if robot else name


def _stem(source: str) -> str:
    return Path(source.replace("dm_control:", "")).stem


def compile_model(source: str) -> mujoco.MjModel:
    """Compile a MJCF or URDF file, or a model dm_control ships.

    Errors:
        ModelError: with the compiler's own message.
    """
    if source.startswith("dm_control:"):
        return dm_control_model(source.removeprefix("dm_control:"))
    return _compiled(source, lambda: _spec(source).compile())


def calibrated(source: str, parameters: FittedParameters) -> tuple[mujoco.MjSpec, mujoco.MjModel, dict[str, JointParameters]]:
    """Return a model with calibrated parameters, editable and compiled, and what each of its joints got.

    Errors:
        SpecError, ModelError: naming file and joint.
    """
    spec = _compiled(source, lambda: _spec(source))
    before = _compiled(source, spec.copy().compile)
    values = completed(parameters, before, tree_from_mujoco(before, source))
    apply_parameters(spec, before, values)
    mj = _compiled(str(parameters.path or source), spec.compile)
    check_applied(mj, tree_from_mujoco(mj, source), values, source)
    return spec, mj, values


def _spec(source: str) -> mujoco.MjSpec:
    if source.startswith("dm_control:"):
        return dm_control_spec(source.removeprefix("dm_control:"))
    if not Path(source).is_file():
        raise SpecError("no such file", file=source)
    return parse_model(source)


def _compiled(file: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (ValueError, mujoco.FatalError) as error:
        raise ModelError(f"does not compile: {error}", file=file) from None


def parse_model(source: str) -> mujoco.MjSpec:
    """Parse a file; a URDF's meshes that are not there (package:// paths) are left out: they carry no inertia."""
    spec = mujoco.MjSpec.from_file(source)
    if Path(source).suffix != ".urdf":
        return spec
    missing = {mesh.name for mesh in spec.meshes if not (Path(source).parent / spec.meshdir / mesh.file).is_file()}
    if missing:
        _log.warning("%s: %d meshes are not there and are left out", source, len(missing))
    for geom in [geom for geom in spec.geoms if geom.meshname in missing]:
        spec.delete(geom)
    for mesh in [mesh for mesh in spec.meshes if mesh.name in missing]:
        spec.delete(mesh)
    return spec


def tree_from_mujoco(mj: mujoco.MjModel, source: str = "") -> RigidTree:
    """Read the tree out of a compiled model; welded bodies are merged into the link that carries them.

    Errors:
        ModelError: for ball and free joints and for compiler-side gravity compensation.
    """
    for j in range(mj.njnt):
        if mj.jnt_type[j] not in _SUPPORTED:
            raise ModelError("only hinge and slide joints have an analytic model", file=source, key=mj.joint(j).name)
    if mj.body_gravcomp.any():
        raise ModelError("gravcomp belongs in robot.yaml (control.gravity_compensation)", file=source, key="body gravcomp")
    if mj.dof_dampingpoly.any() or mj.jnt_stiffnesspoly.any():
        raise ModelError("polynomial damping and stiffness have no analytic model", file=source, key="joint")
    if mj.neq or mj.ntendon:
        _log.warning("%s: %d equality constraints and %d tendons are left out of the analytic model", source, mj.neq, mj.ntendon)
    links = _Links(mj.njnt)
    place: list[tuple[int, np.ndarray, np.ndarray]] = [(-1, np.eye(3), np.zeros(3))]  # of each body frame in its link
    for b in range(1, mj.nbody):
        link, rotation, position = _compose(place[mj.body_parentid[b]], mj.body_quat[b], mj.body_pos[b])
        for j in range(mj.body_jntadr[b], mj.body_jntadr[b] + mj.body_jntnum[b]):
            align, anchor = align_z(mj.jnt_axis[j]), mj.jnt_pos[j]
            links.parent[j], links.rotation[j] = link, rotation @ align
            links.position[j] = position + rotation @ anchor
            link, rotation, position = j, align.T, -align.T @ anchor
        place.append((link, rotation, position))
        if link >= 0:
            links.add(link, *_inertial(mj, b, rotation, position))
    mass, com, inertia = links.lumped()
    dof = mj.jnt_dofadr
    return RigidTree(
        joints=tuple(mj.joint(j).name for j in range(mj.njnt)),
        parent=tuple(links.parent),
        revolute=tuple(bool(kind == mujoco.mjtJoint.mjJNT_HINGE) for kind in mj.jnt_type),
        fixed_rotation=links.rotation,
        fixed_position=links.position,
        reference=mj.qpos0[mj.jnt_qposadr].copy(),
        mass=mass,
        com=com,
        inertia=inertia,
        armature=mj.dof_armature[dof].copy(),
        damping=mj.dof_damping[dof].copy(),
        friction=mj.dof_frictionloss[dof].copy(),
        stiffness=mj.jnt_stiffness.copy(),
        spring_reference=mj.qpos_spring[mj.jnt_qposadr].copy(),
        gravity=mj.opt.gravity * (not mj.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_GRAVITY),
        frames={
            mj.site(s).name: Frame(*_compose(place[mj.site_bodyid[s]], mj.site_quat[s], mj.site_pos[s])) for s in range(mj.nsite)
        }
        | {mj.body(b).name: Frame(*place[b]) for b in range(1, mj.nbody) if mj.body(b).name},
        capsules=tuple(_capsules(mj, place)),
    )


class _Links:
    """Joint frames, and the inertia gathered about each link's origin."""

    def __init__(self, n: int) -> None:
        self.parent = [-1] * n
        self.rotation, self.position = np.zeros((n, 3, 3)), np.zeros((n, 3))
        self.mass, self.moment, self.inertia = np.zeros(n), np.zeros((n, 3)), np.zeros((n, 3, 3))

    def add(self, link: int, mass: float, com: np.ndarray, inertia: np.ndarray) -> None:
        self.mass[link] += mass
        self.moment[link] += mass * com
        self.inertia[link] += inertia + mass * (com @ com * np.eye(3) - np.outer(com, com))

    def lumped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mass (n,), centre of mass (n, 3) and inertia about it (n, 3, 3)."""
        com = self.moment / np.where(self.mass > 0, self.mass, 1)[:, None]
        shift = np.stack([m * (c @ c * np.eye(3) - np.outer(c, c)) for m, c in zip(self.mass, com)])
        return self.mass, com, self.inertia - shift


def _inertial(mj: mujoco.MjModel, b: int, rotation: np.ndarray, position: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    axes = rotation @ rotation_from_quaternion(mj.body_iquat[b])
    return float(mj.body_mass[b]), position + rotation @ mj.body_ipos[b], axes @ np.diag(mj.body_inertia[b]) @ axes.T


def _compose(
    place: tuple[int, np.ndarray, np.ndarray], quaternion: np.ndarray, offset: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    link, rotation, position = place
    return link, rotation @ rotation_from_quaternion(quaternion), position + rotation @ offset


def _capsules(mj: mujoco.MjModel, place: list[tuple[int, np.ndarray, np.ndarray]]) -> list[Capsule]:
    """Return a capsule around every collision geom of a moving link (group 3, or every geom where there is no such group)."""
    moving = [g for g in range(mj.ngeom) if place[mj.geom_bodyid[g]][0] >= 0]
    chosen = [g for g in moving if mj.geom_group[g] == _COLLISION_GROUP] or moving
    capsules = []
    for g in chosen:
        link, rotation, position = _compose(place[mj.geom_bodyid[g]], mj.geom_quat[g], mj.geom_pos[g])
        axis, half, radius, center = _around(mj, g)
        middle = position + rotation @ center
        capsules.append(
            Capsule(mj.geom(g).name or f"geom{g}", link, middle - rotation @ axis * half, middle + rotation @ axis * half, radius)
        )
    return capsules


def _around(mj: mujoco.MjModel, g: int) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Return (axis, half length, radius, centre) of a capsule that contains geom ``g``, in the geom's frame."""
    size, kind = mj.geom_size[g], mj.geom_type[g]
    z = np.array([0.0, 0.0, 1.0])
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return z, 0.0, float(size[0]), np.zeros(3)
    if kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return z, float(size[1]), float(size[0]), np.zeros(3)
    half = mj.geom_aabb[g, 3:]
    longest = int(np.argmax(half))
    radius = float(np.linalg.norm(np.delete(half, longest)))
    return np.eye(3)[longest], float(half[longest]), radius, mj.geom_aabb[g, :3]


def _robot_from_mujoco(mj: mujoco.MjModel, tree: RigidTree, source: str) -> Robot:
    """Describe a bare model: limits from its joint and control ranges, torque mode, the last site as the tool."""
    wide = 4 * np.pi
    span = [mj.jnt_range[j] if mj.jnt_limited[j] else (-wide, wide) for j in range(mj.njnt)]
    motors = {}
    for a in range(mj.nu):
        if mj.actuator_trntype[a] == mujoco.mjtTrn.mjTRN_JOINT:
            top = abs(mj.actuator_ctrlrange[a]).max() if mj.actuator_ctrllimited[a] else 100.0
            motors[tree.joints[mj.actuator_trnid[a, 0]]] = float(top * abs(mj.actuator_gear[a, 0]))
    own = {joint: float(abs(mj.jnt_actfrcrange[j]).max()) for j, joint in enumerate(tree.joints) if mj.jnt_actfrclimited[j]}
    driven = tuple(joint for joint in tree.joints if joint in motors) or tree.joints
    sites = [mj.site(s).name for s in range(mj.nsite)] or [mj.body(mj.nbody - 1).name]
    return Robot(
        name=_stem(source),
        description=f"read from {Path(source).name}",
        model=source,
        joints=tree.joints,
        actuated=driven,
        home=tuple(mj.key_qpos[0] if mj.nkey else mj.qpos0),
        tool=sites[-1],
        limits=Limits(
            position_lower=tuple(float(low) for low, _ in span),
            position_upper=tuple(float(high) for _, high in span),
            velocity=(100.0,) * tree.n,
            effort=tuple(motors.get(joint, own.get(joint, 100.0)) for joint in driven),
        ),
        control=Control(mode="torque", rate=500.0, stiffness=(0.0,) * len(driven), damping=(0.0,) * len(driven)),
        path=Path(source),
    )
