"""One rigid body by its ten parameters, and welding it to a link.

Mass [kg], mass times centre of mass x, y, z [kg·m], and the inertia about the frame's origin xx, xy, yy, xz, yz, zz [kg·m²].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mbctrl.dynamics.tree import RigidTree


def compose(mass: float, com: np.ndarray, inertia: np.ndarray) -> np.ndarray:
    """Return the ten parameters of a body of ``mass`` [kg] with ``inertia`` (3, 3) [kg·m²] about its centre ``com`` (3,) [m]."""
    full = inertia + mass * (com @ com * np.eye(3) - np.outer(com, com))
    return np.array([mass, *(mass * com), full[0, 0], full[0, 1], full[1, 1], full[0, 2], full[1, 2], full[2, 2]])


def decompose(body: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return mass [kg], centre of mass (3,) [m] and inertia (3, 3) [kg·m²] about it of ten parameters; mass must not be 0."""
    mass, com = float(body[0]), body[1:4] / body[0]
    return mass, com, inertia_of(body) - mass * (com @ com * np.eye(3) - np.outer(com, com))


def inertia_of(body: Any) -> Any:
    """Return the inertia (3, 3) [kg·m²] about the frame's origin of ten parameters, numbers or whatever stands for them."""
    xx, xy, yy, xz, yz, zz = body[4:]
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def weld(tree: RigidTree, link: int, body: np.ndarray) -> RigidTree:
    """Return the tree with a body of ten parameters, in the link's frame, welded to ``link``."""
    own = compose(float(tree.mass[link]), tree.com[link], tree.inertia[link])
    total = own + body
    if not total[0] > 0:
        return tree
    mass, com, inertia = tree.mass.copy(), tree.com.copy(), tree.inertia.copy()
    mass[link], com[link], inertia[link] = decompose(total)
    return replace(tree, mass=mass, com=com, inertia=inertia)
