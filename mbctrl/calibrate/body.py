"""One rigid body: its ten parameters, mass and centre of mass, other frames, and welding it to a link."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mbctrl.calibrate.inertia import parameters, pseudo_inertia
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.tree import RigidTree


def compose(mass: float, com: np.ndarray, inertia: np.ndarray) -> np.ndarray:
    """Return the ten parameters of a body of ``mass`` [kg] with ``inertia`` (3, 3) [kg·m²] about its centre ``com`` (3,) [m]."""
    full = inertia + mass * (com @ com * np.eye(3) - np.outer(com, com))
    return np.array([mass, *(mass * com), full[0, 0], full[0, 1], full[1, 1], full[0, 2], full[1, 2], full[2, 2]])


def decompose(body: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return mass [kg], centre of mass (3,) [m] and inertia (3, 3) [kg·m²] about it of ten parameters; mass must not be 0."""
    mass, com = float(body[0]), body[1:4] / body[0]
    xx, xy, yy, xz, yz, zz = body[4:]
    full = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return mass, com, full - mass * (com @ com * np.eye(3) - np.outer(com, com))


def seen_from(body: np.ndarray, rotation: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return the ten parameters in a frame that sits at ``position`` (3,) [m], turned by ``rotation`` (3, 3), in their own."""
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation.T, -rotation.T @ position
    return parameters(move @ pseudo_inertia(body) @ move.T)


def carrier(tree: RigidTree, joint: str | None, frame: str | None) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the link that carries, and rotation (3, 3) and position (3,) [m] in it of the frame a body is described in.

    Args:
        tree: the arm.
        joint: the one that moves the link; None: the frame's, or the last.
        frame: one of the tree's frames, on that link; None: the link's own.

    Errors:
        CalibrationError: for a joint or frame there is not, or a frame on another link.
    """
    if joint is not None and joint not in tree.joints:
        raise CalibrationError(f"no such joint; known: {', '.join(tree.joints)}", key=joint)
    if frame is not None and frame not in tree.frames:
        raise CalibrationError(f"no such frame; known: {', '.join(sorted(tree.frames))}", key=frame)
    place = None if frame is None else tree.frames[frame]
    link = tree.joints.index(joint) if joint is not None else tree.n - 1 if place is None else place.link
    if place is None:
        return link, np.eye(3), np.zeros(3)
    if place.link != link or link < 0:
        owner = tree.joints[place.link] if place.link >= 0 else "the world"
        raise CalibrationError(f"the frame moves with {owner}, the body with {tree.joints[link]}", key=frame)
    return link, place.rotation, place.position


def weld(tree: RigidTree, link: int, body: np.ndarray) -> RigidTree:
    """Return the tree with a body of ten parameters, in the link's frame, welded to ``link``."""
    own = compose(float(tree.mass[link]), tree.com[link], tree.inertia[link])
    total = own + body
    if not total[0] > 0:
        return tree
    mass, com, inertia = tree.mass.copy(), tree.com.copy(), tree.inertia.copy()
    mass[link], com[link], inertia[link] = decompose(total)
    return replace(tree, mass=mass, com=com, inertia=inertia)
