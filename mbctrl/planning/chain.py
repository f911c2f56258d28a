"""Where a frame of an arm is, in numpy or torch alike: what a policy sees of the tool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbctrl.dynamics.tree import Frame, RigidTree
from mbctrl.planning.arrays import Array, like, namespace


@dataclass(frozen=True)
class Chain:
    """The links between the world and a frame, the world's side first.

    ``links`` are indices of joints; ``revolute`` (L,), ``rotation`` (L, 3, 3) and ``position`` (L, 3) [m] theirs;
    ``frame_rotation`` (3, 3) and ``frame_position`` (3,) [m] the frame's in the last link, or in the world where there is none.
    """

    links: tuple[int, ...]
    revolute: tuple[bool, ...]
    rotation: np.ndarray
    position: np.ndarray
    frame_rotation: np.ndarray
    frame_position: np.ndarray

    @classmethod
    def to(cls, tree: RigidTree, frame: Frame) -> Chain:
        """Return the chain to a frame of a tree."""
        links: list[int] = []
        link = frame.link
        while link >= 0:
            links.insert(0, link)
            link = tree.parent[link]
        fixed = tree.fixed_rotation[links].reshape(-1, 3, 3), tree.fixed_position[links].reshape(-1, 3)
        return cls(tuple(links), tuple(tree.revolute[i] for i in links), *fixed, frame.rotation, frame.position)

    def pose(self, angle: Array) -> tuple[Array, Array]:
        """Return rotation (3, 3) and position (3,) [m] in the world for joints ``angle`` (nq,), counted from their references."""
        module = namespace(angle)
        sine, cosine = module.sin(angle), module.cos(angle)
        turn, at = like(np.eye(3), angle), like(np.zeros(3), angle)
        for k, i in enumerate(self.links):
            at = at + turn @ like(self.position[k], angle)
            turn = turn @ like(self.rotation[k], angle)
            if self.revolute[k]:
                x, y, z = turn[:, 0], turn[:, 1], turn[:, 2]
                turn = module.stack((x * cosine[i] + y * sine[i], y * cosine[i] - x * sine[i], z), 1)
            else:
                at = at + turn[:, 2] * angle[i]
        return turn @ like(self.frame_rotation, angle), at + turn @ like(self.frame_position, angle)
