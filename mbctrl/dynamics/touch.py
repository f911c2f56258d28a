"""A contact in a torch step, batch-last: its rows of the Jacobian, and the step with its force solved for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbctrl.dynamics.contact import Contact, contact_force, normal_force, offset_velocity


class Touch:
    """The contact at one state of N samples.

    Args:
        dynamics: the arm, ``RigidBodyDynamics``, for its links' poses.
        contact: what may touch.
        q: (nq, N) where the step takes its forces.

    Attributes:
        depth: (N,) [m].
        rows: (3, n, N) joint speeds to the relative velocity along the surface's x, y, z.
    """

    def __init__(self, dynamics: Any, contact: Contact, q: Tensor) -> None:
        self.contact, self._h, self._lead = contact, dynamics.dt, dynamics.lead
        poses = dynamics.poses(q)
        tip = dynamics.point(poses, contact.tip.link, contact.tip.position)
        rotation, position = dynamics.frame(poses, contact.surface)
        self.depth: Tensor = contact.depth(tip, rotation, position)
        screws = dynamics.screws(torch.stack(poses.rotation), torch.stack(poses.position))  # (n, 3, 2, N)
        moved = torch.as_tensor(contact.moved(dynamics.tree), dtype=q.dtype, device=q.device)
        point = tip - contact.radius * rotation[:, 2]
        velocity = torch.stack(offset_velocity(screws.permute(2, 1, 0, 3), point)) * moved[:, None]  # (3, n, N)
        self.rows = (rotation[:, :, None] * velocity[:, None]).sum(0)

    def pushed(self, v: Tensor, load: Tensor, drag: Tensor) -> Tensor:
        """Return the joint torques (n, N) of a normal force found as if the step's matrix were its diagonal ``drag``."""
        normal = self.rows[2]
        free, mobility = (normal * (v + self._h * load / drag)).sum(0), (normal * normal / drag).sum(0)
        return normal * normal_force(self.contact, self.depth, free, mobility, self._h, self._lead)[0]

    def answers(self, matrix: Tensor) -> Tensor:
        """Return what joint speeds (n, 3, N) unit impulses along the surface's axes give; ``matrix`` (n, n, N) is the step's."""
        return solve_columns(matrix, self.rows.transpose(0, 1))

    def solve(self, matrix: Tensor, load: Tensor, v: Tensor) -> Tensor:
        """Return the acceleration (n, N) under ``load`` (n, N) and the contact's force, of a step from ``v`` (n, N)."""
        solved = solve_columns(matrix, torch.cat((load[:, None], self.rows.transpose(0, 1)), 1))  # (n, 4, N)
        untouched, answers = solved[:, 0], solved[:, 1:]
        free = (self.rows * (v + self._h * untouched)).sum(1)
        mobility = (self.rows[:, :, None] * answers[None]).sum(1)  # (3, 3, N)
        force = torch.stack(contact_force(self.contact, self.depth, free, mobility, self._h, self._lead))
        return untouched + (answers * force).sum(1)


def solve_columns(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric positive definite (n, n, N) systems for each column of ``right`` (n, R, N) by LDLᵀ, unrolled over n."""
    rest = torch.cat((matrix, right), 1)
    rows: list[Tensor] = []
    for _ in range(len(right)):
        row = rest[0] / rest[0, :1]
        rows.append(row[1:])
        rest = rest[1:, 1:] - rest[1:, :1] * row[None, 1:]
    solution = rows.pop()[None]
    for row in reversed(rows):
        known = len(solution)
        value = row[known:] - (row[:known, None] * solution).sum(0)
        solution = torch.cat((value[None], solution))
    return solution
