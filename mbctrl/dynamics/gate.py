"""How near a robot is to what it may touch: where physics may be missing something, and where it is exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.dynamics.contact import Contact
from mbctrl.dynamics.residual import Surface, frame_of
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.touch import Touch
from mbctrl.dynamics.tree import Frame, RigidTree


@dataclass(frozen=True)
class Opening:
    """How far a gate is open: 1 up to ``near`` [m], 0 from ``far`` [m] on, smooth between."""

    near: float
    far: float

    def __call__(self, gap: Tensor) -> Tensor:
        """Return g at distances ``gap`` [m], of any shape."""
        part = ((self.far - gap) * (1.0 / (self.far - self.near))).clamp(0.0, 1.0)
        return part * part * (3.0 - 2.0 * part)


class TipGate:
    """How near the tip of a contact is to its surface.

    Args:
        base: the arm.
        contact: of networks that act on one.
        opening: at which distances.
    """

    def __init__(self, base: RigidBodyDynamics, contact: Contact, opening: Opening) -> None:
        self.contact, self.open, self._base = contact, opening, base

    def gap(self, q: Tensor) -> Tensor:
        """Return the signed distance (N,) [m] at positions ``q`` (nq, N)."""
        return -Touch(self._base, self.contact, q).depth


class Gate:
    """How near the tool is to surfaces.

    Args:
        base: the arm.
        tool: what is looked at: the capsules of this frame's link, or the frame where there are none.
        surfaces: shapes, each in a frame of the arm's model or in the world.
        opening: at which distances.
        distance: ``mbctrl.tasks.distance.capsule_obstacle``, from a layer above.

    Errors:
        SpecError: for a surface whose frame the model does not have.
    """

    def __init__(
        self, base: RigidBodyDynamics, tool: Frame, surfaces: tuple[Surface, ...], opening: Opening, distance: Any
    ) -> None:
        self.base, self.surfaces, self.open, self._distance = base, surfaces, opening, distance
        self.capsules = gate_capsules(base.tree, tool)
        self._frames = [frame_of(surface, base.tree) for surface in surfaces]
        self._link = tool.link
        self._ends = np.array([[a for a, *_ in self.capsules], [b for _, b, *_ in self.capsules]])  # (2, C, 3)
        self._radius = torch.tensor([[radius] for _, _, radius, _ in self.capsules], dtype=base.dtype, device=base.device)

    def gap(self, q: Tensor) -> Tensor:
        """Return the signed distance (N,) [m] to the nearest surface at positions ``q`` (nq, N)."""
        poses = self.base.poses(q)
        points = self.base.points(poses, self._link, self._ends.reshape(-1, 3))  # (2 C, 3, N)
        ends = points.movedim(0, 1)  # (3, 2 C, N): one wide pass for all capsules
        found = []
        for surface, frame in zip(self.surfaces, self._frames):
            seen = ends
            if frame is not None:
                rotation, position = self.base.frame(poses, frame)
                seen = (rotation[:, :, None] * (ends - position[:, None])[:, None]).sum(0)
            a, b = seen.split(len(self.capsules), 1)
            found.append(self._distance(a, b, self._radius, surface).amin(0))
        return reduce(torch.minimum, found)

    def gaps(self, q: Tensor, after: Tensor) -> Tensor:
        """Return ``gap`` (2, N) [m] at two positions (nq, N) each; one wide pass for both."""
        return self.gap(torch.cat((q, after), 1)).reshape(2, -1)


def gate_capsules(tree: RigidTree, tool: Frame) -> list[tuple[np.ndarray, np.ndarray, float, int]]:
    """Return what the gate looks at: ends (3,) [m], radius [m] and link of each capsule of the tool's link, or the tool's point."""
    found = [(c.a, c.b, float(c.radius), c.link) for c in tree.capsules if c.link == tool.link]
    return found or [(tool.position, tool.position, 0.0, tool.link)]
