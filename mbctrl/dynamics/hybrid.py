"""Physics-informed dynamics in torch: the analytic step, and what an ensemble has learnt that it misses near contact."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.encoding import Encoding
from mbctrl.dynamics.residual import Residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import Frame

ACTIVATIONS = {"tanh": torch.tanh, "silu": torch.nn.functional.silu, "relu": torch.relu}


class Gate:
    """How near the tool is to surfaces: 1 up to ``near`` [m], 0 from ``far`` [m] on, smooth between.

    Args:
        base: the arm.
        tool: what is looked at: the capsules of this frame's link, or the frame where there are none.
        surfaces: shapes that stand still.
        near, far: [m].
        distance: ``mbctrl.tasks.distance.capsule_obstacle``, from a layer above.
    """

    def __init__(
        self, base: RigidBodyDynamics, tool: Frame, surfaces: tuple[Obstacle, ...], near: float, far: float, distance: Any
    ) -> None:
        self.base, self.surfaces, self.near, self.far, self._distance = base, surfaces, near, far, distance
        self.capsules = gate_capsules(base.tree, tool)
        self._link = tool.link
        self._ends = np.array([[a for a, *_ in self.capsules], [b for _, b, *_ in self.capsules]])  # (2, C, 3)
        self._radius = torch.tensor([[radius] for _, _, radius, _ in self.capsules], dtype=base.dtype, device=base.device)

    def gap(self, q: Tensor) -> Tensor:
        """Return the signed distance (N,) [m] to the nearest surface at positions ``q`` (nq, N)."""
        points = self.base.points(self.base.poses(q), self._link, self._ends.reshape(-1, 3))  # (2 C, 3, N)
        a, b = points.movedim(0, 1).split(len(self.capsules), 1)  # (3, C, N) each: one wide pass for all capsules
        found = [self._distance(a, b, self._radius, surface).amin(0) for surface in self.surfaces]
        return reduce(torch.minimum, found)

    def __call__(self, q: Tensor) -> Tensor:
        """Return g (N,) at positions ``q`` (nq, N)."""
        part = ((self.far - self.gap(q)) * (1.0 / (self.far - self.near))).clamp(0.0, 1.0)
        return part * part * (3.0 - 2.0 * part)

    def between(self, q: Tensor, after: Tensor) -> Tensor:
        """Return the larger g (N,) of two positions; one wide pass for both."""
        both = self(torch.cat((q, after), 1))
        return torch.maximum(both[: q.shape[1]], both[q.shape[1] :])


class HybridDynamics:
    """``RigidBodyDynamics`` with a gated residual on top, or a fully learned model in its place; the same contract.

    Args:
        base: the analytic arm; of a fully learned model only its joints, commands and time step count.
        residual: the ensemble.
        tool: the gate looks at the capsules of this frame's link, or at the frame where there are none.
        distance: ``mbctrl.tasks.distance.capsule_obstacle``, from a layer above.
    """

    def __init__(self, base: RigidBodyDynamics, residual: Residual, tool: Frame, distance: Any) -> None:
        self.base, self.residual, self.tool = base, residual, tool
        self.nq, self.nx, self.nu, self.dtype, self.device, self.dt = base.nq, base.nx, base.nu, base.dtype, base.device, base.dt
        self._layers = [(self._tensor(w), self._tensor(b)[:, :, None]) for w, b in residual.folded()]
        # What all members take in, and what is summed over them, is one product for all of them.
        (w, b), (last, offset) = self._layers[0], self._layers[-1]
        self._first = w.reshape(-1, w.shape[2]), b.reshape(-1, 1)
        self._sum = last.transpose(0, 1).reshape(last.shape[1], -1) if len(self._layers) > 1 else last.sum(0), offset.sum(0)
        w, b = residual.hidden()[-1]
        self._heads = self._tensor(w), self._tensor(b)[:, :, None]
        self._encode = Encoding(base, residual.encode_angles)
        self.gate = Gate(base, tool, residual.surfaces, residual.near, residual.far, distance)
        self._scale = self._tensor(residual.output_scale)[:, None]
        spread = residual.spread
        self._spread = spread and replace(spread, **{k: self._tensor(value)[:, None] for k, value in vars(spread).items()})

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, float), dtype=self.dtype, device=self.device)

    def with_dt(self, dt: Any) -> HybridDynamics:
        """Return the same arm with another time step [s]."""
        other = object.__new__(HybridDynamics)
        other.__dict__ = {**self.__dict__, "base": self.base.with_dt(dt), "dt": dt}
        return other

    def carrying(self, body: np.ndarray) -> HybridDynamics:
        """Return the same arm with a payload that its physics knows; see ``RigidBodyDynamics.carrying``."""
        other = object.__new__(HybridDynamics)
        other.__dict__ = {**self.__dict__, "base": self.base.carrying(body)}
        return other

    def _before_last(self, x: Tensor, u: Tensor) -> Tensor:
        """Return what the last layer takes in, (E, values, N); (1, inputs, N) where it is the first."""
        y, activation = self._encode(x, u), ACTIVATIONS[self.residual.activation]
        if len(self._layers) == 1:
            return y.unsqueeze(0)
        w, b = self._first
        y = activation(torch.matmul(w, y) + b).reshape(self.residual.members, -1, y.shape[1])
        for w, b in self._layers[1:-1]:
            y = activation(torch.matmul(w, y) + b)
        return y

    def missed(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the velocity the base misses in a step of ``residual.dt``, ungated, (nv, N) [rad/s]."""
        w, b = self._sum  # S over E is in it
        return torch.matmul(w, self._before_last(x, u).flatten(0, 1)) + b

    def members(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return each member's mean [rad/s] and variance [rad²/s²] of what the base misses, ungated, (E, nv, N) each.

        Variances are 0 where the networks give means only.
        """
        w, b = self._heads
        y = torch.matmul(w, self._before_last(x, u)) + b
        mean = self._scale * y[:, : self.nq]
        if self._spread is None:
            return mean, torch.zeros_like(mean)
        log = self._spread.bounded(y[:, self.nq :], torch.nn.functional.softplus)
        return mean, (self._scale * self._spread.scale) ** 2 * log.exp()

    def deviation(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the standard deviation (nv, N) [rad/s] of the velocity after a step: the members' own and their disagreement."""
        mean, variance = self.members(x, u)
        disagreement = mean.var(0, correction=0)
        if self._spread is not None:
            disagreement = disagreement * self._spread.scale**2  # the whole deviation was scaled so that intervals cover
        return self.step_gate(x, u) * (variance.mean(0) + disagreement).sqrt() * (self.dt / self.residual.dt)

    def step_gate(self, x: Tensor, u: Tensor) -> Tensor:
        """Return g (N,) of a step: the larger one of before and, by the base, after it."""
        if self.residual.base == "identity":
            return torch.ones_like(x[0])
        return self.gate.between(x[: self.nq], self.base.step(x, u)[: self.nq])

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the state (nx, N) one step after ``x`` under ``u`` (nu, N)."""
        n, part = self.nq, self.dt / self.residual.dt
        if self.residual.base == "identity":
            v = x[n:] + self.missed(x, u) * part
            return torch.cat((x[:n] + self.dt * v, v))
        after = self.base.step(x, u)
        gate = self.gate.between(x[:n], after[:n])
        # Nothing times what is not a number is not nothing: far away the physics is all there is.
        more = torch.where(gate > 0, gate * self.missed(x, u), torch.zeros((), dtype=self.dtype)) * part
        drift = 0.5 * self.dt if self.base.integrator == "leapfrog" else self.dt  # how long the new v moves q
        return torch.cat((after[:n] + drift * more, after[n:] + more))

    def rollout(self, x0: Tensor, u: Tensor) -> Tensor:
        """Return states (H+1, nx, N) from ``x0`` (nx, N) under ``u`` (H, nu, N)."""
        states = [x0]
        for command in u:
            states.append(self.step(states[-1], command))
        return torch.stack(states)


def gate_capsules(tree: Any, tool: Frame) -> list[tuple[np.ndarray, np.ndarray, float, int]]:
    """Return what the gate looks at: ends (3,) [m], radius [m] and link of each capsule of the tool's link, or the tool's point."""
    found = [(c.a, c.b, float(c.radius), c.link) for c in tree.capsules if c.link == tool.link]
    return found or [(tool.position, tool.position, 0.0, tool.link)]
