"""A learned residual in a traced step: its networks are calls, their weights are given when the program runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbctrl.dynamics.contact import declared, seen_of_contact
from mbctrl.dynamics.residual import Residual, frame_of
from mbctrl.dynamics.tree import Frame
from mbctrl.kernels.graph import Graph, minimum
from mbctrl.kernels.network import Network
from mbctrl.kernels.rigid_body import Array, frame_in_world
from mbctrl.kernels.step import Stepped, TracedStep
from mbctrl.kernels.touch import TracedTouch
from mbctrl.tasks.algebra import clip01
from mbctrl.tasks.distance import capsule_obstacle


def weights_of(residual: Residual) -> np.ndarray:
    """Return all numbers of an ensemble in a row, as a program of ``TracedResidual`` takes them."""
    layers = residual.folded()
    return np.concatenate([np.ravel(part[e]) for e in range(residual.members) for layer in layers for part in layer])


def member_weights(residual: Residual) -> np.ndarray:
    """Return (E, weights) of each member by itself."""
    return np.stack([weights_of(residual.member(e)) for e in range(residual.members)])


class TracedResidual:
    """Adds an ensemble to steps; the same mathematics as ``mbctrl.dynamics.hybrid``.

    Args:
        residual: the ensemble.
        capsules: of ``gate_capsules``.
        tool: its link.

    Attributes:
        networks: one a member, in order; ``weights`` all their numbers in a row.
        alone: whether it takes the analytic step's place.
    """

    def __init__(self, residual: Residual, capsules: list[tuple[np.ndarray, np.ndarray, float, int]], tool: Frame) -> None:
        self.residual, self._capsules, self._tool, self._link = residual, capsules, tool, tool.link
        self.alone = residual.base == "identity"
        layers = residual.folded()
        sizes = (layers[0][0].shape[2], *(w.shape[1] for w, _ in layers))
        self.networks = (Network(tuple(map(int, sizes)), residual.activation),) * residual.members
        self.weights = weights_of(residual)

    def member(self, e: int) -> TracedResidual:
        """Return a member by itself: one network, and its weights."""
        return TracedResidual(self.residual.member(e), self._capsules, self._tool)

    def __call__(
        self, graph: Graph, step: TracedStep, q: Array, v: Array, u: Array, before: Any, after: Any, stepped: Stepped | None
    ) -> Array:
        """Return the velocity to add (n,), from state and angles before the analytic step, the angles after it, and the step.

        These two are not looked at by a model that stands alone, which has no gate.
        """
        part = step.h * (1.0 / self.residual.dt)
        gate, answers = 1.0, None
        if stepped is not None and self.residual.acts_on == "contact":
            inputs, answers, gate = self._contact(step, v, stepped)
        else:
            inputs = self._encoded(step, q, v, u, before)
            if not self.alone:
                gate = self._open(minimum(self._distance(step, before), self._distance(step, after)))
        total: Any = 0.0
        for k, network in enumerate(self.networks):
            total = total + graph.network(k, network, inputs, gate)
        return (total if answers is None else answers @ total) * part

    def _encoded(self, step: TracedStep, q: Array, v: Array, u: Array, before: Any) -> list[Any]:
        """Return what networks see that act on joints."""
        angle, sine, cosine = before
        turning = [i for i in range(step.arm.n) if step.arm.tree.revolute[i]]
        sliding = [i for i in range(step.arm.n) if not step.arm.tree.revolute[i]]
        command = u if step.drive.stiffness is None else u - q[list(step.drive.commanded)]
        seen = [*sine[turning], *cosine[turning], *q[sliding]] if self.residual.encode_angles else list(q)
        return [*seen, *v, *command]

    def _contact(self, step: TracedStep, v: Array, stepped: Stepped) -> tuple[list[Any], Array, Any]:
        """Return what networks see that act on a contact, what joint speeds (n, 3) unit impulses there give, and the gate."""
        contact = declared(self.residual.contact, step.arm.tree, key="contact")
        assert contact is not None  # the file was checked
        touch = TracedTouch(step.arm, contact, stepped.turns, step.h, step.lead)
        answers, longer = touch.answers(stepped.matrix), self.residual.dt / step.h
        before, change = touch.rows @ v, touch.rows @ ((stepped.v - v) * longer)
        free = before + change
        gate = self._open(minimum(-touch.depth, step.lead * longer * free[2] - touch.depth))
        return seen_of_contact(touch.depth, before, free, touch.rows @ answers), answers, gate

    def _open(self, gap: Any) -> Any:
        part = clip01((self.residual.far - gap) * (1.0 / (self.residual.far - self.residual.near)))
        return part * part * (3.0 - 2.0 * part)

    def _distance(self, step: TracedStep, angles: Any) -> Any:
        surfaces = [(surface, frame_of(surface, step.arm.tree)) for surface in self.residual.surfaces]
        links = {self._link} | {frame.link for _, frame in surfaces if frame is not None}
        poses = step.arm.world(*step.arm.turns(*angles), links)
        nearest: Any = None
        for a, b, radius, link in self._capsules:
            r, p = poses[link]
            ends = p + r @ a.astype(object), p + r @ b.astype(object)
            for surface, frame in surfaces:
                seen = ends
                if frame is not None:
                    rotation, position = frame_in_world(poses, frame)
                    seen = tuple(rotation.T @ (end - position) for end in ends)
                found = capsule_obstacle(*seen, radius, surface)
                nearest = found if nearest is None else minimum(nearest, found)
        return nearest
