"""A contact in a traced step: the same mathematics as ``mbctrl.dynamics.touch``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbctrl.dynamics.contact import Contact, contact_force, normal_force, offset_velocity
from mbctrl.kernels.rigid_body import Array, TracedArm, frame_in_world


class TracedTouch:
    """The contact at one state.

    Args:
        arm: what moves.
        contact: what may touch.
        turns: of ``TracedArm.turns`` where the step takes its forces.
        h, lead: the time step, and how long before its end that is [s].

    Attributes:
        depth: [m].
        rows: (3, n) joint speeds to the relative velocity along the surface's x, y, z.
    """

    def __init__(self, arm: TracedArm, contact: Contact, turns: tuple[list[Array], list[Array]], h: Any, lead: Any) -> None:
        self.arm, self.contact, self._h, self._lead = arm, contact, h, lead
        moved = contact.moved(arm.tree)
        moving = [i for i in range(arm.n) if moved[i]]
        poses = arm.world(*turns, {contact.tip.link, contact.surface.link, *moving})
        _, tip = frame_in_world(poses, contact.tip)
        rotation, position = frame_in_world(poses, contact.surface)
        self.depth = contact.depth(tip, rotation, position)
        point = tip - contact.radius * rotation[:, 2]
        self.rows = np.full((3, arm.n), 0.0, dtype=object)
        for i in moving:
            axis, origin = poses[i][0][:, 2], poses[i][1]
            still = np.full(3, 0.0, dtype=object)
            screw = (axis, still) if arm.tree.revolute[i] else (still, axis)
            self.rows[:, i] = float(moved[i]) * (rotation.T @ np.array(offset_velocity(screw, point - origin), dtype=object))

    def pushed(self, v: Array, load: Array, drag: Array) -> Array:
        """Return the joint torques (n,) of a normal force found as if the step's matrix were its diagonal ``drag``."""
        normal = self.rows[2]
        free, mobility = normal @ (v + self._h * (load / drag)), normal @ (normal / drag)
        return normal * normal_force(self.contact, self.depth, free, mobility, self._h, self._lead)[0]

    def answers(self, matrix: Array) -> Array:
        """Return what joint speeds (n, 3) unit impulses along the surface's axes give; ``matrix`` (n, n) is the step's."""
        return np.stack([self.arm.solve(matrix, row) for row in self.rows], 1)  # the factors are the same expressions

    def solve(self, matrix: Array, load: Array, v: Array) -> Array:
        """Return the acceleration (n,) under ``load`` (n,) and the contact's force, of a step from ``v`` (n,)."""
        untouched = self.arm.solve(matrix, load)
        answers = self.answers(matrix)
        free = self.rows @ (v + self._h * untouched)
        force = contact_force(self.contact, self.depth, free, self.rows @ answers, self._h, self._lead)
        return untouched + answers @ np.array(force, dtype=object)
