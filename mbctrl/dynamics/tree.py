"""A robot's rigid-body parameters as plain arrays, independent of any engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frame:
    """A frame fixed to a link: ``link`` (-1: the world), ``rotation`` (3, 3) and ``position`` (3,) [m] in the link's frame."""

    link: int
    rotation: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class Capsule:
    """A collision capsule fixed to a link: end points ``a`` and ``b`` (3,) [m] in the link's frame and ``radius`` [m]."""

    name: str
    link: int
    a: np.ndarray
    b: np.ndarray
    radius: float


@dataclass(frozen=True)
class RigidTree:
    """A tree of n links, each moved by one hinge or slide joint along the z axis of its own frame.

    Arrays are float64 and indexed by joint, parents before children; ``parent`` is -1 at the world. Joint ``i`` is
    reached from its parent's frame by ``fixed_rotation[i]`` (3, 3), ``fixed_position[i]`` (3,) [m] and then turned
    by, or moved along z by, ``q[i] - reference[i]``. ``com`` (n, 3) [m] and ``inertia`` (n, 3, 3) [kg·m²] (about the
    centre of mass) are in the link's frame.
    """

    joints: tuple[str, ...]
    parent: tuple[int, ...]
    revolute: tuple[bool, ...]
    fixed_rotation: np.ndarray
    fixed_position: np.ndarray
    reference: np.ndarray  # [rad] or [m]
    mass: np.ndarray  # [kg]
    com: np.ndarray
    inertia: np.ndarray
    armature: np.ndarray  # [kg·m²] or [kg]
    damping: np.ndarray  # [N·m·s/rad]
    friction: np.ndarray  # Coulomb friction [N·m]
    stiffness: np.ndarray  # passive springs [N·m/rad]
    spring_reference: np.ndarray  # [rad]
    gravity: np.ndarray  # (3,) [m/s²]
    frames: dict[str, Frame]
    capsules: tuple[Capsule, ...]

    @property
    def n(self) -> int:
        """Number of joints, nq = nv."""
        return len(self.joints)

    def ancestors(self) -> np.ndarray:
        """Return (n, n): 1 where joint ``j`` (column) moves link ``i`` (row), itself included."""
        moved = np.zeros((self.n, self.n))
        for i, parent in enumerate(self.parent):
            if parent >= 0:
                moved[i] = moved[parent]
            moved[i, i] = 1
        return moved
