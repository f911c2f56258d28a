"""One rigid body seen from other frames, and the link that carries one; its ten parameters: ``mbctrl.dynamics.body``."""

from __future__ import annotations

import numpy as np

from mbctrl.calibrate.inertia import parameters, pseudo_inertia
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.tree import RigidTree


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
