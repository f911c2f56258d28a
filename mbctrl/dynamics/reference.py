"""Pinocchio as the independent reference: the only module that touches it.

Models are built from compiled arrays, not by Pinocchio's own MJCF parser, which is silently wrong where a body has
no ``<inertial>``.
"""

from __future__ import annotations

from dataclasses import replace

import mujoco
import numpy as np
import pinocchio as pin

from mbctrl.base.errors import ModelError
from mbctrl.dynamics.tree import RigidTree

TOLERANCE = 1e-9


def pinocchio_model(tree: RigidTree) -> pin.Model:
    """Return a Pinocchio model of ``tree``; joint order is the tree's."""
    model = pin.Model()
    model.gravity = pin.Motion(tree.gravity, np.zeros(3))
    ids: list[int] = []
    for i, name in enumerate(tree.joints):
        joint = pin.JointModelRZ() if tree.revolute[i] else pin.JointModelPZ()
        parent = 0 if tree.parent[i] < 0 else ids[tree.parent[i]]
        ids.append(model.addJoint(parent, joint, pin.SE3(tree.fixed_rotation[i], tree.fixed_position[i]), name))
        model.appendBodyToJoint(ids[i], pin.Inertia(tree.mass[i], tree.com[i], tree.inertia[i]), pin.SE3.Identity())
    model.armature = tree.armature.copy()
    return model


class ReferenceDynamics:
    """M(q), bias, gravity and forward dynamics by Pinocchio, float64, one state at a time.

    Source: Carpentier et al., "The Pinocchio C++ library" (2019).
    """

    def __init__(self, tree: RigidTree) -> None:
        self.tree = tree
        self.model = pinocchio_model(tree)
        self.data = self.model.createData()

    def mass_matrix(self, q: np.ndarray) -> np.ndarray:
        """Return M(q) with armature, (nv, nv) [kg·m²], from q (nq,) [rad]."""
        upper = np.triu(pin.crba(self.model, self.data, q - self.tree.reference))
        return upper + np.triu(upper, 1).T

    def bias(self, q: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return Coriolis, centrifugal and gravity torques, (nv,) [N·m]."""
        return pin.nonLinearEffects(self.model, self.data, q - self.tree.reference, v).copy()

    def gravity(self, q: np.ndarray) -> np.ndarray:
        """Return the torque that holds the arm against gravity, (nv,) [N·m]."""
        return pin.computeGeneralizedGravity(self.model, self.data, q - self.tree.reference).copy()

    def forward_dynamics(self, q: np.ndarray, v: np.ndarray, tau: np.ndarray) -> np.ndarray:
        """Return accelerations (nv,) [rad/s²] under joint torques ``tau`` [N·m], damping, springs and sliding friction.

        Coulomb friction is ``friction * sign(v)``: valid where every joint slides.
        """
        t = self.tree
        passive = -t.damping * v - t.friction * np.sign(v) - t.stiffness * (q - t.spring_reference)
        return pin.aba(self.model, self.data, q - t.reference, v, tau + passive).copy()

    def inverse_dynamics(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return the torques of rigid bodies and rotors (T, nv) [N·m] along q, v, a (T, nv); no friction, no springs."""
        return np.stack([pin.rnea(self.model, self.data, x, y, z) for x, y, z in zip(q - self.tree.reference, v, a)])

    def regressor(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return (T, nv, 10 nv): torque is this times the links' parameters, along q, v, a (T, nv); rotors not included.

        Parameters of a link, in its joint's frame: mass [kg], mass times centre of mass x, y, z [kg·m], and the inertia
        about the frame's origin xx, xy, yy, xz, yz, zz [kg·m²]. Source: Atkeson, An and Hollerbach, "Estimation of
        inertial parameters of manipulator loads and links" (1986); Pinocchio's ``computeJointTorqueRegressor``.
        """
        n = self.tree.n
        out = np.empty((len(q), n, 10 * n))
        for i, (x, y, z) in enumerate(zip(np.asarray(q) - self.tree.reference, v, a)):
            out[i] = pin.computeJointTorqueRegressor(self.model, self.data, x, y, z)
        return out


def link_parameters(tree: RigidTree) -> np.ndarray:
    """Return the ten parameters of each link (n, 10) in the order of ``ReferenceDynamics.regressor``."""
    return np.stack([pin.Inertia(m, c, i).toDynamicParameters() for m, c, i in zip(tree.mass, tree.com, tree.inertia)])


def with_links(tree: RigidTree, links: np.ndarray) -> RigidTree:
    """Return ``tree`` with other links: the inverse of ``link_parameters``, (n, 10)."""
    bodies = [pin.Inertia.FromDynamicParameters(link) for link in links]
    return replace(
        tree,
        mass=np.array([body.mass for body in bodies]),
        com=np.stack([body.lever for body in bodies]),
        inertia=np.stack([body.inertia for body in bodies]),
    )


def self_check(mj: mujoco.MjModel, tree: RigidTree, source: str, states: int = 3) -> float:
    """Compare M(q), bias and gravity of MuJoCo and Pinocchio at random states; return the largest relative error.

    Errors:
        ModelError: above 1e-9, naming the quantity and the joint.
    """
    reference, data, rng = ReferenceDynamics(tree), mujoco.MjData(mj), np.random.default_rng(0)
    worst = 0.0
    for _ in range(states):
        q, v = rng.uniform(-2, 2, tree.n), rng.uniform(-2, 2, tree.n)
        pairs = {
            "M(q)": (mujoco_mass_matrix(mj, data, q), reference.mass_matrix(q)),
            "bias": (_mujoco_bias(mj, data, q, v), reference.bias(q, v)),
            "gravity": (_mujoco_bias(mj, data, q, np.zeros(tree.n)), reference.gravity(q)),
        }
        for what, (a, b) in pairs.items():
            error = np.abs(a - b) / max(np.abs(b).max(), 1.0 if what != "M(q)" else 1e-12)
            worst = max(worst, float(error.max()))
            if not error.max() <= TOLERANCE:
                joint = tree.joints[int(np.unravel_index(np.nanargmax(error), error.shape)[0])]
                raise ModelError(
                    f"MuJoCo and Pinocchio differ in {what} by {error.max():.1e} (allowed {TOLERANCE:g})", file=source, key=joint
                )
    return worst


def mujoco_mass_matrix(mj: mujoco.MjModel, data: mujoco.MjData, q: np.ndarray) -> np.ndarray:
    """Return MuJoCo's M(q), (nv, nv), armature included."""
    data.qpos[mj.jnt_qposadr] = q
    data.qvel[:] = 0
    mujoco.mj_forward(mj, data)
    full = np.zeros((mj.nv, mj.nv))
    mujoco.mj_fullM(mj, data, full)
    return full


def _mujoco_bias(mj: mujoco.MjModel, data: mujoco.MjData, q: np.ndarray, v: np.ndarray) -> np.ndarray:
    data.qpos[mj.jnt_qposadr] = q
    data.qvel[:] = v
    mujoco.mj_forward(mj, data)
    return data.qfrc_bias.copy()
