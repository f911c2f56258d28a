"""Physics-informed dynamics in torch: the analytic step, and what an ensemble has learnt that it misses near contact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.dynamics.residual import Residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import Frame

_ACTIVATIONS = {"tanh": torch.tanh, "silu": torch.nn.functional.silu, "relu": torch.relu}


class HybridDynamics:
    """``RigidBodyDynamics`` with a gated residual on top; the same contract.

    Args:
        base: the analytic arm.
        residual: the ensemble.
        tool: the gate looks at the capsules of this frame's link, or at the frame where there are none.
        distance: ``mbctrl.tasks.distance.capsule_obstacle``, from a layer above.
    """

    def __init__(self, base: RigidBodyDynamics, residual: Residual, tool: Frame, distance: Any) -> None:
        self.base, self.residual, self.tool, self._distance = base, residual, tool, distance
        self.nq, self.nx, self.nu, self.dtype, self.device, self.dt = base.nq, base.nx, base.nu, base.dtype, base.device, base.dt
        self._layers = [(self._tensor(w), self._tensor(b)[:, :, None]) for w, b in residual.folded()]
        self._revolute = torch.tensor([i for i in range(base.nq) if base.tree.revolute[i]], device=base.device)
        self._sliding = [i for i in range(base.nq) if not base.tree.revolute[i]]
        self._capsules = gate_capsules(base.tree, tool)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, float), dtype=self.dtype, device=self.device)

    def with_dt(self, dt: Any) -> HybridDynamics:
        """Return the same arm with another time step [s]."""
        other = object.__new__(HybridDynamics)
        other.__dict__ = {**self.__dict__, "base": self.base.with_dt(dt), "dt": dt}
        return other

    def gate(self, q: Tensor) -> Tensor:
        """Return g (N,) at positions ``q`` (nq, N)."""
        poses, nearest = self.base.poses(q), None
        for a, b, radius, link in self._capsules:
            ends = self.base.points(poses, link, np.stack([a, b]))
            for surface in self.residual.surfaces:
                found = self._distance(ends[0], ends[1], radius, surface)
                nearest = found if nearest is None else torch.minimum(nearest, found)
        part = ((self.residual.far - nearest) * (1.0 / (self.residual.far - self.residual.near))).clamp(0.0, 1.0)
        return part * part * (3.0 - 2.0 * part)

    def missed(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the velocity the physics misses in a step of ``residual.dt``, ungated, (nv, N) [rad/s]."""
        n, base = self.nq, self.base
        q, v = x[:n], x[n:]
        angle = (q - base._reference).index_select(0, self._revolute)
        parts = [torch.sin(angle), torch.cos(angle), q[self._sliding], v, u - q[base._pick]]
        y = torch.cat([part for part in parts if len(part)]).unsqueeze(0)  # (1, inputs, N): every member sees the same
        activation = _ACTIVATIONS[self.residual.activation]
        for k, (w, b) in enumerate(self._layers):
            y = torch.matmul(w, y) + b
            y = activation(y) if k < len(self._layers) - 1 else y
        return y.sum(0)  # S over E is in the last layer

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the state (nx, N) one step after ``x`` under ``u`` (nu, N)."""
        after, n = self.base.step(x, u), self.nq
        both = self.gate(torch.cat((x[:n], after[:n]), 1))  # one wide pass for now and then
        gate = torch.maximum(both[: x.shape[1]], both[x.shape[1] :])
        # Nothing times what is not a number is not nothing: far away the physics is all there is.
        more = torch.where(gate > 0, gate * self.missed(x, u), torch.zeros((), dtype=self.dtype)) * (self.dt / self.residual.dt)
        return torch.cat((after[:n] + self.dt * more, after[n:] + more))

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
